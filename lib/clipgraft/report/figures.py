"""Figures of the data and of pretraining: from numbers to picture, nothing else.

The rows given to a function are the rows of the figure's CSV. Captions say what to look for and
what bad looks like.
"""

from __future__ import annotations

import math
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
_PHASE_TINTS = ("#F3F4F6", "#FFFFFF")


def plot_caption_lengths(length_C: np.ndarray, unit: str, limits: Mapping[str, int]) -> Figure:
    """How long captions are, and what each phase cuts off.

    Args:
        length_C: of each caption.
        unit: `tokens` (with start and end) or `words`.
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


def plot_pretraining(rows: Rows, phases: Mapping[str, tuple[int, int]], batch: int) -> Figure:
    """Loss, tau, learning rate and speed over all phases.

    Args:
        rows: of metrics, with `phase` and `samples_seen` counted from the first phase on.
        phases: name to the samples seen at its start and end.
        batch: global batch size, for the loss of guessing.
    """
    panels = {
        "loss": "loss",
        "tau": "tau = 1/exp(logit_scale)",
        "lr": "learning rate",
        "samples_per_second": "samples per second",
    }

    def plot() -> Canvas:
        figure, axes = canvas(4.8, 2, 2, sharex=True)
        for axis, (name, title) in zip(axes.flat, panels.items(), strict=True):
            for number, (phase, (start, end)) in enumerate(phases.items()):
                axis.axvspan(start, end, color=_PHASE_TINTS[number % 2], zorder=0, linewidth=0)
                mine = [row for row in rows if row["phase"] == phase and name in row]
                x, y = [row["samples_seen"] for row in mine], [row[name] for row in mine]
                axis.plot(x, y, color=BLUE, marker="o" if len(mine) < 3 else None, markersize=3)
                if len(phases) > 1 and name == "loss":
                    place = {"xytext": (4, -4), "textcoords": "offset points"}
                    corner = (start, 1)
                    transform = axis.get_xaxis_transform()
                    axis.annotate(
                        phase,
                        corner,
                        xycoords=transform,
                        va="top",
                        color=MUTED,
                        fontsize=8.5,
                        **place,
                    )
            axis.set_title(title)
            axis.set_xlim(0, max(end for _, end in phases.values()))
            counts_on(axis.xaxis)
        axes[0, 0].axhline(math.log(batch), color=ORANGE, linewidth=1, linestyle="--")
        for axis, name in ((axes[0, 0], "loss"), (axes[1, 1], "samples_per_second")):
            top = max((row[name] for row in rows), default=1)
            axis.set_ylim(0, 1.12 * max(top, math.log(batch) if name == "loss" else 0))
        for axis in axes[1]:
            axis.set_xlabel("samples seen")
        return figure

    wait = float(np.mean([row.get("data_wait", 0.0) for row in rows]))
    caption = (
        f"The dashed line is the loss of guessing, ln {batch:,} = {math.log(batch):.2f}; a jump where "
        "a phase begins is normal and should be gone soon. tau should fall and settle. Bad: a loss "
        "that stays at the line or jumps up within a phase; tau at 0.01, where it is held; "
        f"waiting for data more than a few per cent of the time ({100 * wait:.0f} % here)."
    )
    return draw(
        "pretraining_curves", "Loss, temperature, learning rate, speed", caption, rows, plot
    )
