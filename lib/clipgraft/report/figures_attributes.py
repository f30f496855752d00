"""Figures of what each model has learnt: probes of its embeddings, and retrieval where labels are given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from clipgraft.report.figures_results import draw_tasks
from clipgraft.report.read import Model
from clipgraft.report.style import Figure, canvas, draw, heat_map, hide_unused
from clipgraft.report.tables import Column

Rows = Sequence[Mapping[str, Any]]


def plot_probes(models: Sequence[Model], columns: Sequence[Column]) -> Figure:
    """One line per attribute, one dot per model, a tick for chance.

    Args:
        models: in pipeline order.
        columns: probes.
    """
    rows = [
        {
            "task": column.task,
            "attribute": column.title,
            "model": model.key,
            "accuracy": column.values[model.key],
            "spread": model.results[column.task]["probe"][column.title]["spread"],
            "chance": column.chance,
        }
        for column in columns
        for model in models
        if model.key in column.values
    ]
    caption = (
        "Accuracy of a linear classifier on frozen image embeddings, on samples that it has not seen; the tick is the most "
        "frequent class. Read it against the untrained network, whose random features tell colours, too: what a "
        "model has learnt is what lies right of it. Bad: models at or left of the untrained one"
    )
    caption += (
        ", or experts that are left of the base in what it had learnt and right of it in nothing."
        if _has_experts(models)
        else "."
    )

    def plot() -> Canvas:
        return draw_tasks(models, columns)

    return draw("attributes_probes", "What can be read off embeddings", caption, rows, plot)


def plot_gains(models: Sequence[Model], columns: Sequence[Column]) -> Figure:
    """How far each model's probes are from the base's, in points.

    Args:
        models: those but the base and the untrained one; in pipeline order.
        columns: probes, which have the base.
    """
    tasks = list(dict.fromkeys(column.task for column in columns))
    rows: list[dict[str, Any]] = [
        {
            "task": column.task,
            "model": model.key,
            "attribute": column.title,
            "points": 100 * (column.values[model.key] - column.values["base"]),
        }
        for column in columns
        for model in models
        if model.key in column.values
    ]
    high = max(5.0, max(abs(row["points"]) for row in rows))
    value = {(row["task"], row["model"], row["attribute"]): row["points"] for row in rows}

    def plot() -> Canvas:
        per_line = min(2, len(tasks))
        lines = math.ceil(len(tasks) / per_line)
        figure, axes = canvas((0.8 + 0.29 * len(models)) * lines, lines, per_line)
        for axis, task in zip(hide_unused(axes, len(tasks)), tasks, strict=True):
            names = [column.title for column in columns if column.task == task]
            shown = [model for model in models if (task, model.key, names[0]) in value]
            table = np.array([[value[task, model.key, name] for name in names] for model in shown])
            titles = [model.title for model in shown]
            heat_map(axis, table, names, titles, high=high, text="{:+.1f}", is_signed=True)
            axis.set_title(task)
        return figure

    caption = "Probe accuracy minus that of the base, in points: blue is gained, red is lost. Bad: red without blue"
    caption += (
        " in what came after the base. Look for experts of different rounds with blue in different columns, and for a MoE "
        "that has the blue of all. Bad, too: rows that are alike (the rounds taught the same), and experts no bluer than "
        "a baseline on ordinary batches (the clusters did nothing)."
        if _has_experts(models)
        else " in a later phase."
    )
    return draw("attributes_gains", "What was gained and lost over the base", caption, rows, plot)


def plot_given(models: Sequence[Model], columns: Sequence[Column]) -> Figure:
    """Retrieval among all candidates and among those that agree, one line each.

    Args:
        models: in pipeline order.
        columns: mean R@1 of each task, and then its labels given.
    """
    rows = [
        {
            "task": column.task,
            "given": column.title,
            "model": model.key,
            "mean_R@1": column.values[model.key],
            "chance": column.chance,
        }
        for column in columns
        for model in models
        if model.key in column.values
    ]
    caption = (
        "Mean R@1 both ways among candidates that agree with the query on the labels of the line; the tick is chance, which "
        "rises as candidates become fewer. What a model knows of those labels is worth nothing there: who passes the base "
        "has learnt something else. Bad: a gain in the line of all that is gone where labels are given."
    )

    def plot() -> Canvas:
        return draw_tasks(models, columns)

    return draw("attributes_given", "Retrieval among candidates that agree", caption, rows, plot)


def _has_experts(models: Sequence[Model]) -> bool:
    return any(model.key.startswith("expert_") for model in models)
