"""How pseudo labels split from round to round: a flow of samples from each label to those that it is split into."""

# Shapes: N samples, S labels of a round

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from clipgraft.report.style import INK, PAPER, Figure, canvas, draw

_REST = "rest of "  # what the name of a block of small labels begins with
SMALLEST = 0.006  # share of all samples that gets a block of its own
_BAR = 0.09  # width of a block, where rounds are 1 apart
_ROOM = 0.16  # of the height, between blocks
_NAMED = 0.045  # share of all samples that a block has room for its name from
_COLOURS = (
    "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#7FA32B", "#8F7BD6", "#A6761D",
)  # fmt: skip
_GREY = "#A8A8A8"

Rows = Sequence[Mapping[str, Any]]


def flow_rows(labels: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Blocks of each round, large before small: labels, and what is too small of the labels of one parent together.

    Args:
        labels: round to the accumulated label of each sample, `[N]`; each round splits those of the round before.

    Returns:
        `round`; `block`, a label or `rest of <block of the round before>`; `parent`, that block; `first`, the label of
        the first round that a label came from; `labels` and `samples`, how many there are. Empty where there is none.
    """
    rows: list[dict[str, Any]] = []
    before_N: np.ndarray | None = None
    home: dict[int, str] = {}  # the block that a label of the round before is in
    first_of: dict[str, int] = {}
    for name, label_N in labels.items():
        found_S, place_S, size_S = np.unique(label_N, return_index=True, return_counts=True)
        parent_S = np.full(len(found_S), -1) if before_N is None else before_N[place_S]
        blocks: dict[str, dict[str, Any]] = {}
        homes: dict[int, str] = {}
        for label, before, size in zip(
            found_S.tolist(), parent_S.tolist(), size_S.tolist(), strict=True
        ):
            parent = home.get(before, "")
            is_own = size >= SMALLEST * len(label_N) and not parent.startswith(_REST)
            block = str(label) if is_own else f"{_REST}{parent or 'all'}"
            first = first_of.get(parent, label) if is_own else ""
            about = {"round": name, "block": block, "parent": parent, "first": first}
            row = blocks.setdefault(block, {**about, "labels": 0, "samples": 0})
            row["labels"] += 1
            row["samples"] += size
            homes[label] = block
        rows += sorted(blocks.values(), key=lambda row: (row["first"] == "", -row["samples"]))
        first_of = {block: row["first"] for block, row in blocks.items()}
        before_N, home = label_N, homes
    return rows


def mean_splits(labels: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Effective number of parts of a label, mean over samples, of each round after the first.

    Args:
        labels: as for `flow_rows`.
    """
    means = {}
    for (_, before_N), (name, label_N) in pairwise(labels.items()):
        _, place_S, size_S = np.unique(label_N, return_index=True, return_counts=True)
        parts: dict[int, list[int]] = {}
        for parent, size in zip(before_N[place_S].tolist(), size_S.tolist(), strict=True):
            parts.setdefault(parent, []).append(size)
        weights = [sum(sizes) for sizes in parts.values()]
        numbers = [effective_number(sizes) for sizes in parts.values()]
        means[name] = float(np.average(numbers, weights=weights))
    return means


def effective_number(sizes: Sequence[int]) -> float:
    """How many labels of one size would divide samples as evenly: exp of the entropy."""
    share = np.array(sizes) / sum(sizes)
    return float(np.exp(-(share * np.log(share)).sum()))


def plot_label_flow(rows: Rows, splits: Mapping[str, float], names: Mapping[int, str]) -> Figure:
    """Labels as blocks, rounds from left to right, with a band from each label to those it is split into.

    Args:
        rows: from `flow_rows`.
        splits: from `mean_splits`.
        names: of the labels of the first round, such as `0 x 2`.
    """
    rounds = list(dict.fromkeys(row["round"] for row in rows))

    def plot() -> Canvas:
        figure, axes = canvas(5.2)
        axis = axes[0, 0]
        places: dict[str, tuple[float, float]] = {}
        for column, name in enumerate(rounds):
            blocks = [row for row in rows if row["round"] == name]
            places = _draw_round(axis, column, blocks, places, names)
            head = f"round {name}\n{sum(row['labels'] for row in blocks):,} labels"
            axis.text(column + _BAR / 2, -0.015, head, ha="center", va="bottom", color=INK)
        axis.set(xlim=(-0.02, len(rounds) - 1 + _BAR + 0.02), ylim=(1 + _ROOM, -0.1))
        axis.axis("off")
        return figure

    each = ", ".join(f"round {name} into {number:.1f}" for name, number in splits.items())
    caption = (
        "Heights are samples; a colour is a label of the first round (its image x text cluster), followed through the "
        f"rounds; labels with less than {100 * SMALLEST:.1f} % of the samples, and what they are split into, are put "
        "together in grey, parent by parent, here and in the numbers. As if all parts were of one size, labels are split "
        f"on average by {each} parts. Look for blocks that are split into a few parts of like size. Bad: bands that pass on "
        "whole (the round found again what the rounds before had found), or that end in grey (labels too small for a "
        "batch of their own)."
    )
    title = "How labels split from round to round"
    return draw("experts_label_flow", title, caption, rows, plot)


def _draw_round(
    axis: Axes,
    column: int,
    blocks: Rows,
    before: Mapping[str, tuple[float, float]],
    names: Mapping[int, str],
) -> dict[str, tuple[float, float]]:
    """Blocks of one round and the bands that lead to them.

    Args:
        axis: to draw on.
        column: number of the round, from 0.
        blocks: of the round.
        before: name of each block of the round before to its place, from and to.
        names: of the labels of the first round.
    Returns:
        Place of each block, from and to.
    """
    total = sum(block["samples"] for block in blocks)
    # What comes from one block stays together, in the order of the round before: bands do not cross.
    order = list(before)
    ordered = sorted(blocks, key=lambda each: order.index(each["parent"]) if order else 0)
    gap = _ROOM / max(len(ordered) - 1, 1)
    left = {name: top for name, (top, _) in before.items()}
    places: dict[str, tuple[float, float]] = {}
    y = 0.0
    for block in ordered:
        height, is_rest = block["samples"] / total, block["first"] == ""
        colour = _GREY if is_rest else _COLOURS[block["first"] % len(_COLOURS)]
        if before:
            start = left[block["parent"]]
            _band(axis, column, (start, start + height), (y, y + height), colour)
            left[block["parent"]] = start + height
        look: dict[str, Any] = {"facecolor": colour, "edgecolor": PAPER, "linewidth": 0.5}
        axis.add_patch(Rectangle((column, y), _BAR, height, **look))
        if not before and height > _NAMED and not is_rest:
            text = names.get(block["first"], "")
            axis.text(column + _BAR + 0.012, y + height / 2, text, va="center", color=INK)
        places[block["block"]] = (y, y + height)
        y += height + gap
    return places


def _band(
    axis: Axes,
    column: int,
    left: tuple[float, float],
    right: tuple[float, float],
    colour: str,
) -> None:
    """From a block of the round before to one of this round."""
    x0, x1 = column - 1 + _BAR, column
    middle = (x0 + x1) / 2
    corners = [
        (x0, left[0]), (middle, left[0]), (middle, right[0]), (x1, right[0]),
        (x1, right[1]), (middle, right[1]), (middle, left[1]), (x0, left[1]), (x0, left[0]),
    ]  # fmt: skip
    kinds = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    axis.add_patch(
        PathPatch(Path(corners, kinds), facecolor=colour, alpha=0.35, edgecolor="none", zorder=0)
    )
