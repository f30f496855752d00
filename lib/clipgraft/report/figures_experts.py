"""Figures of the experts and of the MoE: clusters, losses, routers, loads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas

from clipgraft.report.style import (
    BLUE,
    MUTED,
    ORANGE,
    PAPER,
    Figure,
    canvas,
    counts_on,
    draw,
    heat_map,
    hide_unused,
)

Rows = Sequence[Mapping[str, Any]]
# From the first layer to the last; all can be seen on white and on black.
_LAYERS = LinearSegmentedColormap.from_list("layers", ["#56B4E9", "#7B6FD0", "#CC4C9A"])
MAX_BARS = 60  # more labels than this are drawn as an outline
MAX_RANKS = 2_000  # more labels than this nobody can tell apart, and the page would carry each


def plot_cluster_sizes(
    rounds: Mapping[str, Mapping[str, Any]], batch: int, *, loses_small: bool = False
) -> Figure:
    """Sizes of the accumulated labels, round by round, largest first.

    Args:
        rounds: round to the content of `clusters.json`.
        batch: global batch size of the experts.
        loses_small: whether experts leave out what does not fill a batch of its label (`batch_order: round_robin`).
    """
    rows = [row for name, about in rounds.items() for row in _size_rows(name, about["sizes"])]

    def plot() -> Canvas:
        columns = min(3, len(rounds))
        lines = math.ceil(len(rounds) / columns)
        figure, axes = canvas(2.5 * lines, lines, columns)
        for axis, (name, about) in zip(hide_unused(axes, len(rounds)), rounds.items(), strict=True):
            own = [row for row in rows if row["round"] == name]
            sizes, ranks = [row["size"] for row in own], [row["rank"] for row in own]
            if len(sizes) <= MAX_BARS:
                axis.bar(ranks, sizes, color=BLUE, width=0.8)
            else:
                edges = np.array([*ranks, ranks[-1] + 1]) - 0.5
                axis.stairs(sizes, edges, fill=True, color=BLUE)
            axis.axhline(batch, color=ORANGE, linewidth=1.2)
            axis.set_title(f"round {name}: {len(about['sizes']):,} labels")
            axis.set(xlabel="label, by size", ylim=(0, None))
            axis.grid(axis="x", visible=False)
            counts_on(axis.xaxis)
            counts_on(axis.yaxis)
        axes[0, 0].set_ylabel("samples")
        return figure

    small = {
        name: sum(size for size in about["sizes"] if size < batch) / max(sum(about["sizes"]), 1)
        for name, about in rounds.items()
    }
    shares = ", ".join(f"round {name} {100 * share:.0f} %" for name, share in small.items())
    if loses_small:
        fate = (
            "are never seen; of larger ones, what does not fill a batch is left out of each epoch"
        )
    else:
        fate = "share one, with fewer negatives"
    caption = (
        f"The line is the batch size, {batch:,}. Labels below it cannot fill a batch of their own and "
        f"{fate} (samples in labels below the line: {shares}). Bad: one label that holds "
        "nearly everything, or most samples below the line."
    )
    if any(len(about["sizes"]) > MAX_RANKS for about in rounds.values()):
        caption += f" Rounds of more than {MAX_RANKS:,} labels are drawn and listed at as many ranks, evenly spaced."
    return draw("experts_cluster_sizes", "Samples per pseudo label", caption, rows, plot)


def _size_rows(name: str, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Labels of a round, the largest first; of very many some, the first and the last among them."""
    order = np.argsort(-np.array(sizes), kind="stable")
    places = np.linspace(0, len(order) - 1, min(len(order), MAX_RANKS)).round().astype(int)
    return [
        {"round": name, "rank": place + 1, "label": label, "size": sizes[label]}
        for place, label in zip(places.tolist(), order[places].tolist(), strict=True)
    ]


def plot_agreement(rows: Rows) -> Figure:
    """Clusters against the known labels of the data set.

    Args:
        rows: `round`, `clusters` (image, text, both or joint, all labels), `attribute`, `nmi`.
    """

    def plot() -> Canvas:
        lines = list(dict.fromkeys((row["round"], row["clusters"]) for row in rows))
        attributes = list(dict.fromkeys(row["attribute"] for row in rows))
        value = {(row["round"], row["clusters"], row["attribute"]): row["nmi"] for row in rows}
        table = np.array(
            [[value[(*line, attribute)] for attribute in attributes] for line in lines]
        )
        names = [f"round {name}  {clusters}" for name, clusters in lines]
        figure = Canvas(figsize=(2.2 + 0.95 * len(attributes), 0.8 + 0.31 * len(lines)))
        figure.set_layout_engine("constrained")
        axis = figure.subplots()
        heat_map(axis, table, attributes, names, high=1.0, text="{:.2f}")
        for number, (one, other) in enumerate(pairwise(lines), start=1):
            if one[0] != other[0]:
                axis.axhline(number, color=PAPER, linewidth=4)
        return figure

    caption = (
        "Normalised mutual information between clusters and what is known of the training samples: 1 if "
        "the clusters are that attribute, 0 if they know nothing of it (a little more by chance for very many labels). Look "
        "for rounds that "
        "differ: what one round has found is held fixed within the labels of the next, so new "
        "image and text clusters should turn to something else. Bad: every round the same."
    )
    return draw("experts_agreement", "What the clusters are about", caption, rows, plot)


