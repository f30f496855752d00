"""How pseudo labels split from round to round: a flow of samples from each label to those that it is split into."""

# Shapes: N samples, S labels of a round

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from clipgraft.report.style import INK, PAPER, Figure, canvas, draw

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
    """Labels of each round, with the label of the round before that each came from and the first ancestor.

    Args:
        labels: round to the accumulated label of each sample, `[N]`; each round splits those of the round before.
    """
    rows: list[dict[str, Any]] = []
    before_N: np.ndarray | None = None
    first_of: dict[int, int] = {}
    for name, label_N in labels.items():
        found, place, size = np.unique(label_N, return_index=True, return_counts=True)
        parent_S = np.full(len(found), -1) if before_N is None else before_N[place]
        first_of = {
            int(label): int(label) if before_N is None else first_of[int(parent)]
            for label, parent in zip(found, parent_S, strict=True)
        }
        rows += [
            {
                "round": name,
                "label": int(label),
                "parent": int(parent) if before_N is not None else "",
                "first": first_of[int(label)],
                "samples": int(count),
            }
            for label, parent, count in zip(found, parent_S, size, strict=True)
        ]
        before_N = label_N
    return rows


def effective_number(sizes: Sequence[int]) -> float:
    """How many labels of one size would divide samples as evenly: exp of the entropy."""
    share = np.array(sizes) / sum(sizes)
    return float(np.exp(-(share * np.log(share)).sum()))


def plot_label_flow(rows: Rows, names: Mapping[int, str]) -> Figure:
    """Labels as blocks, rounds from left to right, with a band from each label to those it is split into.

    Args:
        rows: from `flow_rows`.
        names: of the labels of the first round, such as `0 x 2`.
    """
    rounds = list(dict.fromkeys(row["round"] for row in rows))
    sizes = {name: [r["samples"] for r in rows if r["round"] == name] for name in rounds}

    def plot() -> Canvas:
        figure, axes = canvas(5.2)
        axis = axes[0, 0]
        places: dict[str, tuple[float, float]] = {}
        home: dict[Any, str] = {}
        for column, name in enumerate(rounds):
            blocks, home = _blocks([row for row in rows if row["round"] == name], home)
            places = _draw_round(axis, column, blocks, places, names)
            head = f"round {name}\n{len(sizes[name])} labels"
            axis.text(column + _BAR / 2, -0.015, head, ha="center", va="bottom", color=INK)
        axis.set(xlim=(-0.02, len(rounds) - 1 + _BAR + 0.02), ylim=(1 + _ROOM, -0.1))
        axis.axis("off")
        return figure

    splits = _splits(rows, rounds)
    each = ", ".join(f"round {name} into {number:.1f}" for name, number in splits.items())
    caption = (
        "Heights are samples; a colour is a label of the first round (its image x text cluster), followed through the "
        "rounds; small labels of one parent are put together in grey. As if all parts were of one size, labels are split "
        f"on average by {each} parts. Look for blocks that are split into a few parts of like size. Bad: bands that pass on "
        "whole (the round found again what the rounds before had found), or that end in grey (labels too small for a "
        "batch of their own)."
    )
    title = "How labels split from round to round"
    return draw("experts_label_flow", title, caption, rows, plot)


def _splits(rows: Rows, rounds: Sequence[str]) -> dict[str, float]:
    """Effective number of parts of a label, mean over samples, of each round after the first."""
    means = {}
    for name in rounds[1:]:
        parts: dict[int, list[int]] = {}
        for row in rows:
            if row["round"] == name:
                parts.setdefault(row["parent"], []).append(row["samples"])
        weights = [sum(sizes) for sizes in parts.values()]
        numbers = [effective_number(sizes) for sizes in parts.values()]
        means[name] = float(np.average(numbers, weights=weights))
    return means


@dataclass(frozen=True)
class _Block:
    """Labels drawn as one.

    Attributes:
        name: a label, or what is left of a block of the round before, as `rest of <its name>`.
        parent: name of the block of the round before; empty in the first round.
        first: label of the first round, which gives the colour; None for what is left.
        label: itself, None for what is left.
        samples: in it.
    """

    name: str
    parent: str
    first: int | None
    label: int | None
    samples: int


def _blocks(rows: Rows, home: Mapping[Any, str]) -> tuple[list[_Block], dict[Any, str]]:
    """Blocks of one round, large before small, and the block that each label is in.

    Args:
        rows: labels of the round.
        home: the block of the round before that each of its labels was in.
    """
    total = sum(row["samples"] for row in rows)
    found: dict[str, _Block] = {}
    homes: dict[Any, str] = {}
    for row in rows:
        parent = home.get(row["parent"], "")
        is_own = row["samples"] >= SMALLEST * total and not parent.startswith("rest of")
        name = str(row["label"]) if is_own else f"rest of {parent}"
        count = row["samples"] + (found[name].samples if name in found else 0)
        first, label = (row["first"], row["label"]) if is_own else (None, None)
        found[name], homes[row["label"]] = _Block(name, parent, first, label, count), name
    return sorted(found.values(), key=lambda each: (each.label is None, -each.samples)), homes


def _draw_round(
    axis: Axes,
    column: int,
    blocks: Sequence[_Block],
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
    total = sum(block.samples for block in blocks)
    # What comes from one block stays together, in the order of the round before: bands do not cross.
    order = list(before)
    ordered = sorted(blocks, key=lambda each: order.index(each.parent) if order else 0)
    gap = _ROOM / max(len(ordered) - 1, 1)
    left = {name: top for name, (top, _) in before.items()}
    places: dict[str, tuple[float, float]] = {}
    y = 0.0
    for block in ordered:
        height = block.samples / total
        colour = _GREY if block.first is None else _COLOURS[block.first % len(_COLOURS)]
        if before:
            start = left[block.parent]
            _band(axis, column, (start, start + height), (y, y + height), colour)
            left[block.parent] = start + height
        look: dict[str, Any] = {"facecolor": colour, "edgecolor": PAPER, "linewidth": 0.5}
        axis.add_patch(Rectangle((column, y), _BAR, height, **look))
        if not before and height > _NAMED and block.label is not None:
            text = names.get(block.label, "")
            axis.text(column + _BAR + 0.012, y + height / 2, text, va="center", color=INK)
        places[block.name] = (y, y + height)
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
