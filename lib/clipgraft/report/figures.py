"""Figures of the data, the training and the experts: from numbers to picture, nothing else.

The rows given to a function are the rows of the figure's CSV. Captions say what to look for and
what bad looks like.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clipgraft.report.style import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    WIDTH,
    Canvas,
    Figure,
    canvas,
    counts_on,
    draw,
    hide_unused,
)

Rows = Sequence[Mapping[str, Any]]
_PHASE_TINTS = ("#F3F4F6", "#FFFFFF")
MAX_BARS = 60  # more labels than this are drawn as an outline


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
    sizes, counts = np.unique(np.stack([width_N, height_N], 1), axis=0, return_counts=True)
    rows = [
        {"width": int(w), "height": int(h), "images": int(n)}
        for (w, h), n in zip(sizes, counts, strict=True)
    ]
    num_small = int((np.minimum(width_N, height_N) < image_size).sum())

    def plot() -> Canvas:
        figure = Canvas(figsize=(WIDTH * 0.5, WIDTH * 0.42), layout="constrained")
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
            side.set_major_formatter("{x:.0f}")
            side.set_minor_formatter("")
        return figure

    caption = (
        f"Each dot is a size, its area the number of images; the lines are the training size, "
        f"{image_size} pixels. Bad: many images left of or below them ({num_small:,} of "
        f"{len(width_N):,} here), which are enlarged."
    )
    return draw("data_image_sizes", "Image size", caption, rows, plot)


def plot_rejects(rows: Rows) -> Figure:
    """Samples that were asked for and are not used, by data set and reason.

    Args:
        rows: `data`, `reason`, `samples`.
    """

    def plot() -> Canvas:
        figure, axes = canvas(0.7 + 0.27 * len(rows))
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
                        phase, corner, xycoords=transform, va="top", color=MUTED, fontsize=8.5, **place
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
    return draw("pretraining", "Loss, temperature, learning rate, speed", caption, rows, plot)


def plot_expert_losses(
    series: Mapping[str, Rows], titles: Mapping[str, str], colours: Mapping[str, str]
) -> Figure:
    """Loss of each expert and control against samples seen in its own fine-tuning.

    Args:
        series: model key to its metrics.
        titles: model key to its name for people.
        colours: model key to its colour.
    """
    rows = [
        {"model": key, "samples_seen": row["samples_seen"], "loss": row["loss"]}
        for key, metrics in series.items()
        for row in metrics
    ]

    def plot() -> Canvas:
        figure, axes = canvas(2.9)
        axis = axes[0, 0]
        for key, metrics in series.items():
            x, y = [row["samples_seen"] for row in metrics], [row["loss"] for row in metrics]
            style = "-" if key.startswith("expert_") else "--"
            marker = "o" if len(metrics) < 3 else None
            axis.plot(
                x, y, style, color=colours[key], label=titles[key], marker=marker, markersize=3
            )
        axis.set(xlabel="samples seen in this stage", ylabel="loss", xlim=(0, None))
        counts_on(axis.xaxis)
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return figure

    caption = (
        "Experts (solid) see batches of one pseudo label each, controls (dashed) ordinary batches. An "
        "expert's loss starts higher, because all its negatives look alike, and must fall: that fall is "
        "what it learns beyond the base. Bad: a flat line (nothing left to tell apart), or an expert "
        "whose loss equals the control's (its clusters separate nothing)."
    )
    return draw("experts_loss", "Loss of the experts", caption, rows, plot)


def plot_cluster_sizes(rounds: Mapping[str, Mapping[str, Any]], batch: int) -> Figure:
    """Sizes of the accumulated labels, round by round, largest first.

    Args:
        rounds: round to the content of `clusters.json`.
        batch: global batch size of the experts.
    """
    rows = [
        {"round": name, "label": label, "size": size}
        for name, about in rounds.items()
        for label, size in enumerate(about["sizes"])
    ]

    def plot() -> Canvas:
        columns = min(3, len(rounds))
        lines = math.ceil(len(rounds) / columns)
        figure, axes = canvas(2.5 * lines, lines, columns)
        for axis, (name, about) in zip(hide_unused(axes, len(rounds)), rounds.items(), strict=True):
            sizes = sorted(about["sizes"], reverse=True)
            if len(sizes) <= MAX_BARS:
                axis.bar(range(1, len(sizes) + 1), sizes, color=BLUE, width=0.8)
            else:
                edges = np.arange(len(sizes) + 1) + 0.5
                axis.stairs(sizes, edges, fill=True, color=BLUE)
            axis.axhline(batch, color=ORANGE, linewidth=1.2)
            axis.set_title(f"round {name}: {len(sizes)} labels")
            axis.set(xlabel="label, by size", ylim=(0, None))
            axis.grid(axis="x", visible=False)
            counts_on(axis.yaxis)
        axes[0, 0].set_ylabel("samples")
        return figure

    small = {
        name: sum(size for size in about["sizes"] if size < batch) / max(sum(about["sizes"]), 1)
        for name, about in rounds.items()
    }
    shares = ", ".join(f"round {name} {100 * share:.0f} %" for name, share in small.items())
    caption = (
        f"The line is the batch size, {batch:,}. Labels below it cannot fill a batch of their own and "
        f"share one, with fewer negatives (samples in such labels: {shares}). Bad: one label that holds "
        "nearly everything, or most samples below the line."
    )
    return draw("experts_cluster_sizes", "Samples per pseudo label", caption, rows, plot)


def plot_agreement(rows: Rows) -> Figure:
    """Clusters against the known labels of the data set.

    Args:
        rows: `round`, `clusters` (image, text, label), `attribute`, `nmi`.
    """

    def plot() -> Canvas:
        lines = list(dict.fromkeys((row["round"], row["clusters"]) for row in rows))
        attributes = list(dict.fromkeys(row["attribute"] for row in rows))
        value = {(row["round"], row["clusters"], row["attribute"]): row["nmi"] for row in rows}
        table = np.array([[value[(*line, attribute)] for attribute in attributes] for line in lines])
        names = [f"round {name}  {clusters}" for name, clusters in lines]
        figure = Canvas(figsize=(2.2 + 0.95 * len(attributes), 0.8 + 0.31 * len(lines)))
        figure.set_layout_engine("constrained")
        axis = figure.subplots()
        heat_map(axis, table, attributes, names, high=1.0, text="{:.2f}")
        for number in range(3, len(lines), 3):
            axis.axhline(number, color="white", linewidth=4)
        return figure

    caption = (
        "Normalised mutual information between clusters and what is known of the training samples: 1 if "
        "the clusters are that attribute, 0 if they know nothing of it. Look for rounds that "
        "differ: what one round has found is held fixed within the labels of the next, so new "
        "image and text clusters should turn to something else. Bad: every round the same."
    )
    return draw("experts_agreement", "What the clusters are about", caption, rows, plot)


def plot_router(rows: Rows, num_experts: int) -> Figure:
    """Loss, balance and entropy while the routers are trained.

    Args:
        rows: of metrics.
        num_experts: for the entropy of a router without an opinion.
    """
    panels = {"contrastive": "contrastive loss", "balance": "balance loss", "entropy": "entropy, nats"}
    bounds = {"balance": 1.0, "entropy": math.log(num_experts)}
    kept = ["samples_seen", *(name for name in panels if name in rows[0])]

    def plot() -> Canvas:
        figure, axes = canvas(2.5, 1, len(kept) - 1)
        for axis, name in zip(axes[0], kept[1:], strict=True):
            x, y = [row["samples_seen"] for row in rows], [row[name] for row in rows]
            axis.plot(x, y, color=ORANGE, marker="o" if len(rows) < 3 else None, markersize=3)
            if name in bounds:
                axis.axhline(bounds[name], color=MUTED, linewidth=1, linestyle="--")
            axis.set_title(panels[name])
            axis.set_xlabel("samples seen")
            counts_on(axis.xaxis)
        return figure

    caption = (
        f"Dashed: the least balance loss (1, all experts used alike) and the entropy of a router without "
        f"an opinion (ln {num_experts} = {math.log(num_experts):.2f}). Entropy should fall below its line "
        "while balance stays near its own. Bad: balance rising towards the number of experts (one expert "
        "takes all), or entropy that never leaves its line (nothing is routed)."
    )
    return draw("moe_router", "Router training", caption, [{k: r[k] for k in kept} for r in rows], plot)


def plot_expert_load(loads: Mapping[str, Sequence[Sequence[float]]], layers: Mapping[str, Any]) -> Figure:
    """Share of the tokens' choices that went to each expert, per layer and tower.

    Args:
        loads: tower to `[layer][expert]`.
        layers: tower to the numbers of its blocks with experts.
    """
    rows = [
        {"tower": tower, "layer": layers[tower][i], "expert": expert, "share": share}
        for tower, load in loads.items()
        for i, shares in enumerate(load)
        for expert, share in enumerate(shares)
    ]
    num_experts = len(next(iter(loads.values()))[0])

    def plot() -> Canvas:
        most = max(len(load) for load in loads.values())
        figure, axes = canvas(1.0 + 0.34 * most, 1, len(loads))
        high = max(row["share"] for row in rows)
        for axis, (tower, load) in zip(axes[0], loads.items(), strict=True):
            experts = [f"expert {e}" if num_experts <= 5 else str(e) for e in range(num_experts)]
            names = [f"layer {layer}" for layer in layers[tower]]
            percent = 100 * np.array(load)
            heat_map(axis, percent, experts, names, high=100 * high, text="{:.0f} %")
            axis.set_title(f"{tower} tower")
        return figure

    caption = (
        f"Share of choices at the end of router training; even use would be {100 / num_experts:.0f} % "
        "each. Expert 0 is the base. Look for layers with preferences of their own. Bad: a column of zeros "
        "(an expert that was trained for nothing), or one dark column (a dense model in disguise)."
    )
    return draw("moe_load", "Expert load per layer", caption, rows, plot)


def heat_map(
    axis: Any,
    table: np.ndarray,
    columns: Sequence[str],
    lines: Sequence[str],
    *,
    high: float,
    text: str | None,
) -> None:
    """A table in shades of blue from 0 to `high`, its numbers written into it."""
    axis.pcolormesh(table, cmap="Blues", vmin=0, vmax=high, edgecolors="white", linewidth=1.2)
    axis.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axis.set_yticks(np.arange(len(lines)) + 0.5, lines)
    axis.invert_yaxis()
    axis.tick_params(length=0)
    axis.grid(visible=False)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    if text is None:
        return
    for (i, j), value in np.ndenumerate(table):
        colour = "white" if value > 0.6 * high else INK
        axis.text(
            j + 0.5, i + 0.5, text.format(value), ha="center", va="center", color=colour, fontsize=8
        )
