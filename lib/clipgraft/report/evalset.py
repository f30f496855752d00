"""Results on an evaluation folder: many tasks that are shown as one, `evalset`.

A mean is shown under a name of DataComp's only where all of its tasks are there and whole; else the name says of how
many it is, and a model that lacks one of them has none.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.aside import write_json
from clipgraft.evalset_tasks import AGGREGATES
from clipgraft.evaluation.evalset.aggregate import aggregate, results_lines, summary

if TYPE_CHECKING:
    from clipgraft.report.read import Model

log = logging.getLogger(__name__)

EVALSET = "evalset"
EACH_TASK = "each task"  # group of the columns of single tasks
Tasks = Mapping[str, Mapping[str, Any]]  # result by key


def together() -> dict[str, Any]:
    """What stands for all tasks of a folder in the results of a model."""
    return {
        "tasks": {},
        "retrieval": None,
        "zero_shot": {},
        "given": {},
        "probe": {},
        "choices": {},
    }


@dataclass(frozen=True)
class TaskRow:
    """One task, all models: a line of the table.

    Attributes:
        name, metric, size, notes: for people.
        chance: what guessing gives, if that is known.
        values: model key to the main metric.
        failed: model key to why there is none.
    """

    name: str
    metric: str
    size: str
    notes: str
    chance: float | None
    values: dict[str, float]
    failed: dict[str, str]


def rows_of(models: Mapping[str, Tasks]) -> list[TaskRow]:
    """One line per task, in the order of the folder."""
    rows = []
    for key in _keys(models):
        results = {model: tasks[key] for model, tasks in models.items() if key in tasks}
        done = [about for about in results.values() if "metrics" in about]
        first = done[0] if done else {}
        failed = {model: "failed" for model, about in results.items() if "failed" in about}
        reasons = [about["failed"] for about in results.values() if "failed" in about]
        notes = [
            *(f"partial: {note}" for note in first.get("partial", [])),
            *dict.fromkeys(reasons),
        ]
        size = f"{first['size']:,}" if done else "-"
        metric, chance = first.get("main_metric") or "-", first.get("chance")
        name = first.get("dataset", key)
        rows.append(TaskRow(name, metric, size, "; ".join(notes), chance, _mains(results), failed))
    return rows


def mains_of(models: Mapping[str, Tasks]) -> Iterator[tuple[str, dict[str, float], float]]:
    """Key, main metric by model and chance of each task that has one."""
    for key in _keys(models):
        results = {model: tasks[key] for model, tasks in models.items() if key in tasks}
        values = _mains(results)
        chances = [about.get("chance") for about in results.values() if "metrics" in about]
        if values:
            yield key, values, float("nan") if chances[0] is None else chances[0]


def means_of(
    models: Mapping[str, Tasks],
) -> Iterator[tuple[str, dict[str, float], float, tuple[str, ...]]]:
    """Name, mean by model, chance and keys of the tasks of each of DataComp's averages of which there is a task."""
    totals = {model: aggregate(tasks) for model, tasks in models.items()}
    chances = {key: chance for key, _, chance in mains_of(models)}
    for name, keys in AGGREGATES.items():
        there = [key for key in keys if key in chances]
        values = {
            model: totals[model]["mean_of_present"][name]
            for model, tasks in models.items()
            if there and all("metrics" in tasks.get(key, {}) for key in there)
        }
        if not values:
            continue
        is_whole = all(totals[model][name] is not None for model in values)
        title = name if is_whole else f"{name} ({len(there)}/{len(keys)})"
        yield title, values, sum(chances[key] for key in there) / len(there), tuple(there)


def size_of_evalset(result: Mapping[str, Any], *, with_names: bool = False) -> str:
    """How many of the 38 there are, and how many or which are missing."""
    return summary(aggregate(result["tasks"]), with_names=with_names)


def zero_shot_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Zero-shot classification by label; of all tasks of a folder by their names."""
    tasks = result.get("tasks", {}).values()
    found = {each["dataset"]: each["zero_shot"]["class"] for each in tasks if each.get("zero_shot")}
    return found or result.get("zero_shot") or {}


def write_evalset(models: Sequence[Model], out: Path) -> None:
    """Write `eval_results.jsonl` and `aggregate.json` of each model."""
    for model in models:
        if EVALSET not in model.results:
            continue
        tasks = model.results[EVALSET]["tasks"]
        total = aggregate(tasks)
        folder = out / model.key
        folder.mkdir(parents=True)
        (folder / "eval_results.jsonl").write_text(results_lines(tasks))
        write_json(folder / "aggregate.json", total)
        log.info("%s on the evaluation folder: %s", model.key, summary(total))


def _mains(results: Tasks) -> dict[str, float]:
    """The main metric of each model that has one."""
    values = {
        model: about.get("metrics", {}).get("main_metric") for model, about in results.items()
    }
    return {model: float(value) for model, value in values.items() if value is not None}


def _keys(models: Mapping[str, Tasks]) -> list[str]:
    return list(dict.fromkeys(key for tasks in models.values() for key in tasks))
