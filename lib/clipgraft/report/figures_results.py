"""Figures of the results: every model against every metric, and against what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from clipgraft.report.evalset import EVALSET, zero_shot_of
from clipgraft.report.read import Model
from clipgraft.report.style import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    RAIL,
    Figure,
    canvas,
    counts_on,
    draw,
    heat_map,
    hide_unused,
)
from clipgraft.report.tables import Column, displayed, num_images_of

LEGEND_COLUMNS = 8  # as many as are as wide as the page
MAX_CONFUSIONS = 6
MAX_CLASSES = 30  # of a confusion that can be read
_ANNOTATED_CLASSES = 10
MAX_WORST = 18  # classes with the lowest recall
_FEWEST = 5  # pictures of a class that a recall is said of


def plot_metrics(models: Sequence[Model], columns: Sequence[Column]) -> Figure:
    """One line per metric, one dot per model, a tick for chance.

    Args:
        models: in pipeline order.
        columns: the main metrics.
    """
    rows = [
        {"task": column.task, "metric": column.key, "model": name, "value": value}
        for column in columns
        for name, value in {"chance": column.chance, **column.values}.items()
    ]

    def plot() -> Canvas:
        return draw_tasks(models, columns)

    caption = "Per cent, further right is better; the grey tick is chance. "
    if _has_moe(models):
        caption += (
            "Look for the metrics in which experts pass the base and whether the MoE keeps the best of each. Bad: "
            "a MoE left of a baseline, which had its training in a simpler way."
        )
    else:
        caption += "Bad: a base left of an earlier phase, or models at chance."
    return draw("results_metrics", "All models, all main metrics", caption, rows, plot)


def plot_cost(models: Sequence[Model], column: Column) -> Figure:
    """One metric against samples seen and against minutes.

    Args:
        models: in pipeline order.
        column: the metric.
    """
    shown = [model for model in models if model.key in column.values]
    rows = [
        {
            "model": model.key,
            "samples_seen": model.cost.samples_seen,
            "minutes": model.cost.minutes,
            column.key: column.values[model.key],
        }
        for model in shown
    ]

    def plot() -> Canvas:
        figure, axes = canvas(3.2, 1, 2, sharey=True)
        for axis, name in zip(axes[0], ("samples_seen", "minutes"), strict=True):
            for model in shown:
                x, y = getattr(model.cost, name), 100 * column.values[model.key]
                axis.plot(x, y, model.marker, color=model.colour, markersize=8)
            axis.axhline(100 * column.chance, color=MUTED, linewidth=1, linestyle="--")
            rightmost = max(getattr(model.cost, name) for model in shown)
            axis.set(xlabel=name.replace("_", " "), xlim=(0, 1.06 * rightmost or 1))
        highest = np.nanmax([column.chance, *(column.values[model.key] for model in shown)])
        axes[0, 0].set_ylim(0, 110 * highest)
        axes[0, 0].set_ylabel(f"{column.task}: {column.short}, %")
        counts_on(axes[0, 0].xaxis)
        draw_legend(figure, shown)
        return figure

    caption = "Cost is all training that a model rests upon. Dashed: chance. "
    if _has_moe(models):
        caption += (
            "The MoE pays for its base, its experts, their clusters and its routers. Bad: a baseline to the left of "
            "and above the MoE, which then bought nothing."
        )
    else:
        caption += "Bad: an earlier phase above the base, which then bought nothing."
    return draw("results_cost", "Accuracy against cost of training", caption, rows, plot)


def plot_confusions(task: str, model: Model) -> Figure | None:
    """What one model takes for what, per label of a task; None if no label has few enough classes.

    Args:
        task: name of the task.
        model: the model.
    """
    zero_shot = model.results[task].get("zero_shot") or {}
    labels = {name: r for name, r in zero_shot.items() if r["num_classes"] <= MAX_CLASSES}
    labels = dict(list(labels.items())[:MAX_CONFUSIONS])
    if not labels:
        return None
    rows = [
        {"label": name, "class": true, "predicted": guess, "samples": about["confusion"][i][j]}
        for name, about in labels.items()
        for i, true in enumerate(about["classes"])
        for j, guess in enumerate(about["classes"])
    ]

    def plot() -> Canvas:
        lines = math.ceil(len(labels) / 3)
        figure, axes = canvas(3.3 * lines, lines, 3)
        for axis, (name, about) in zip(hide_unused(axes, len(labels)), labels.items(), strict=True):
            _confusion(axis, about)
            axis.set_title(f"{name}, {displayed(about['acc1']):.1f} %")
        return figure

    caption = (
        f"Rows are what is there, columns what {model.title} says, in per cent of the row. Good is a dark "
        "diagonal. Bad: a dark column (a class that is said of everything), or a block off the "
        "diagonal (classes that the model cannot tell apart)."
    )
    return draw("results_confusion", f"Confusion of {model.title} on {task}", caption, rows, plot)


def worst_classes(zero_shot: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The classes that are recognised least, the worst first, with what they are taken for most.

    Labels of so many classes that their confusion was not kept are left out.

    Args:
        zero_shot: label to its result.
    """
    rows = []
    for label, about in zero_shot.items():
        for i, confused in enumerate(about["confusion"] or []):
            name, counts = about["classes"][i], np.array(confused)
            wrong = np.where(np.arange(len(counts)) == i, 0, counts)
            if counts.sum() < _FEWEST or not wrong.any():
                continue
            share = counts / counts.sum()
            row = {"label": label, "class": name, "samples": int(counts.sum())}
            row |= {"recall": float(share[i]), "chance": 1 / len(counts)}
            row |= {"taken_for": about["classes"][int(wrong.argmax())]}
            rows.append({**row, "taken": float(wrong.max() / counts.sum())})
    return sorted(rows, key=lambda row: row["recall"])[:MAX_WORST]


