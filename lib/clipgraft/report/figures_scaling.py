"""Figures of a sweep: what shorter sequences cost and bring, from numbers to picture, nothing else.

A size has one colour and one mark everywhere; whiskers and thin marks show every seed, lines their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, NullLocator

from clipgraft.report.slopes import LEVEL
from clipgraft.report.style import INK, MUTED, PAPER, Figure, canvas, draw

Row = Mapping[str, Any]
Rows = Sequence[Row]
# Okabe and Ito's, from small to large.
COLOURS = ("#56B4E9", "#0072B2", "#D55E00", "#CC79A7", "#009E73", "#E69F00", "#333333")
MARKS = "os^DvPX"
PARTS = {"before": "after the first phase", "after": "at the end"}


def plot_drop(side: str, rows: Rows, metric: str, slopes: Mapping[str, float], held: str) -> Figure:
    """What shortening one side costs, one line per size.

    Args:
        side: `image` or `text`.
        rows: `size`, `tokens`, `full`, `drop` (mean), `drop_low`, `drop_high`, `seeds`.
        metric: in words.
        slopes: fitted points per halving, by size.
        held: what stands still, in words; may be empty.
    """

    def plot() -> Canvas:
        figure, axes = canvas(3.6)
        axis = axes[0, 0]
        for look, (size, mine) in _looks(rows, "size"):
            _whiskers(axis, mine, "tokens", "drop", look)
            full = mine[0]["full"]
            x = np.geomspace(full, min(row["tokens"] for row in mine), 40)
            fitted = slopes[size] * np.log2(full / x)
            axis.plot(x, fitted, color=look["color"], linewidth=1, linestyle=":", zorder=1)
        _drop_axes(axis, rows, side, metric)
        _legend(figure, rows, "size")
        return figure

    caption = (
        f"Points of {metric} lost against the longest {side} sequence; up is worse. Marks are means of the seeds, "
        "whiskers reach from the lowest to the highest, dots are the fit: points per halving times halvings. Look for lines that "
        "lie lower the larger the model: that is the law. Bad: whiskers as long as the drops, or a line "
        f"that falls with fewer tokens, which says that the longest run was not trained well.{held}"
    )
    return draw(
        f"scaling_{side}_drop", f"What fewer {side} tokens cost, by size", caption, rows, plot
    )


def plot_strategies(side: str, rows: Rows, metric: str, held: str) -> Figure:
    """What shortening one side costs, one line per strategy, one panel per size.

    Args:
        side: `image` or `text`.
        rows: as those of `plot_drop`, with `strategy`.
        metric: in words.
        held: what stands still, in words; may be empty.
    """
    sizes = list(dict.fromkeys(row["size"] for row in rows))

    def plot() -> Canvas:
        figure, axes = canvas(3.4, 1, len(sizes), sharey=True)
        looks = {name: look for look, (name, _) in _looks(rows, "strategy", 3)}
        for axis, size in zip(axes[0], sizes, strict=True):
            mine = [row for row in rows if row["size"] == size]
            for strategy in dict.fromkeys(row["strategy"] for row in mine):
                line = [row for row in mine if row["strategy"] == strategy]
                _whiskers(axis, line, "tokens", "drop", looks[strategy])
            _drop_axes(axis, mine, side, metric if size == sizes[0] else "")
            axis.set_title(size)
        _legend(figure, rows, "strategy", first=3)
        return figure

    caption = (
        f"The same for each way of shortening {side} sequences, at equal numbers of tokens. Look for the lowest line. "
        f"Bad: strategies that differ by less than their whiskers, which are then as good as one another.{held}"
    )
    return draw(
        f"scaling_{side}_strategies", f"Strategies of {side} reduction", caption, rows, plot
    )


def plot_slopes(rows: Rows) -> Figure:
    """The fitted slope of each size with its interval.

    Args:
        rows: `side`, `size`, `num_params`, `slope`, `low`, `high`.
    """
    sides = list(dict.fromkeys(row["side"] for row in rows))

    def plot() -> Canvas:
        figure, axes = canvas(3.0, 1, max(2, len(sides)), sharey=True)
        for axis in axes[0][len(sides) :]:
            axis.set_visible(False)
        for axis, side in zip(axes[0], sides, strict=False):
            mine = [row for row in rows if row["side"] == side]
            axis.plot(
                [row["num_params"] for row in mine],
                [row["slope"] for row in mine],
                color=MUTED,
                linewidth=1,
            )
            for look, (_, same) in _looks(mine, "size"):
                _whisker(
                    axis, same[0]["num_params"], same[0], "slope", look, low="low", high="high"
                )
            axis.axhline(0, color=INK, linewidth=0.8, zorder=1)
            axis.set(xscale="log", xlabel="parameters", title=f"{side} tokens")
            _few_ticks(axis, [row["num_params"] for row in mine], EngFormatter(sep="", places=1))
        axes[0, 0].set_ylabel("points per halving")
        _legend(figure, rows, "size")
        return figure

    caption = (
        f"How many points each halving of the sequence costs, with {LEVEL:.0f} % bootstrap intervals. The law holds if the "
        "line falls. Bad: intervals that one level line could cross, which show nothing either way."
    )
    return draw("scaling_slopes", "Slope against size", caption, rows, plot)


def plot_cost(rows: Rows, metric: str, chance: float, machine: str) -> Figure:
    """The metric against compute and hours, after the first phase and at the end, with Pareto fronts.

    Args:
        rows: `size`, `part` (`before`, `after`), `first_run`, `macs`, `hours`, `score`, and whether a row is on a front:
            `macs_front`, `hours_front`.
        metric: in words.
        chance: of the metric, per cent.
        machine: that hours were measured on.
    """
    units = {
        "macs": "multiply-accumulates in forward passes",
        "hours": f"hours of training on {machine}",
    }

    def plot() -> Canvas:
        figure, axes = canvas(3.9, 1, 2, sharey=True)
        for axis, (unit, words) in zip(axes[0], units.items(), strict=True):
            for look, (_, mine) in _looks(rows, "size"):
                _joined(axis, mine, unit, look["color"])
                for row in mine:
                    face = look["color"] if row["part"] == "after" else PAPER
                    axis.plot(row[unit], row["score"], **look, markersize=5, markerfacecolor=face)
            for part, style in (("before", ":"), ("after", "-")):
                front = [row for row in rows if row["part"] == part and row[f"{unit}_front"]]
                front.sort(key=lambda row: float(row[unit]))
                x, y = [row[unit] for row in front], [row["score"] for row in front]
                axis.step(x, y, style, where="post", color=INK, linewidth=1, zorder=1)
            axis.set(xscale="log", xlabel=words)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
        axes[0, 0].set_ylabel(f"{metric}, %")
        _legend(figure, rows, "size", _part_handles(rows))
        return figure

    caption = (
        "Hollow: after the first, short phase; full: after the last; a thin line joins the two. The steps are the Pareto "
        "fronts, dotted before and solid after: the best that is to be had for that much. Look for the lengths "
        "of a large model that beat a small one at the same cost. Bad: a front made of one size only, or fronts that "
        "cross, since the last phase is then not worth its cost. "
        f"Chance is {chance:.1f} %."
    )
    return draw("scaling_cost", "Accuracy against cost", caption, rows, plot)


def plot_gain(side: str, rows: Rows, metric: str, held: str) -> Figure:
    """What the later phases bring, against how much the first was shortened.

    Args:
        side: `image` or `text`.
        rows: `size`, `reduction`, `gain`, `gain_low`, `gain_high`.
        metric: in words.
        held: what stands still, in words; may be empty.
    """

    def plot() -> Canvas:
        figure, axes = canvas(3.4)
        axis = axes[0, 0]
        for look, (_, mine) in _looks(rows, "size"):
            _whiskers(axis, mine, "reduction", "gain", look)
        axis.axhline(0, color=INK, linewidth=0.8, zorder=1)
        axis.set_xscale("log", base=2)
        _few_ticks(axis, [row["reduction"] for row in rows], "{x:.3g}")
        axis.set(
            xlabel=f"reduction: longest / {side} tokens of the first phase",
            ylabel=f"gain, points of {metric}",
        )
        _legend(figure, rows, "size")
        return figure

    caption = (
        "Points gained from the end of the first phase to the end of training. It should rise with the reduction: the full "
        "phase gives back what short sequences left out. Bad: gains below zero, which point to a learning rate that is too "
        f"high in the full phase; a gain at reduction 1 as large as elsewhere, which is just longer training.{held}"
    )
    return draw(f"scaling_{side}_gain", f"Gain of the full phase ({side})", caption, rows, plot)


# --- parts ------------------------------------------------------------------------------------------------


def _looks(
    rows: Rows, key: str, first: int = 0
) -> list[tuple[dict[str, Any], tuple[str, list[Row]]]]:
    """Colour and mark of each value of a key, and its rows."""
    names = list(dict.fromkeys(row[key] for row in rows))
    groups = [(name, [row for row in rows if row[key] == name]) for name in names]
    looks = [
        {"color": COLOURS[n % len(COLOURS)], "marker": MARKS[n % len(MARKS)]}
        for n in range(first, first + len(names))
    ]
    return list(zip(looks, groups, strict=True))


def _whiskers(axis: Axes, rows: Rows, x: str, y: str, look: Mapping[str, Any]) -> None:
    axis.plot([row[x] for row in rows], [row[y] for row in rows], color=look["color"])
    for row in rows:
        _whisker(axis, row[x], row, y, look, low=f"{y}_low", high=f"{y}_high")


def _whisker(
    axis: Axes, x: float, row: Row, y: str, look: Mapping[str, Any], *, low: str, high: str
) -> None:
    if row[low] is not None:
        axis.plot([x, x], [row[low], row[high]], color=look["color"], linewidth=1.2)
    axis.plot(x, row[y], **look, markersize=6)


def _joined(axis: Axes, rows: Rows, unit: str, colour: str) -> None:
    for run in dict.fromkeys(row["first_run"] for row in rows):
        pair = [row for row in rows if row["first_run"] == run]
        x, y = [row[unit] for row in pair], [row["score"] for row in pair]
        axis.plot(x, y, color=colour, linewidth=0.8, alpha=0.5, zorder=1)


def _drop_axes(axis: Axes, rows: Rows, side: str, metric: str) -> None:
    axis.axhline(0, color=INK, linewidth=0.8, zorder=1)
    axis.set_xscale("log", base=2)
    _few_ticks(axis, [row["tokens"] for row in rows], "{x:.0f}")
    axis.invert_xaxis()
    axis.set(xlabel=f"{side} tokens of the first phase")
    if metric:
        axis.set_ylabel(f"lost, points of {metric}")


def _few_ticks(axis: Axes, places: Sequence[float], form: Any) -> None:
    """Ticks where there is something."""
    axis.set_xticks(sorted(set(places)))
    axis.xaxis.set_major_formatter(form)
    axis.xaxis.set_minor_locator(NullLocator())


def _part_handles(rows: Rows) -> list[Line2D]:
    parts = dict.fromkeys(row["part"] for row in rows)
    faces = {"before": PAPER, "after": MUTED}
    return [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            color=MUTED,
            markerfacecolor=faces[part],
            label=PARTS[part],
        )
        for part in parts
    ]


def _legend(
    figure: Canvas, rows: Rows, key: str, more: Sequence[Line2D] = (), first: int = 0
) -> None:
    handles = [
        Line2D([], [], linestyle="", **look, label=name)
        for look, (name, _) in _looks(rows, key, first)
    ]
    figure.legend(
        handles=[*handles, *more],
        loc="outside upper left",
        ncols=len(handles) + len(more),
        handletextpad=0.2,
        columnspacing=1.4,
    )
