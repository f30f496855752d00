"""Stage `scaling`: the inverse scaling law of a sweep, on one page.

Writes `scaling.html` (self-contained), `runs.csv` (every run with its numbers), `results.txt` (the slopes and what
they show, for the terminal) and `figures/` (every figure as SVG, with its numbers as CSV).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipgraft.compare import human
from clipgraft.report import figures_scaling
from clipgraft.report.costs import ancestors
from clipgraft.report.facts import machines, run_section, subtitle, write_figures
from clipgraft.report.page import render
from clipgraft.report.page_tables import Cell, Table
from clipgraft.report.read import Run
from clipgraft.report.sections import Section
from clipgraft.report.slopes import LEVEL, Estimate, Law, fit_law
from clipgraft.report.sweep import SIDES, Line, Rung, Side, Sweep, Trial
from clipgraft.report.tables import to_csv
from clipgraft.settings import ScalingJob

log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


def scaling(settings: ScalingJob, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write the page of a sweep.

    Args:
        settings: title, metric, and the point of each run on the axes.
        inputs: folders of the phases and evaluations of all runs: `small-i17/pretrain/short` and so on.
        out: folder to write.
    Returns:
        Facts for the manifest.
    """
    run = Run.open(inputs)
    sweep = Sweep.open(run, settings)
    laws = {side: _law(sweep, side, settings) for side in SIDES if _main(sweep, side)}
    metric = f"{sweep.metric.short} on {settings.task}"
    conditions = _conditions(run, sweep)
    said = [sentence(side, law, _main(sweep, side), metric) for side, law in laws.items()]
    headline = " ".join([*said, conditions])
    sections = [
        _law_section(sweep, laws, metric),
        *(_side_section(sweep, side, law, metric) for side, law in laws.items()),
        _cost_section(run, sweep, metric),
        run_section(run),
    ]
    sections = [section for section in sections if not section.is_empty]
    write_figures(sections, out / "figures")
    (out / "runs.csv").write_text(to_csv([_run_row(trial) for trial in sweep.trials]))
    (out / "results.txt").write_text(_text(sweep, laws, headline))
    page = render(
        {
            "title": settings.title,
            "run": f"{len(sweep.trials)} runs",
            "subtitle": subtitle(run),
            "headline": headline,
            "tiles": _tiles(run, sweep, laws),
            "sections": sections,
        }
    )
    (out / "scaling.html").write_text(page, encoding="utf-8")
    log.info("%s", headline)
    return {
        "num_runs": len(sweep.trials),
        "num_figures": sum(len(section.figures) for section in sections),
        "verdicts": {side: law.verdict for side, law in laws.items()},
    }


def sentence(side: str, law: Law, lines: Sequence[Line], metric: str) -> str:
    """What the sweep shows of one side, and never more.

    Args:
        side: `image` or `text`.
        law: the fit.
        lines: one per size.
        metric: in words.
    """
    each = ", ".join(f"{line.size} {slope}" for line, slope in zip(lines, law.slopes, strict=True))
    text = f"Each halving of the {side} tokens costs this many points of {metric}: {each}."
    if law.num_seeds < 2:
        return (
            f"{text} There is one seed only, so nothing is known of how runs differ by chance: the sweep "
            "does not show whether that falls with size."
        )
    if law.trend is None:
        return (
            f"{text} There is one size only: the sweep does not show whether that falls with size."
        )
    changes = f"With each doubling of the parameters it changes by {law.trend}"
    reason = {
        "shows": "the interval lies below 0: the sweep shows that it falls with size",
        "does not show": "the interval holds 0: the sweep does not show that it falls with size",
        "shows the opposite of": "the interval lies above 0: the sweep shows that it rises with size, the opposite of the law",
    }[law.verdict]
    return f"{text} {changes}; {reason}."


# --- numbers ----------------------------------------------------------------------------------------------


def _main(sweep: Sweep, side: Side) -> list[Line]:
    """One line per size: of the strategy that has the full length."""
    found: dict[str, Line] = {}
    for line in sweep.lines(side):
        found.setdefault(line.size, line)
    return list(found.values())


def _law(sweep: Sweep, side: Side, settings: ScalingJob) -> Law:
    ladders = [line.ladder for line in _main(sweep, side)]
    return fit_law(ladders, settings.num_resamples, settings.seed)


def _drop_row(line: Line, rung: Rung) -> dict[str, Any]:
    full = line.full.cell().mean
    scores = rung.cell().scores
    drops = [full - score for score in scores]
    return {
        "size": line.size,
        "num_params": line.full.trials[0].num_params,
        "strategy": line.strategy,
        "tokens": rung.tokens,
        "full": line.full.tokens,
        "seeds": len(scores),
        "score": float(np.mean(scores)),
        **_spread("drop", drops),
    }