def plot_worst_classes(task: str, model: Model) -> Figure | None:
    """What one model recognises least, and what it says instead; None if it was asked for none or errs nowhere.

    Args:
        task: name of the task; of `evalset` the classes of all tasks of the folder.
        model: the model.
    """
    rows = worst_classes(zero_shot_of(model.results[task]))
    if not rows:
        return None

    def plot() -> Canvas:
        figure, axes = canvas(0.9 + 0.21 * len(rows))
        axis, place = axes[0, 0], np.arange(len(rows))
        recall = np.array([100 * row["recall"] for row in rows])
        taken = np.array([100 * row["taken"] for row in rows])
        axis.barh(place, recall, color=BLUE, height=0.72, label="right")
        axis.barh(place, taken, left=recall, color=ORANGE, height=0.72, label="taken for")
        for number, row in enumerate(rows):
            end = min(recall[number] + taken[number] + 1, 101)
            name = _short(row["taken_for"])
            axis.text(end, number, name, va="center", color=MUTED, fontsize=8)
        chance = [100 * row["chance"] for row in rows]
        axis.plot(chance, place, "|", color=INK, markersize=9, label="chance")
        names = [f"{row['label']}: {_short(row['class'])}" for row in rows]
        axis.set_yticks(place, names)
        axis.tick_params(axis="y", length=0, labelcolor=INK)
        axis.set(xlim=(0, 118), ylim=(len(rows) - 0.4, -0.6), xticks=range(0, 101, 20))
        axis.xaxis.set_major_formatter("{x:.0f} %")
        axis.grid(axis="y", visible=False)
        figure.legend(loc="outside upper left", ncols=3)
        return figure

    caption = (
        "The classes of all labels with the lowest recall, the worst first, and what each is taken for most; the rest of "
        f"a bar to 100 % is other classes. Classes with fewer than {_FEWEST} pictures, or without an error, are left out. Bad: a blue bar short "
        "of chance, or one wrong answer for many classes, which mostly means that prompts or class names do not fit."
    )
    title = f"Classes that {model.title} recognises least on {task}"
    name = "evalset_worst_classes" if task == EVALSET else "results_worst_classes"
    return draw(name, title, caption, rows, plot)