def plot_router(rows: Rows, num_experts: int, top_k: int) -> Figure | None:
    """Loss, balance and entropy while the routers are trained; None if none was recorded.

    Args:
        rows: of metrics.
        num_experts: for the entropy of a router without an opinion.
        top_k: experts per token, for the largest balance loss.
    """
    panels = {
        "contrastive": "contrastive loss",
        "balance": "balance loss",
        "entropy": "entropy, nats",
    }
    bounds = {"balance": 1.0, "entropy": math.log(num_experts)}
    kept = ["samples_seen", *(name for name in panels if name in rows[0])]
    if len(kept) == 1:
        return None

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
        f"while balance stays near its own. Bad: balance rising towards {num_experts / top_k:.3g} ({top_k} of "
        f"{num_experts} experts take all), or entropy that never leaves its line (nothing is routed)."
    )
    return draw(
        "moe_router", "Router training", caption, [{k: r[k] for k in kept} for r in rows], plot
    )


def plot_router_layers(
    rows: Rows, layers: Mapping[str, Sequence[int]], bounds: Sequence[float]
) -> Figure:
    """Load of the least and of the most used expert, and entropy, layer by layer, while the routers are trained.

    Args:
        rows: of metrics, with `load_<tower>` and `entropy_<tower>`.
        layers: tower to the numbers of its blocks with experts.
        bounds: loads below and above which a layer counts as collapsed.
    """
    num_experts = len(rows[0][f"load_{next(iter(layers))}"][0])
    table = [
        {
            "samples_seen": row["samples_seen"],
            "tower": tower,
            "layer": layer,
            "least": min(row[f"load_{tower}"][i]),
            "most": max(row[f"load_{tower}"][i]),
            "entropy": row[f"entropy_{tower}"][i],
        }
        for row in rows
        for tower, numbers in layers.items()
        for i, layer in enumerate(numbers)
    ]
    panels = {
        "least": ("least used expert", 1 / num_experts, bounds[0]),
        "most": ("most used expert", 1 / num_experts, bounds[1]),
        "entropy": ("entropy, nats", math.log(num_experts), None),
    }

    def plot() -> Canvas:
        figure, axes = canvas(2.1 * len(layers) + 0.2, len(layers), 3, sharex=True)
        x = [row["samples_seen"] for row in rows]
        for line, (tower, numbers) in zip(axes, layers.items(), strict=True):
            shades = _LAYERS(np.linspace(0, 1, len(numbers)))
            for axis, (key, (title, even, bound)) in zip(line, panels.items(), strict=True):
                for number, shade in zip(numbers, shades, strict=True):
                    own = [row for row in table if row["tower"] == tower and row["layer"] == number]
                    marker = "o" if len(rows) < 3 else None
                    label = f"layer {number}" if number in (numbers[0], numbers[-1]) else None
                    y = [row[key] for row in own]
                    axis.plot(x, y, color=shade, marker=marker, markersize=3, label=label)
                axis.axhline(even, color=MUTED, linewidth=1, linestyle="--")
                if bound is not None:
                    axis.axhline(bound, color=ORANGE, linewidth=1.2, zorder=1)  # below the lines
                axis.set_title(f"{tower}: {title}")
                axis.set_ylim(0, None)
                counts_on(axis.xaxis)
            line[0].set_ylabel("share of choices")
            line[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        for axis in axes[-1]:
            axis.set_xlabel("samples seen")
        return figure

    caption = (
        f"One line per layer, from the first (blue) to the last (pink). Dashed: even use, "
        f"{100 / num_experts:.0f} % each, and a router without an opinion. Fresh routers are uneven; lines should leave "
        "the orange bounds early and stay away from them. Bad: a line on or beyond a bound at the end (an expert that "
        "no token takes, or one that every token takes), or a line that crosses it late (the layer is collapsing: a "
        "larger balance_weight). The mean over layers would hide it."
    )
    title = "Router training, layer by layer"
    return draw("moe_router_layers", title, caption, table, plot)


def plot_expert_load(
    loads: Mapping[str, Sequence[Sequence[float]]], layers: Mapping[str, Any]
) -> Figure:
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