def _gain_row(line: Line, rung: Rung) -> dict[str, Any]:
    gains = rung.cell(lambda trial: trial.scores[-1] - trial.scores[0]).scores
    return {
        "size": line.size,
        "tokens": rung.tokens,
        "reduction": line.full.tokens / rung.tokens,
        "seeds": len(gains),
        **_spread("gain", gains),
    }


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    mean, low, high = float(np.mean(values)), min(values), max(values)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def _slope_rows(sweep: Sweep, laws: Mapping[Side, Law]) -> Rows:
    return [
        {
            "side": side,
            "size": line.size,
            "num_params": line.full.trials[0].num_params,
            "slope": slope.value,
            "low": slope.low,
            "high": slope.high,
            "lengths": len(line.ladder.cells),
            "seeds": law.num_seeds,
        }
        for side, law in laws.items()
        for line, slope in zip(_main(sweep, side), law.slopes, strict=True)
    ]


def _cost_rows(sweep: Sweep) -> Rows:
    """Every recipe after its first phase and at the end: means of its seeds, and whether it is on a front."""
    sizes = sweep.sizes
    rows: list[dict[str, Any]] = []
    for recipe in dict.fromkeys(trial.recipe for trial in sweep.trials):
        same = [trial for trial in sweep.trials if trial.recipe == recipe]
        first = same[0]
        parts = {"before": 0, "after": -1} if len(first.scores) > 1 else {"after": -1}
        for part, at in parts.items():
            row: dict[str, Any] = {"size": sizes[first.size], "part": part, "first_run": first.run}
            row |= {"image_tokens": first.tokens["image"], "text_tokens": first.tokens["text"]}
            row |= {f"{side}_strategy": first.strategy[side] for side in SIDES}
            row |= {"macs": first.macs[at], "hours": float(np.mean([t.hours[at] for t in same]))}
            row |= {"seeds": len(same)} | _spread("score", [t.scores[at] for t in same])
            rows.append(row)
    order = list(sizes.values())
    rows.sort(key=lambda row: order.index(row["size"]))
    for unit in ("macs", "hours"):
        for row in rows:
            row[f"{unit}_front"] = not any(_beats(other, row, unit) for other in rows)
    return rows


def _beats(one: Mapping[str, Any], other: Mapping[str, Any], unit: str) -> bool:
    """Whether one is no worse in cost and score and better in one of them, of the same part."""
    if one["part"] != other["part"]:
        return False
    no_worse = one[unit] <= other[unit] and one["score"] >= other["score"]
    return bool(no_worse and (one[unit] < other[unit] or one["score"] > other["score"]))


def _run_row(trial: Trial) -> dict[str, Any]:
    return {
        "run": trial.run,
        **{f"axis_{axis}": point for axis, point in trial.point.items()},
        "num_params": trial.num_params,
        **{f"{side}_tokens": trial.tokens[side] for side in SIDES},
        **{f"{side}_strategy": trial.strategy[side] for side in SIDES},
        "samples_seen": trial.samples_seen,
        "macs": trial.macs[-1],
        "hours": trial.hours[-1],
        "score_first_phase": trial.scores[0],
        "score": trial.scores[-1],
    }


# --- sections ---------------------------------------------------------------------------------------------


def _law_section(sweep: Sweep, laws: Mapping[Side, Law], metric: str) -> Section:
    section = Section("law", "Slope against size")
    rows = _slope_rows(sweep, laws)
    if rows:
        section.tables.append(_slopes_table(rows, laws, metric))
        section.figures.append(figures_scaling.plot_slopes(rows))
    return section


def _slopes_table(rows: Rows, laws: Mapping[Side, Law], metric: str) -> Table:
    cells = [
        [
            Cell(row["size"]),
            Cell(row["side"]),
            Cell(f"{row['lengths']}"),
            Cell(f"{row['seeds']}"),
            *_estimate_cells(Estimate(row["slope"], row["low"], row["high"])),
        ]
        for row in rows
    ]
    for side, law in laws.items():
        if law.trend is not None:
            texts = ["change per doubling of the size", side, "", ""]
            cells.append([*map(Cell, texts), *_estimate_cells(law.trend)])
    head = ["size (parameters)", "side", "lengths", "seeds", "slope a", f"{LEVEL:.0f} % interval"]
    caption = (
        f"drop = a log2(longest / tokens), in points of {metric}, fitted through the origin. The law holds if a falls with size: "
        "if the interval of the last line lies below 0. Intervals: bootstrap over seeds and lengths, the spread "
        "between seeds pooled over all runs; with one seed there are none."
    )
    return Table("What a halving of the tokens costs", head, cells, caption, text_columns=(1,))