def _short(name: str) -> str:
    """The beginning of a name: some classes are called by a sentence."""
    return name if len(name) <= 24 else f"{name[:21]}..."


def _has_moe(models: Sequence[Model]) -> bool:
    return any(model.key == "moe" for model in models)


def shares_of(model: Model, column: Column) -> list[tuple[float, int]]:
    """What a metric of a model is the mean of, each with its number of images."""
    result = model.results[column.task]
    if not column.parts:
        return [(column.values[model.key], num_images_of(result))]
    tasks = [result["tasks"][key] for key in column.parts]
    return [(float(task["metrics"]["main_metric"]), int(task["size"])) for task in tasks]


def noise_of(shares: Sequence[tuple[float, int]]) -> float:
    """Two standard errors, in points, of the mean of shares, each of a number of images."""
    variance = sum(share * (1 - share) / num for share, num in shares)
    return 200 * math.sqrt(variance) / len(shares)


def draw_tasks(models: Sequence[Model], columns: Sequence[Column]) -> Canvas:
    """A panel for each task, two beside one another, and whose the dots are."""
    tasks = list(dict.fromkeys(column.task for column in columns))
    most = max(sum(column.task == task for column in columns) for task in tasks)
    per_line = min(2, len(tasks))
    lines = math.ceil(len(tasks) / per_line)
    row = max(0.42, 0.065 * len(models))  # inches: models of one row stand one below another
    figure, axes = canvas((0.9 + row * most) * lines + 0.4, lines, per_line, sharex=True)
    for axis, task in zip(hide_unused(axes, len(tasks)), tasks, strict=True):
        _draw_dots(axis, models, [column for column in columns if column.task == task])
        axis.set_title(task)
    draw_legend(figure, [m for m in models if any(m.key in c.values for c in columns)])
    return figure


def _draw_dots(axis: Axes, models: Sequence[Model], columns: Sequence[Column]) -> None:
    """One line per metric, with a dot for each model that has it."""
    for line, column in enumerate(columns):
        found = [100 * column.values[m.key] for m in models if m.key in column.values]
        axis.plot([min(found), max(found)], [line, line], color=RAIL, linewidth=3, zorder=1)
        axis.plot(100 * column.chance, line, "|", color=MUTED, markersize=11, markeredgewidth=1.6)
        # Equal models would hide one another: they are moved apart a little.
        for number, model in enumerate(m for m in models if m.key in column.values):
            shift = 0.62 * ((number + 0.5) / len(found) - 0.5)
            x = 100 * column.values[model.key]
            axis.plot(x, line + shift, model.marker, color=model.colour, markersize=6.5)
    for mark in axis.lines:
        mark.set_clip_on(False)  # whole at 0 and 100 %, too
    axis.set_yticks(range(len(columns)), [column.short for column in columns])
    axis.tick_params(axis="y", length=0, labelcolor=INK)
    axis.set(xlim=(0, 100), ylim=(len(columns) - 0.4, -0.6))
    axis.xaxis.set_major_formatter("{x:.0f} %")
    axis.grid(axis="y", visible=False)


def draw_legend(figure: Canvas, models: Sequence[Model]) -> None:
    """What dots look like, above the figure."""
    handles = [
        Line2D([], [], linestyle="", marker=m.marker, color=m.colour, label=m.title) for m in models
    ]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=min(len(handles), LEGEND_COLUMNS),
        handletextpad=0.2,
        columnspacing=1.4,
    )


def _confusion(axis: Axes, about: Mapping[str, Any]) -> None:
    counts = np.array(about["confusion"], dtype=float)
    percent = 100 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    text = "{:.0f}" if len(counts) <= _ANNOTATED_CLASSES else None
    heat_map(axis, percent, about["classes"], about["classes"], high=100, text=text)
    axis.tick_params(axis="x", labelrotation=90 if len(counts) > 4 else 0)
    axis.tick_params(labelsize=7.5 if len(counts) <= _ANNOTATED_CLASSES else 5.5)
