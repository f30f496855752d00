"""Tables of results: for the page, as CSV with every digit, and as plain text for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from clipgraft.compare import aligned, human, or_dash
from clipgraft.report.costs import Cost
from clipgraft.report.evalset import EACH_TASK, EVALSET, mains_of, means_of, size_of_evalset
from clipgraft.report.read import UNTRAINED, Model

WAYS = {"image_to_text": "image to text", "text_to_image": "text to image"}
_SHORT_WAYS = {"image_to_text": "i2t", "text_to_image": "t2i"}
_ZERO_SHOT = {  # in result.json: what to call it, and how many guesses it allows
    "acc1": ("accuracy", 1),
    "acc5": ("top 5", 5),
    "mean_per_class_recall": ("recall per class", 1),
}


PROBE, GIVEN, KNN = "probe", "labels given", "knn"  # groups that have a section of their own


@dataclass(frozen=True)
class Column:
    """One metric of one task.

    Attributes:
        task: name of the task.
        key: unique in the task, for the CSV: `image_to_text_R@1`, `colour_acc1`.
        group: for the head of a table: `image to text`, `accuracy`.
        title: below the group: `R@1`, `colour`.
        short: for the terminal.
        is_main: whether it belongs into a short table.
        values: model key to value, 0..1.
        chance: what guessing gives.
        parts: of an evaluation folder, keys of the tasks that it is the mean of.
    """

    task: str
    key: str
    group: str
    title: str
    short: str
    is_main: bool
    values: dict[str, float]
    chance: float
    parts: tuple[str, ...] = ()

    def is_best(self, model: str) -> bool:
        """Whether a model has the highest value, as displayed; of equal ones none is best."""
        shown = {displayed(value) for value in self.values.values()}
        return (
            model in self.values and len(shown) > 1 and displayed(self.values[model]) == max(shown)
        )


def displayed(value: float) -> float:
    """Per cent with one decimal."""
    return round(100 * value, 1)


def columns_of(models: Sequence[Model]) -> list[Column]:
    """All metrics of all tasks, in the order of the tasks."""
    # Random weights, which come first, are measured on some tasks alone.
    in_order = sorted(models, key=lambda model: model.key == UNTRAINED)
    tasks = list(dict.fromkeys(task for model in in_order for task in model.results))
    columns = []
    for task in tasks:
        results = {model.key: model.results[task] for model in models if task in model.results}
        columns += _retrieval_columns(task, results) + _zero_shot_columns(task, results)
        columns += _learnt_columns(task, results)
        columns += _evalset_columns(task, results)
    return columns


def results_csv(models: Sequence[Model], columns: Sequence[Column]) -> str:
    """All metrics with full precision, the first row being chance."""
    costs = [field.name for field in fields(Cost)]
    chances = {f"{column.task}/{column.key}": column.chance for column in columns}
    rows: list[dict[str, Any]] = [{"model": "chance", **dict.fromkeys(costs, ""), **chances}]
    for model in models:
        spent = asdict(model.cost) | {"minutes": round(model.cost.minutes, 3)}
        values = {f"{each.task}/{each.key}": each.values.get(model.key, "") for each in columns}
        rows.append({"model": model.key, **spent, **values})
    return to_csv(rows)


def results_text(models: Sequence[Model], columns: Sequence[Column]) -> str:
    """The main metrics in per cent, one block per task; `*` marks the best of a column, `+` the best expert."""
    blocks, spent = [], cost_columns(models)
    for task in dict.fromkeys(column.task for column in columns):
        main = [column for column in columns if column.task == task and column.is_main]
        # Numbers end in a mark or a blank, and so do their heads.
        best = best_expert(models, main)
        head = ["model", *(each.short for each in spent), *(f"{column.short} " for column in main)]
        chances = (f"{displayed(column.chance):.1f} " for column in main)
        rows = [["chance", *[""] * len(spent), *chances]]
        for model in models:
            if task in model.results:
                name = f"{model.title} +" if model.key == best else model.title
                costs = (each.cells[model.key] for each in spent)
                rows.append([name, *costs, *_text_cells(model, main)])
        found = (model.results[task] for model in models if task in model.results)
        about = size_of_task(max(found, key=num_images_of))
        blocks.append(f"{task}: {about}\n{aligned([head, *rows])}")
    rest = _without_numbers(models, columns)
    rest += [f"failed: {titles} on {task}: {why}\n" for titles, task, why in failures_of(models)]
    note = (
        "per cent; * best of its column; + best expert; "
        if len(spent) > 2
        else "per cent; * best of its column; "
    )
    note += "cost: all training that led to the model"
    note += "; after: after the base, embeddings for clusters counted\n" if len(spent) > 2 else "\n"
    return "\n".join([*blocks, *rest, note] if blocks else [*_nothing(models), *rest])


def _nothing(models: Sequence[Model]) -> list[str]:
    """Why there is no table; an evaluation folder is told of beside it."""
    tasks = {task for model in models for task in model.results}
    if tasks - {EVALSET}:
        return ["no retrieval, no classification; probes and neighbours are in results.csv\n"]
    return [] if tasks else ["nothing was evaluated\n"]


def _without_numbers(models: Sequence[Model], columns: Sequence[Column]) -> list[str]:
    """What became of an evaluation folder of which no task has a main metric."""
    found = [model.results[EVALSET] for model in models if EVALSET in model.results]
    if not found or any(column.task == EVALSET for column in columns):
        return []
    most = max(found, key=num_images_of)
    where = "; no main metric, see evalset/<model>/eval_results.jsonl"
    return [f"{EVALSET}: {size_of_task(most)}{where if num_images_of(most) else ''}\n"]


def failures_of(models: Sequence[Model]) -> list[tuple[str, str, str]]:
    """Titles of the models, task and message, of every task that failed."""
    titles: dict[tuple[str, str], list[str]] = {}
    for model in models:
        tasks = model.results.get(EVALSET, {}).get("tasks", {})
        of_folder = {
            f"{EVALSET}/{k}": each["failed"] for k, each in tasks.items() if "failed" in each
        }
        for failure in (model.failed | of_folder).items():
            titles.setdefault(failure, []).append(model.title)
    return [(", ".join(those), *failure) for failure, those in titles.items()]


@dataclass(frozen=True)
class CostColumn:
    """One kind of cost.

    Attributes:
        group: above the head of the page's table.
        title: its head.
        short: for the terminal.
        cells: model key to text.
    """

    group: str
    title: str
    short: str
    cells: dict[str, str]


def cost_columns(models: Sequence[Model]) -> list[CostColumn]:
    """Samples and minutes of all training; where a base was tuned, what came after it, and what the results cost to use."""

    def column(group: str, title: str, short: str, text: Callable[[Cost], str]) -> CostColumn:
        return CostColumn(group, title, short, {model.key: text(model.cost) for model in models})

    columns = [
        column("", "samples seen", "samples", lambda cost: human(cost.samples_seen)),
        column("", "minutes", "minutes", lambda cost: _minutes(cost.minutes)),
    ]
    if not any(model.cost.samples_after for model in models):
        return columns
    return [
        *columns,
        column("after the base", "samples", "after", lambda cost: or_dash(cost.samples_after)),
        column("after the base", "FLOP", "FLOP", lambda cost: or_dash(cost.flops_after)),
        column("", "FLOP a pair", "FLOP/pair", lambda cost: or_dash(cost.flops_per_pair)),
    ]


def best_expert(models: Sequence[Model], columns: Sequence[Column]) -> str:
    """Key of the expert that leads in a task's leading metric, the base left out; empty if there is no choice."""
    values = lead_column(columns).values if columns else {}
    experts = [m.key for m in models if m.key.startswith("expert_") and m.key in values]
    return max(experts, key=lambda key: values[key]) if len(experts) > 1 else ""


