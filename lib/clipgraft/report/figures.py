"""Figures of the data: from numbers to picture, nothing else.

The rows given to a function are the rows of the figure's CSV. Captions say what to look for and
what bad looks like.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullLocator

from clipgraft.report.style import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    WIDTH,
    Figure,
    canvas,
    counts_on,
    draw,
)

Rows = Sequence[Mapping[str, Any]]
MAX_SIZES = 500  # dots of a scatter plot


def plot_caption_lengths(length_C: np.ndarray, unit: str, limits: Mapping[str, int]) -> Figure:
    """How long captions are, and what each phase cuts off.

    Args:
        length_C: of each caption.
        unit: `tokens` (with start, and end if there is one) or `words`.
        limits: phase to its text length; only for tokens.
    """
    count = np.bincount(length_C)
    rows = [{unit: n, "captions": int(c)} for n, c in enumerate(count) if c]
    cut = {phase: float((length_C > limit).mean()) for phase, limit in limits.items()}

    def plot() -> Canvas:
        figure, axes = canvas(2.7)
        axis = axes[0, 0]
        # Long tails are cut where one caption in a thousand is left.
        last = max(int(np.quantile(length_C, 0.999)), *limits.values(), 1)
        axis.bar([r[unit] for r in rows], [r["captions"] for r in rows], width=0.85, color=BLUE)
        top = count.max()
        for limit in sorted(set(limits.values())):
            names = ", ".join(phase for phase, of in limits.items() if of == limit)
            axis.axvline(limit + 0.5, color=ORANGE, linewidth=1.4)
            axis.text(limit + 0.4, top * 1.02, f"{names}: {limit}", color=ORANGE, ha="right")
        axis.set(xlim=(0, last + 1.5), ylim=(0, top * 1.14), xlabel=unit, ylabel="captions")
        axis.grid(axis="x", visible=False)
        counts_on(axis.xaxis)
        counts_on(axis.yaxis)
        return figure

    caption = f"Median {np.median(length_C):.0f} {unit}, longest {length_C.max():,}. "
    if limits:
        shares = ", ".join(f"{phase} {100 * share:.1f} %" for phase, share in cut.items())
        caption += (
            f"Captions right of a line are cut in that phase ({shares}). "
            "Bad: a phase that cuts most captions, since what stands last is never learnt."
        )
    return draw("data_caption_lengths", "Caption length", caption, rows, plot)


def plot_image_sizes(width_N: np.ndarray, height_N: np.ndarray, image_size: int) -> Figure:
    """Width against height of the images as they came.

    Args:
        width_N: in pixels.
        height_N: in pixels.
        image_size: the largest side that a phase trains with.
    """
    sizes, counts = size_counts(width_N, height_N)
    rows = [
        {"width": int(w), "height": int(h), "images": int(n)}
        for (w, h), n in zip(sizes, counts, strict=True)
    ]
    num_small = int((np.minimum(width_N, height_N) < image_size).sum())

    def plot() -> Canvas:
        figure = Canvas(figsize=(WIDTH * 0.48, WIDTH * 0.4), layout="constrained")
        axis = figure.subplots()
        area = 12 + 160 * counts / counts.max()
        axis.scatter(sizes[:, 0], sizes[:, 1], s=area, color=BLUE, alpha=0.35, linewidths=0)
        low, high = sizes.min() * 0.85, sizes.max() * 1.15
        axis.plot([low, high], [low, high], color=MUTED, linewidth=0.8, linestyle=":")
        axis.axvline(image_size, color=ORANGE, linewidth=1.2)
        axis.axhline(image_size, color=ORANGE, linewidth=1.2)
        axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        axis.set(xlabel="width, pixels", ylabel="height, pixels")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.set_major_formatter("{x:.0f}")
            side.set_minor_locator(NullLocator())
        return figure

    caption = (
        f"Each dot is a size, its area the number of images; the lines are the training size, "
        f"{image_size} pixels. Bad: many images left of or below them ({num_small:,} of "
        f"{len(width_N):,} here), which are enlarged."
    )
    return draw("data_image_sizes", "Image size", caption, rows, plot)


def size_counts(width_N: np.ndarray, height_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct sizes `[S, 2]` and how many images have each; in steps of 5 % if they are too many."""
    size_N2 = np.stack([width_N, height_N], axis=1)
    sizes, counts = np.unique(size_N2, axis=0, return_counts=True)
    if len(sizes) > MAX_SIZES:
        step = np.log(1.05)
        size_N2 = np.exp(np.round(np.log(size_N2) / step) * step).round().astype(int)
        sizes, counts = np.unique(size_N2, axis=0, return_counts=True)
    return sizes, counts


def plot_rejects(rows: Rows) -> Figure:
    """Samples that were asked for and are not used, by data set and reason.

    Args:
        rows: `data`, `reason`, `samples`.
    """

    def plot() -> Canvas:
        figure, axes = canvas(0.7 + 0.24 * len(rows))
        axis = axes[0, 0]
        names = [f"{row['data']}: {row['reason']}" for row in rows]
        bars = axis.barh(names, [row["samples"] for row in rows], color=BLUE, height=0.7)
        axis.bar_label(bars, fmt="{:,.0f}", padding=3, color=INK, fontsize=8)
        axis.invert_yaxis()
        axis.set(xlabel="samples")
        axis.grid(axis="y", visible=False)
        counts_on(axis.xaxis)
        return figure

    caption = (
        "Bad images are found once, here, and never reach training. "
        "Bad: one reason that dominates, which is mostly a limit of the config or a broken source."
    )
    return draw("data_rejects", "Samples left out, by reason", caption, rows, plot)