def _estimate_cells(estimate: Estimate) -> list[Cell]:
    low, high = estimate.low, estimate.high
    return [
        Cell(f"{estimate.value:z.2f}"),
        Cell("-" if low is None else f"{low:z.2f} to {high:z.2f}"),
    ]


def _side_section(sweep: Sweep, side: Side, law: Law, metric: str) -> Section:
    section = Section(side, f"Fewer {side} tokens")
    held = _held(sweep, side)
    lines, main = sweep.lines(side), _main(sweep, side)
    rows = [_drop_row(line, rung) for line in main for rung in line.rungs]
    slopes = {line.size: slope.value for line, slope in zip(main, law.slopes, strict=True)}
    section.figures.append(figures_scaling.plot_drop(side, rows, metric, slopes, held))
    if len({line.strategy for line in lines}) > 1:
        rows = [_drop_row(line, rung) for line in lines for rung in line.rungs]
        section.figures.append(figures_scaling.plot_strategies(side, rows, metric, held))
    if all(len(trial.scores) > 1 for trial in sweep.trials):
        rows = [_gain_row(line, rung) for line in main for rung in line.rungs]
        section.figures.append(figures_scaling.plot_gain(side, rows, metric, held))
    return section


def _cost_section(run: Run, sweep: Sweep, metric: str) -> Section:
    section = Section("cost", "Cost")
    chance = 100 * sweep.metric.chance
    figure = figures_scaling.plot_cost(_cost_rows(sweep), metric, chance, " / ".join(machines(run)))
    section.figures.append(figure)
    return section


def _held(sweep: Sweep, side: Side) -> str:
    held = ", ".join(f"{axis} {point}" for axis, point in sweep.held(side).items())
    return f" Shown at {held}; runs.csv has the others." if held else ""


# --- words ------------------------------------------------------------------------------------------------


def _conditions(run: Run, sweep: Sweep) -> str:
    """Which data, how long, how many seeds: what the sentence holds for."""
    seen = sorted({trial.samples_seen for trial in sweep.trials})
    length = human(seen[0]) if len(seen) == 1 else f"{human(seen[0])} to {human(seen[-1])}"
    recipes = [trial.recipe for trial in sweep.trials]
    seeds = sorted({recipes.count(recipe) for recipe in recipes})
    words = " to ".join(dict.fromkeys(map(str, (seeds[0], seeds[-1]))))
    return (
        f"This is so for {_data(run)}, {length} samples seen, {words} seed{'' if seeds[-1] == 1 else 's'} per setting, "
        "and says nothing of other data, sizes or lengths of training."
    )


def _data(run: Run) -> str:
    """The training data: kinds of sources and number of samples."""
    kinds: dict[str, None] = {}
    counts: dict[Any, Any] = {}
    for job, folder in run.folders.items():
        if "/pretrain/" in job:
            for manifest in ancestors(folder).values():
                if manifest["stage"] == "download":
                    kinds[manifest["settings"]["source"]["kind"]] = None
                elif manifest["stage"] == "index" and manifest.get("num_samples"):
                    counts[human(manifest["num_samples"])] = None
    return f"{' / '.join(counts) or '?'} samples of {', '.join(kinds) or 'unknown sources'}"


def _tiles(run: Run, sweep: Sweep, laws: Mapping[Side, Law]) -> list[dict[str, str]]:
    phases = {
        run.folders[job].resolve(): m for job, m in run.manifests.items() if "/pretrain/" in job
    }
    hours = sum(manifest["train_seconds"] for manifest in phases.values()) / 3600
    tiles = [
        {"value": law.verdict, "text": f"the law, {side} tokens"} for side, law in laws.items()
    ]
    tiles.append({"value": f"{len(sweep.trials)}", "text": "runs"})
    tiles.append(
        {"value": f"{len(sweep.sizes)}", "text": f"sizes: {', '.join(sweep.sizes.values())}"}
    )
    tiles.append({"value": f"{hours:.2g} h", "text": f"of training on {' / '.join(machines(run))}"})
    return tiles


def _text(sweep: Sweep, laws: Mapping[Side, Law], headline: str) -> str:
    rows = [["size", "side", "points per halving of the tokens"]]
    for row in _slope_rows(sweep, laws):
        rows.append(
            [row["size"], row["side"], str(Estimate(row["slope"], row["low"], row["high"]))]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", headline.replace(". ", ".\n")]) + "\n"
