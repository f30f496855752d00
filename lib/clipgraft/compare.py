"""Comparing runs: one table over seeds, `python -m clipgraft.runs compare RUN ...`.

A model of several runs is one row if all that led to it was set alike, seeds left out; how it was set is read from
manifests, so names of runs mean nothing, and what runs share counts once. Models of one name that were set
differently stand below one another, told apart by the runs that they come from. The best expert of each run, by its
leading metric, is a row of its own: chosen on what is shown, which flatters it.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from clipgraft.config import ConfigError
from clipgraft.provenance import MANIFEST, read_manifest

LOCK = "versions.json"
BEST = "best_expert"
_SHOWN = ("/mean_R@1", "_acc1", "evalset/Average")  # how the metrics of the table end
_LAST = "best_expert upcycled moe"
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
        runs: in which it is.
        results: its line of `results.csv`, by version; a version that runs share is there once.
        bases: the line of the base of the same run, likewise.
        title: for people; has what its runs have in common, where several rows are of one model.
    """

    model: str
    runs: list[str] = field(default_factory=list)
    results: dict[str, dict[str, str]] = field(default_factory=dict)
    bases: dict[str, dict[str, str]] = field(default_factory=dict)
    title: str = ""

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
        chance = lines.pop("chance") | chance
        evaluations = _evaluations_of(run, results)
        recipes = {model: _recipe(folder) for model, folder in evaluations.items()}
        experts = [model for model in lines if model.startswith("expert_")]
        if len(experts) > 1 and (lead := lead_metric(chance)):
            best = max(experts, key=lambda model: float(lines[model][lead] or 0))
            lines[BEST], evaluations[BEST] = lines[best], evaluations[best]
            recipes[BEST] = _digest([recipes[model] for model in experts])
        for model, line in lines.items():
            row = rows.setdefault((model, recipes[model]), Row(model))
            row.runs.append(run)
            row.results[str(evaluations[model])] = line
            row.bases[str(evaluations[model])] = lines.get("base", {})
    ordered = _in_order(rows)
    names = [row.model for row in ordered]
    for row in ordered:
        several = names.count(row.model) > 1
        row.title = row.model.replace("_", " ") + (f" ({_common(row.runs)})" if several else "")
    return ordered, chance


def _results_of(run: str, results: Path) -> dict[str, dict[str, str]]:
    path = results / "runs" / run / "report" / "results.csv"
    if not path.exists():
        raise ConfigError(
            f"run {run!r} has no {path}. Hint: snakemake --cores all results/runs/{run}/{LOCK}"
        )
    with path.open() as file:
        return {line.pop("model"): line for line in csv.DictReader(file)}


def _evaluations_of(run: str, results: Path) -> dict[str, Path]:
    """Folder of the first evaluation of each model."""
    lock = json.loads((results / "runs" / run / LOCK).read_text())
    found: dict[str, Path] = {}
    for job, folder in lock.items():
        if job.startswith("evaluate/"):
            found.setdefault(job.split("/")[1], (results / folder).resolve())
    return found


def lead_metric(chance: Mapping[str, str]) -> str:
    """The metric that stands for all: the first mean R@1, or else the first accuracy; empty without any."""
    found = [name for end in _SHOWN for name in chance if name.endswith(end)]
    return next(iter(found), "")


def main_metrics(chance: Mapping[str, str]) -> list[str]:
    """Those of the table: mean R@1 of tasks, accuracy of labels."""
    return [name for name in chance if name.endswith(_SHOWN)]


def short_name(metric: str) -> str:
    """For the head of a table."""
    return metric.replace("mean_R@1", "R@1").replace("_acc1", "")


def _recipe(folder: Path, known: dict[Path, str] | None = None) -> str:
    """All that was set for a job and those before it, but seeds, as text."""
    known = {} if known is None else known
    if folder not in known:
        manifest = read_manifest(folder)
        settings = {key: value for key, value in manifest["settings"].items() if key != "seed"}
        inputs = {
            name: _recipe((folder / about["manifest"].removesuffix(MANIFEST)).resolve(), known)
            for name, about in sorted(manifest["inputs"].items())
        }
        known[folder] = _digest([manifest["stage"], settings, inputs])
    return known[folder]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _in_order(rows: Mapping[tuple[str, str], Row]) -> list[Row]:
    """Models in the order of the first run that has them; those of one name together."""
    models = sorted(dict.fromkeys(model for model, _ in rows), key=_LAST.find)
    return [row for model in models for row in rows.values() if row.model == model]


def _text(rows: Sequence[Row], chance: Mapping[str, str]) -> str:
    metrics = main_metrics(chance)
    lead = lead_metric(chance)
    best = {name: max(mean(v) for row in rows if (v := row.values(name))) for name in metrics}
    head = ["model", "seeds", "after", "FLOP", "FLOP/pair"]
    head += [short_name(name) for name in metrics]
    lines = [[*head, "over base"]]
    lines.append(
        ["chance", "", "", "", "", *(percent([100 * float(chance[n])]) for n in metrics), ""]
    )
    for row in rows:
        costs = next(iter(row.results.values()))
        cells = [row.title, str(len(row.results))]
        cells += [
            short_count(costs.get(key, ""))
            for key in ("samples_after", "flops_after", "flops_per_pair")
        ]
        for name in metrics:
            values = row.values(name)
            is_best = values and f"{mean(values):.1f}" == f"{best[name]:.1f}"
            cells.append(percent(values) + ("*" if is_best else " "))
        lines.append([*cells, percent(row.gains(lead), sign="+") if row.model != "base" else "-"])
    return _aligned(lines) + "\n" + _NOTE


def percent(values: Sequence[float], sign: str = "") -> str:
    """Mean and spread between seeds."""
    if not values:
        return "-"
    spread = f" +- {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.1f}{spread}"


def _common(runs: Sequence[str]) -> str:
    """What the names of runs begin with, or the one name."""
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*runs, strict=False))
    return "".join(letters[0] for letters in alike).rstrip("_-") or ", ".join(runs)


def short_count(count: str) -> str:
    """12345 as 12.3k; nothing, and what is not known, as a dash."""
    number = float(count or 0)
    for unit, size in _UNITS.items():
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}" if number else "-"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        + "\n"
        for line in lines
    )