def lead_column(columns: Sequence[Column]) -> Column:
    """The metric that stands for all: mean R@1 of the first task that has it, else its first one."""
    return next((c for c in columns if c.key == "mean_R@1"), columns[0])


def _minutes(minutes: float) -> str:
    return f"{minutes:.1f}" if minutes < 100 else f"{minutes:,.0f}"


def size_of_task(result: Mapping[str, Any]) -> str:
    """How many images and captions a task has."""
    if "tasks" in result:
        return size_of_evalset(result)
    retrieval, zero_shot = result.get("retrieval"), result.get("zero_shot") or {}
    parts = []
    if retrieval:
        protocol = " (five of each image)" if retrieval.get("protocol") == "five_captions" else ""
        counts = f"{retrieval['num_images']:,} images, {retrieval['num_texts']:,} captions"
        parts.append(counts + protocol)
    elif zero_shot:
        parts.append(f"{next(iter(zero_shot.values()))['num_samples']:,} images")
    if zero_shot:
        classes = ", ".join(f"{label} {about['num_classes']}" for label, about in zero_shot.items())
        parts.append(f"classes: {classes}")
    return "; ".join(parts)


def num_images_of(result: Mapping[str, Any]) -> int:
    """Images behind the numbers of a result."""
    if "tasks" in result:
        return sum(about.get("size", 0) for about in result["tasks"].values())
    if result.get("retrieval"):
        return int(result["retrieval"]["num_images"])
    return max(int(about["num_samples"]) for about in result["zero_shot"].values())


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of one table; all have the keys of the first."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _retrieval_columns(task: str, results: Mapping[str, dict[str, Any]]) -> list[Column]:
    found = {model: r["retrieval"] for model, r in results.items() if r.get("retrieval")}
    if not found:
        return []
    first = next(iter(found.values()))
    columns = []
    for way, words in WAYS.items():
        for name in first[way]:
            values = {model: r[way][name] for model, r in found.items()}
            chance = first["chance"].get(f"{way}_{name}", float("nan"))
            short = f"{_SHORT_WAYS[way]} {name}"
            is_main = name == "R@1"
            columns.append(
                Column(task, f"{way}_{name}", words, name, short, is_main, values, chance)
            )
    values = {model: r["mean_R@1"] for model, r in found.items()}
    chance = sum(first["chance"][f"{way}_R@1"] for way in WAYS) / 2
    mean = Column(task, "mean_R@1", "both ways", "R@1", "mean R@1", True, values, chance)
    return [*columns, mean]


