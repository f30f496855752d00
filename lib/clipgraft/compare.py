"""Comparing runs: tables over seeds, `python -m clipgraft.runs compare RUN ...`.

A model of several runs is one row if all that led to it, and all tasks that it is measured on, were set alike, seeds
left out; how they were set is read from manifests, so names of runs mean nothing, and what runs share counts once.
Models of one name that were set or measured differently stand below one another, told apart by the runs that they come
from. The best expert of each run, by its
leading metric, is a row of its own: chosen on what is shown, which flatters it. Linear probes and retrieval among
candidates that agree have a table of their own.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeAlias

from clipgraft.config import ConfigError
from clipgraft.evalset_tasks import AGGREGATES
from clipgraft.provenance import MANIFEST, read_manifest
from clipgraft.versions import deciding

LOCK = "versions.json"
BEST = "best_expert"
_SHOWN = [re.compile(end) for end in (r"/mean_R@1$", r"_acc1$")]  # how the metrics of the table end
# Of an evaluation folder: the average, else other means, else each task; if it is not whole, `Average (3/38)`.
_OF_EVALSET = [
    re.compile(rf"^evalset/({names})$")
    for names in (r"Average( \(.+\))?", rf"({'|'.join(AGGREGATES)})( \(.+\))?", ".+")
]
_ATTRIBUTES = ("/probe_", "/given_")  # what the metrics of the second table have in their names
_LAST = "best_expert upcycled moe"
Version: TypeAlias = tuple[Path, ...]  # of a model: the folders of all its evaluations
_UNITS = {"E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
_NOTE = (
    "per cent: mean of the seeds, +- standard deviation between them; over base: difference of the first R@1 from the "
    "base of the same run; best expert: chosen by it, run by run; * best mean of its column; after, FLOP: samples and FLOPs after the base\n"
)


@dataclass
class Row:
    """One model with one recipe.

    Attributes:
        model: its key.
        runs: in which it is, and as which version.
        results: what is known in its line of `results.csv`, by version; a version that runs share is there once.
        bases: the line of the base of the same run, likewise.
        title: for people; has what its runs have in common, where several rows are of one model.
    """

    model: str
    runs: dict[str, Version] = field(default_factory=dict)
    results: dict[Version, dict[str, str]] = field(default_factory=dict)
    bases: dict[Version, dict[str, str]] = field(default_factory=dict)
    title: str = ""

    def add(
        self, run: str, version: Version, line: Mapping[str, str], base: Mapping[str, str]
    ) -> None:
        """Take in what a run says of a version; what is known of it from other runs stays."""
        self.runs[run] = version
        for lines, more in ((self.results, line), (self.bases, base)):
            lines.setdefault(version, {}).update({key: text for key, text in more.items() if text})

    def values(self, metric: str) -> list[float]:
        """Per cent, of each seed that has it."""
        found = (result.get(metric) for result in self.results.values())
        return [100 * float(value) for value in found if value]

    def gains(self, metric: str) -> list[float]:
        """Points over the base of the same run."""
        pairs = (
            (self.results[key].get(metric), self.bases[key].get(metric)) for key in self.results
        )
        return [100 * (float(own) - float(base)) for own, base in pairs if own and base]


def compare(runs: Sequence[str], results: Path) -> str:
    """A table of all models of some runs, mean and spread over seeds.

    Args:
        runs: names; each has its report.
        results: the store.

    Raises:
        ConfigError: if a run has no report.
    """
    rows, chance = collect(runs, results)
    return _text(rows, chance)


def collect(runs: Sequence[str], results: Path) -> tuple[list[Row], dict[str, str]]:
    """Models of some runs, those of one recipe together, and what guessing gives.

    Args:
        runs: names; each has its report.
        results: the store.
    Returns:
        Rows in the order of the first run that has them, and chance by metric.
    Raises:
        ConfigError: if a run has no report.
    """
    rows: dict[tuple[str, str], Row] = {}
    chance: dict[str, str] = {}
    for run in dict.fromkeys(runs):
        lines = _results_of(run, results)
        guessed = lines.pop("chance")
        chance = guessed | chance
        evaluations = _evaluations_of(run, results)
        recipes = {model: _recipe_of_tasks(tasks) for model, tasks in evaluations.items()}
        experts = [model for model in lines if model.startswith("expert_")]
        if len(experts) > 1 and (lead := lead_metric(guessed)):
            best = max(experts, key=lambda model: float(lines[model][lead] or 0))
            lines[BEST], evaluations[BEST] = lines[best], evaluations[best]
            recipes[BEST] = _digest([recipes[model] for model in experts])
        for model, line in lines.items():
            row = rows.setdefault((model, recipes[model]), Row(model))
            row.add(run, tuple(evaluations[model].values()), line, lines.get("base", {}))
    ordered = _in_order(rows)
    _entitle(ordered)
    return ordered, chance


def _results_of(run: str, results: Path) -> dict[str, dict[str, str]]:
    path = results / "runs" / run / "report" / "results.csv"
    if not path.exists():
        raise ConfigError(
            f"run {run!r} has no {path}. Hint: snakemake --cores all results/runs/{run}/{LOCK}"
        )
    with path.open() as file:
        return {line.pop("model"): line for line in csv.DictReader(file)}


def _evaluations_of(run: str, results: Path) -> dict[str, dict[str, Path]]:
    """Folders of all evaluations of each model, by task; sorted, so that their order in the plan says nothing."""
    lock = json.loads((results / "runs" / run / LOCK).read_text())
    found: dict[str, dict[str, Path]] = {}
    for job, folder in sorted(lock.items()):
        if job.startswith("evaluate/"):
            _, model, task = job.split("/", 2)
            found.setdefault(model, {})[task] = (results / folder).resolve()
    return found


def lead_metric(chance: Mapping[str, str]) -> str:
    """The metric that stands for all: the first mean R@1, accuracy or metric of a folder; empty without any."""
    found = [name for end in _SHOWN for name in chance if end.search(name)]
    return next(iter([*found, *_metrics_of_evalset(chance)]), "")


def main_metrics(chance: Mapping[str, str]) -> list[str]:
    """Those of the table: mean R@1 of tasks, accuracy of labels, what stands for an evaluation folder."""
    of_evalset = _metrics_of_evalset(chance)
    return [
        name for name in chance if name in of_evalset or any(end.search(name) for end in _SHOWN)
    ]


def _metrics_of_evalset(chance: Mapping[str, str]) -> list[str]:
    kinds = ([name for name in chance if kind.match(name)] for kind in _OF_EVALSET)
    return next(filter(None, kinds), [])


def short_name(metric: str) -> str:
    """For the head of a table."""
    short = metric.replace("mean_R@1", "R@1").replace("_acc1", "")
    return short.removesuffix("_acc").replace("/probe_", "/probe:").replace("/given_", "/given:")


def _recipe(folder: Path, known: dict[Path, str]) -> str:
    """All that was set for a job and those before it and decides on results, but seeds, as text."""
    if folder not in known:
        manifest = read_manifest(folder)
        decides, read = deciding(manifest["settings"], manifest["inputs"])
        settings = {key: value for key, value in decides.items() if key != "seed"}
        settings["untrained"] = settings.get("untrained") is not None  # a seed, too
        inputs = {
            name: _recipe((folder / about["manifest"].removesuffix(MANIFEST)).resolve(), known)
            for name, about in sorted(read.items())
        }
        known[folder] = _digest([manifest["stage"], settings, inputs])
    return known[folder]


def _recipe_of_tasks(tasks: Mapping[str, Path]) -> str:
    """How a model and all tasks that it is measured on were set."""
    known: dict[Path, str] = {}
    return _digest({task: _recipe(folder, known) for task, folder in tasks.items()})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _in_order(rows: Mapping[tuple[str, str], Row]) -> list[Row]:
    """Models in the order of the first run that has them; those of one name together."""
    models = sorted(dict.fromkeys(model for model, _ in rows), key=_LAST.find)
    return [row for model in models for row in rows.values() if row.model == model]


def _text(rows: Sequence[Row], chance: Mapping[str, str]) -> str:
    lead = lead_metric(chance)
    attributes = [name for name in chance if any(part in name for part in _ATTRIBUTES)]
    tables = [_table(rows, chance, main_metrics(chance), lead)]
    if attributes:
        tables.append(_table(rows, chance, attributes, ""))
    return "\n".join([*tables, _NOTE])


def _table(
    rows: Sequence[Row], chance: Mapping[str, str], metrics: Sequence[str], lead: str
) -> str:
    """Of the models that have any of these metrics; with costs and gains where there is a leading metric."""
    rows = [row for row in rows if not metrics or any(row.values(name) for name in metrics)]
    best = best_means(rows, metrics)
    head = ["model", "seeds", "after", "FLOP", "FLOP/pair", *map(short_name, metrics), "over base"]
    guessed = [percent([100 * float(chance[name])]) for name in metrics]
    lines = [head, ["chance", "", "", "", "", *guessed, ""]]
    for row in rows:
        costs = next(iter(row.results.values()))
        cells = [row.title, str(len(row.results))]
        cells += [
            or_dash(costs.get(key)) for key in ("samples_after", "flops_after", "flops_per_pair")
        ]
        for name in metrics:
            values = row.values(name)
            is_best = values and f"{mean(values):.1f}" == f"{best[name]:.1f}"
            cells.append(percent(values) + ("*" if is_best else " "))
        lines.append([*cells, percent(row.gains(lead), sign="+") if row.model != "base" else "-"])
    if not lead:
        lines = [[*line[:2], *line[5:-1]] for line in lines]
    return aligned(lines)


def best_means(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, float]:
    """The highest mean of each metric; none of a metric that no row has."""
    means = {name: [mean(v) for row in rows if (v := row.values(name))] for name in metrics}
    return {name: max(values) for name, values in means.items() if values}


def percent(values: Sequence[float], sign: str = "") -> str:
    """Mean and spread between seeds."""
    if not values:
        return "-"
    spread = f" +- {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.1f}{spread}"


def _entitle(rows: Sequence[Row]) -> None:
    """Name each row after its model, and where that is not enough after its runs: without their last numbers if it can."""
    models = [row.model for row in rows]
    of_seeds = [(row.model, _family(row)) for row in rows if len(row.runs) > 1]
    for row in rows:
        is_plain = of_seeds.count((row.model, _family(row))) == 1 and len(row.runs) > 1
        runs = f" ({_family(row) if is_plain else ', '.join(row.runs)})"
        row.title = row.model.replace("_", " ") + runs * (models.count(row.model) > 1)


def _family(row: Row) -> str:
    """The names of the runs without the numbers of seeds."""
    return ", ".join(dict.fromkeys(re.sub(r"(?<=.)[_-]?\d+$", "", run) for run in row.runs))


def human(count: float) -> str:
    """12345 as 12.3k."""
    for unit, size in _UNITS.items():
        if count >= 0.9995 * size:  # what has three digits in the unit below
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def or_dash(count: float | str | None) -> str:
    """The same of a number or of what stands in a CSV; nothing, and what is not known, is a dash."""
    return human(float(count)) if count and float(count) else "-"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of a table for the terminal: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        + "\n"
        for line in lines
    )
