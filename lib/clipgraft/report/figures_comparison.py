"""Figures of several runs: every recipe on every metric, against its cost, and how they trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from clipgraft.compare import Row, short_name
from clipgraft.report.figures_training import loss_panels
from clipgraft.report.style import (
    BLUE,
    INK,
    LEGEND_LINE,
    MUTED,
    RAIL,
    Figure,
    canvas,
    counts_on,
    draw,
    hide_unused,
)

Looks = Sequence[tuple[Row, str]]  # rows and their colours


def plot_rows(looks: Looks, metrics: Sequence[str], chance: Mapping[str, str]) -> Figure:
    """Every recipe on every metric: a dot for each seed, a larger one for their mean.

    Args:
        looks: rows and their colours.
        metrics: the main ones, `task/metric`.
        chance: what guessing gives, by metric.
    """
    rows = [
        {"model": row.title, "metric": name, "seed": number, "per_cent": value}
        for row, _ in looks
        for name in metrics
        for number, value in enumerate(row.values(name))
    ]

    def plot() -> Canvas:
        columns = min(3, len(metrics))
        lines = math.ceil(len(metrics) / columns)
        height = (0.75 + 0.2 * len(looks)) * lines
        figure, axes = canvas(height, lines, columns, sharey=True)
        for axis, name in zip(hide_unused(axes, len(metrics)), metrics, strict=True):
            for place, (row, colour) in enumerate(looks):
                values = row.values(name)
                if values:
                    axis.plot([min(values), max(values)], [place] * 2, color=RAIL, linewidth=3)
                    axis.plot(values, [place] * len(values), "o", color=colour, markersize=3)
                    axis.plot(mean(values), place, "o", color=colour, markersize=7)
            axis.axvline(100 * float(chance[name]), color=MUTED, linewidth=1, linestyle="--")
            axis.set_title(short_name(name))
            axis.xaxis.set_major_formatter("{x:.0f} %")
            axis.set_yticks(range(len(looks)), [row.title for row, _ in looks])
            axis.tick_params(axis="y", length=0, labelcolor=INK)
            axis.set_ylim(len(looks) - 0.4, -0.6)
        return figure

    caption = (
        "A small dot is a seed, a large one the mean of a recipe, the bar their range; dashed is chance. Look at whether "
        "ranges overlap. Bad: recipes of one seed that are a little apart (nobody knows whether by chance), or a MoE left "
        "of a simpler recipe."
    )
    return draw("compare_metrics", "All recipes, all main metrics", caption, rows, plot)


def plot_against_cost(looks: Looks, metric: str, chance: float) -> Figure:
    """One metric against the samples seen in all training, and against its time.

    Args:
        looks: rows and their colours.
        metric: `task/metric`.
        chance: of the metric, 0..1.
    """
    rows: list[dict[str, Any]] = [
        {
            "model": row.title,
            "samples_seen": float(result["samples_seen"]),
            "minutes": float(result["minutes"]),
            "per_cent": 100 * float(result[metric]),
        }
        for row, _ in looks
        for result in row.results.values()
        if result.get(metric)
    ]

    def plot() -> Canvas:
        figure, axes = canvas(max(3.6, LEGEND_LINE * (len(looks) + 2)), 1, 2, sharey=True)
        for axis, name in zip(axes[0], ("samples_seen", "minutes"), strict=True):
            for row, colour in looks:
                mine = [each for each in rows if each["model"] == row.title]
                x, y = [each[name] for each in mine], [each["per_cent"] for each in mine]
                axis.plot(x, y, "o", color=colour, markersize=7, alpha=0.85)
            axis.axhline(100 * chance, color=MUTED, linewidth=1, linestyle="--")
            end = 1.06 * max(each[name] for each in rows)
            axis.set(xlabel=name.replace("_", " "), xlim=(0, end), ylim=(0, None))
        counts_on(axes[0, 0].xaxis)
        axes[0, 0].set_ylabel(f"{short_name(metric)}, %")
        handles = [
            Line2D([], [], linestyle="", marker="o", color=colour, label=row.title)
            for row, colour in looks
        ]
        figure.legend(handles=handles, loc="outside right upper", handletextpad=0.2)
        return figure

    caption = (
        "Cost is all training that a model rests upon, one dot for each seed; minutes are comparable on one machine alone. "
        "Dashed: chance. Look for the recipe that is up and to the left. Bad: a recipe right of and below another."
    )
    return draw("compare_cost", "Accuracy against cost of training", caption, rows, plot)


def plot_losses(
    stage: str, title: str, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]
) -> Figure:
    """Losses of one stage of several runs.

    Args:
        stage: which.
        title: in words.
        rows: `model`, `samples_seen`, `hours`, `loss`.
        colours: of each model.
    """
    titles = {label: label for label in colours}
    caption = (
        "Against samples and against time; what runs share is one line, named after the first. Losses of different kinds "
        "or batch sizes have different levels: compare their results above, not these. Bad: a line that jumps up, or that "
        "is flat from the beginning."
    )
    return draw(
        f"compare_{stage}_loss",
        f"{title}: loss",
        caption,
        rows,
        lambda: loss_panels(rows, titles, colours),
    )


def plot_infonce(rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> Figure:
    """The loss that all kinds of losses can be compared by, as far as losses of training can.

    Args:
        rows: `model`, `samples_seen`, `hours`, `loss`.
        colours: of each model.
    """
    caption = (
        "The contrastive loss of the minibatch, whatever was minimised, each at its own tau and batch size; where a loss is "
        "this one, it is that. A lower line tells images of a batch apart better; results above decide. Bad: a "
        "global loss whose line stays above that of the plain one."
    )
    return draw(
        "compare_pretrain_infonce",
        "Pretraining: losses of all kinds by InfoNCE",
        caption,
        rows,
        lambda: loss_panels(rows, {label: label for label in colours}, colours),
    )


def plot_tokens(rows: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """What short sequences cost: each base against the tokens of its first phase.

    Args:
        rows: `run`, `tokens`, `per_cent`.
        metric: `task/metric`.
    """

    def plot() -> Canvas:
        figure, axes = canvas(3.0)
        axis = axes[0, 0]
        axis.plot(
            [row["tokens"] for row in rows], [row["per_cent"] for row in rows], "o", color=BLUE
        )
        for row in rows:
            place = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 8, "color": MUTED}
            axis.annotate(row["run"], (row["tokens"], row["per_cent"]), **place)
        axis.set(
            xlabel="tokens of image and text in the first phase", ylabel=f"{short_name(metric)}, %"
        )
        axis.margins(x=0.12, y=0.15)
        return figure

    caption = (
        "A dot is a run; what else differs between them stands in the table below. Whether larger models lose less by "
        "shorter sequences (inverse scaling) is what the page of a sweep measures. Bad: a fall that is not made up for by "
        "its time (the figure above)."
    )
    return draw("compare_tokens", "Bases against tokens of the first phase", caption, rows, plot)