def _zero_shot_columns(task: str, results: Mapping[str, dict[str, Any]]) -> list[Column]:
    labels = list(
        dict.fromkeys(label for r in results.values() for label in r.get("zero_shot") or {})
    )
    columns = []
    for name, (group, num_guesses) in _ZERO_SHOT.items():
        for label in labels:
            found = {
                m: r["zero_shot"][label] for m, r in results.items() if label in r["zero_shot"]
            }
            first = next(iter(found.values()))
            if first.get(name) is not None:
                values = {model: about[name] for model, about in found.items()}
                chance = min(1.0, num_guesses * first["chance"])
                key, is_main = f"{label}_{name}", name == "acc1"
                columns.append(Column(task, key, group, label, label, is_main, values, chance))
    return columns


def _learnt_columns(task: str, results: Mapping[str, dict[str, Any]]) -> list[Column]:
    """Probes, nearest neighbours, and retrieval where labels are given."""
    columns = []
    parts = ((PROBE, "probe", "acc"), (KNN, "knn", "acc"), (GIVEN, "given", "mean_R@1"))
    for group, part, name in parts:
        labels = dict.fromkeys(label for r in results.values() for label in r.get(part) or {})
        for label in labels:
            found = {m: r[part][label] for m, r in results.items() if label in (r.get(part) or {})}
            values = {model: about[name] for model, about in found.items()}
            chance = next(iter(found.values()))["chance"]
            key, guess = f"{part}_{label}_{name}", chance[name] if part == "given" else chance
            columns.append(Column(task, key, group, label, label, False, values, guess))
    return columns


def _evalset_columns(task: str, results: Mapping[str, dict[str, Any]]) -> list[Column]:
    """Main metrics of the tasks of an evaluation folder, and the means that are the same for all models.

    Where no mean can be had, as of own data sets alone, the tasks stand for themselves.
    """
    tasks = {model: result["tasks"] for model, result in results.items() if "tasks" in result}
    columns = []
    for name, values, chance, keys in means_of(tasks):
        columns.append(Column(task, name, "mean of tasks", name, name, True, values, chance, keys))
    group, is_main = (EACH_TASK, False) if columns else ("main metric", True)
    for key, values, chance in mains_of(tasks):
        columns.append(Column(task, key, group, key, key, is_main, values, chance, (key,)))
    return columns


def _text_cells(model: Model, columns: Sequence[Column]) -> list[str]:
    cells = []
    for column in columns:
        value = column.values.get(model.key)
        mark = "*" if column.is_best(model.key) else " "
        cells.append("- " if value is None else f"{displayed(value):.1f}{mark}")
    return cells
