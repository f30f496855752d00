"""The page of several runs: what differs between them, what came of it, and how they trained.

Rows are those of `clipgraft.compare`: seeds of one recipe are one row, with their spread. The page is one file; each
figure carries its numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex

from clipgraft.compare import (
    LOCK,
    Row,
    best_means,
    collect,
    human,
    lead_metric,
    main_metrics,
    or_dash,
    percent,
    short_name,
)
from clipgraft.provenance import MANIFEST
from clipgraft.report.facts import subtitle
from clipgraft.report.figures_comparison import (
    plot_against_cost,
    plot_infonce,
    plot_losses,
    plot_rows,
    plot_tokens,
)
from clipgraft.report.page import render
from clipgraft.report.page_tables import Cell, Table
from clipgraft.report.read import Run, read_json, read_metrics, tokens_of
from clipgraft.report.sections import Section
from clipgraft.report.style import Figure
from clipgraft.versions import MEMORY

MAX_DIFFERENCES = 80
INFONCE = "infonce"
_COLOURS = (
    "#56B4E9", "#D55E00", "#009E73", "#E69F00", "#0072B2", "#CC79A7", "#7FA32B", "#A6761D", "#8F7BD6",
)  # fmt: skip
_SILENT = ("seed", "name", *MEMORY)  # settings that say nothing of a recipe
_TRAINED = {
    "pretrain": "Pretraining",
    "finetune_expert": "Experts and baselines",
    "finetune_router": "Routers",
}


def comparison(names: Sequence[str], results: Path) -> str:
    """The page of some runs, as HTML.

    Args:
        names: of the runs; each has its report.
        results: the store.
    Raises:
        ConfigError: if a run has no report.
    """
    rows, chance = collect(names, results)
    rows = [row for row in rows if any(map(row.values, main_metrics(chance)))] or rows
    runs = {name: _open(name, results) for name in dict.fromkeys(names)}
    metrics, lead = main_metrics(chance), lead_metric(chance)
    colours = {id(row): colour for row, colour in zip(rows, _colours(len(rows)), strict=True)}
    measured = Section("results", "Results")
    settings = Section("runs", "Runs")
    settings.tables = [_runs_table(runs, results), _differences_table(runs)]
    if metrics:
        measured.tables = [_models_table(rows, chance, metrics, lead, colours)]
        looks = [(row, colours[id(row)]) for row in rows]
        measured.figures = [
            plot_rows(looks, metrics, chance),
            plot_against_cost(looks, lead, float(chance[lead])),
            *_token_figure(runs, rows, lead),
        ]
    training = Section("training", "Training")
    training.figures = list(_loss_figures(runs))
    sections = [section for section in (measured, settings, training) if not section.is_empty]
    best = _best(rows, lead) if lead else None
    return render(
        {
            "title": "Comparison",
            "run": f"{len(runs)} runs" if len(runs) > 3 else ", ".join(runs),
            "subtitle": subtitle(Run.joined(runs)),
            "headline": "" if best is None else _headline(best, lead, float(chance[lead])),
            "tiles": _tiles(rows, runs),
            "sections": sections,
        }
    )


def _open(name: str, results: Path) -> Run:
    lock = json.loads((results / "runs" / name / LOCK).read_text())
    return Run.open({job: results / folder for job, folder in lock.items()})


def _best(rows: Sequence[Row], lead: str) -> Row:
    return max(rows, key=lambda row: mean(row.values(lead) or [-1.0]))


def _headline(best: Row, lead: str, chance: float) -> str:
    seeds = len(best.values(lead))
    of = f"mean of {seeds} seeds" if seeds > 1 else "one seed, so nothing is known of its spread"
    return (
        f"The highest {short_name(lead)} is that of {best.title}: {percent(best.values(lead))} % ({of}; "
        f"chance {100 * chance:.1f} %)."
    )


def _tiles(rows: Sequence[Row], runs: Mapping[str, Run]) -> list[dict[str, str]]:
    seconds = Run.joined(runs).seconds
    most = max(len(row.results) for row in rows)
    return [
        {"value": str(len(runs)), "text": "runs"},
        {"value": str(len(rows)), "text": "models of different recipes"},
        {"value": str(most), "text": "seeds at most of one recipe"},
        {"value": f"{seconds / 3600:.1f} h", "text": "of all jobs, shared ones counted once"},
    ]


# --- tables ---------------------------------------------------------------------------------------


def _models_table(
    rows: Sequence[Row],
    chance: Mapping[str, str],
    metrics: Sequence[str],
    lead: str,
    colours: Mapping[int, str],
) -> Table:
    """All models on all main metrics."""
    best = best_means(rows, metrics)
    lines = [[Cell("chance"), *[Cell("")] * 4]]
    lines[0] += [Cell(f"{100 * float(chance[name]):.1f}") for name in metrics] + [Cell("")]
    for row in rows:
        spent = next(iter(row.results.values()))
        costs = [or_dash(spent.get(k)) for k in ("samples_after", "flops_after", "flops_per_pair")]
        cells = [Cell(row.title, colour=colours[id(row)]), Cell(str(len(row.results)))]
        cells += map(Cell, costs)
        for name in metrics:
            values = row.values(name)
            is_best = bool(values) and f"{mean(values):.1f}" == f"{best[name]:.1f}"
            cells.append(Cell(percent(values), is_best))
        gains = row.gains(lead)
        cells.append(Cell("-" if row.model == "base" else percent(gains, "+")))
        lines.append(cells)
    head = ["model", "seeds", "samples", "FLOP", "FLOP a pair"]
    head += [short_name(name).partition("/")[2] for name in metrics]
    groups = [("", 2), ("after the base", 2), ("", 1)]
    for task in dict.fromkeys(name.partition("/")[0] for name in metrics):
        groups.append((task, sum(name.partition("/")[0] == task for name in metrics)))
    caption = (
        "Per cent: mean of the seeds +- standard deviation between them; bold is the best mean of its column. Over base: "
        f"difference of {short_name(lead)} from the base of the same run. The best expert is chosen on this table, which "
        "flatters it. Bad: differences within the spread, which mean nothing."
    )
    title = "All models"
    return Table(title, [*head, "over base"], lines, caption, [*groups, ("", 1)], True)


def _runs_table(runs: Mapping[str, Run], results: Path) -> Table:
    rows = []
    for name, run in runs.items():
        commits = {m["git"] for m in run.manifests.values() if m.get("git")}
        seen = sum(m.get("samples_seen") or 0 for m in run.manifests.values())
        texts = [f"{len(run.folders)}", f"{run.seconds / 60:,.1f}", human(seen)]
        texts += [", ".join(sorted(commits)) or "-", _seed_of(name, results)]
        rows.append([Cell(name), *map(Cell, texts)])
    head = ["run", "jobs", "minutes", "samples seen", "commits", "seed"]
    caption = "Bad: runs of different commits, whose difference may be that of the code."
    return Table("Runs", head, rows, caption, text_columns=(4,))


def _seed_of(run: str, results: Path) -> str:
    """As its report has it; older ones do not."""
    manifest = results / "runs" / run / "report" / MANIFEST
    settings = read_json(manifest)["settings"] if manifest.is_file() else {}
    return str(settings.get("seed", "-"))


def _differences_table(runs: Mapping[str, Run]) -> Table:
    """Settings that are not the same in all runs, and jobs that not all have."""
    told = {name: _settings_of(run) for name, run in runs.items()}
    keys = dict.fromkeys(key for settings in told.values() for key in settings)
    rows = []
    for key in keys:
        values = [settings.get(key, "-") for settings in told.values()]
        if len(set(values)) > 1:
            rows.append([Cell(key), *(Cell(value, is_code=True) for value in values)])
    hidden = len(rows) - MAX_DIFFERENCES
    caption = "Settings that differ, seeds left out; a dash where a run has no such job."
    if hidden > 0:
        caption += f" {hidden} more are not shown."
    if not rows:
        caption = "Nothing differs but seeds."
    columns = tuple(range(1, len(runs) + 1))
    head = ["setting", *runs]
    return Table("What differs", head, rows[:MAX_DIFFERENCES], caption, text_columns=columns)


def _settings_of(run: Run) -> dict[str, str]:
    found: dict[str, str] = {}
    for job, manifest in run.manifests.items():
        if manifest["stage"] != "report":
            found |= {f"{job}: {key}": value for key, value in _flat(manifest["settings"])}
    return found


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if key in _SILENT:
            continue
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = json.dumps(value).strip('"')
            yield f"{prefix}{key}", text if len(text) <= 60 else f"{text[:57]}..."


# --- figures --------------------------------------------------------------------------------------


def _colours(num: int) -> list[str]:
    """One for each: those that are told apart best, or as many as are needed from end to end of a scale."""
    if num <= len(_COLOURS):
        return list(_COLOURS[:num])
    return [to_hex(colormaps["turbo"](0.04 + 0.92 * i / (num - 1))) for i in range(num)]


def _loss_figures(runs: Mapping[str, Run]) -> Iterator[Figure]:
    """Losses of each stage that trains, a line for each job that differs; what runs share is one line."""
    for stage, title in _TRAINED.items():
        lines: dict[Path, str] = {}
        plain = set()  # lines whose own loss is InfoNCE
        for name, run in runs.items():
            for job, folder in run.of_stage(stage).items():
                label = lines.setdefault(folder.resolve(), f"{name}: {job}" if job else name)
                settings = run.manifest(stage, job)["settings"]
                if settings.get("loss", {}).get("kind") == "contrastive":
                    plain.add(label)
        metrics = {label: rows for folder, label in lines.items() if (rows := read_metrics(folder))}
        if not metrics:
            continue
        colours = dict(zip(metrics, _colours(len(metrics)), strict=True))
        yield plot_losses(stage, title, _loss_rows(metrics, "loss"), colours)
        if stage == "pretrain" and any(INFONCE in rows[0] for rows in metrics.values()):
            known = {
                label: [{**row, INFONCE: row.get(INFONCE, row.get("pair"))} for row in rows]
                for label, rows in metrics.items()
                if INFONCE in rows[0] or (label in plain and "pair" in rows[0])
            }
            yield plot_infonce(_loss_rows(known, INFONCE), colours)


def _loss_rows(
    metrics: Mapping[str, Sequence[Mapping[str, Any]]], key: str
) -> list[dict[str, Any]]:
    return [
        {
            "model": label,
            "samples_seen": row["samples_seen"],
            "hours": row["seconds"] / 3600,
            "loss": row[key],
        }
        for label, rows in metrics.items()
        for row in rows
    ]


def _token_figure(runs: Mapping[str, Run], rows: Sequence[Row], lead: str) -> list[Figure]:
    """Bases against the tokens of their first phase; nothing if all have as many."""
    bases = [row for row in rows if row.model == "base"]
    lines = {name: row.results[version] for row in bases for name, version in row.runs.items()}
    found = []
    for name, run in runs.items():
        phases = [m for m in run.manifests.values() if m["stage"] == "pretrain"]
        line = lines.get(name, {})
        if line.get(lead) and phases and "image_tokens" in phases[0]:
            found.append(
                {"run": name, "tokens": tokens_of(phases[0]), "per_cent": 100 * float(line[lead])}
            )
    return [plot_tokens(found, lead)] if len({row["tokens"] for row in found}) > 1 else []
