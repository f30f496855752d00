"""Figures of what tokens choose: maps over pictures and captions, words, and what choices say of attributes."""

# Shapes: M layers, P patches, E experts, R words of a caption

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_hex, to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch

from clipgraft.report.style import INK, PAPER, Figure, canvas, draw, heat_map, hide_unused

MAX_LAYERS = 6  # drawn of a map; the numbers are of all
MAX_SAMPLES = 6
TOKENS = ("patch", "token")  # what choices are held against beside labels
_TINT = 0.62  # of the expert's colour over the picture


def plot_patch_choices(
    pictures: Sequence[np.ndarray],
    maps: Sequence[Mapping[str, Any]],
    grid: Sequence[int],
    layers: Sequence[int],
    colours: Sequence[str],
) -> Figure:
    """Pictures, and beside each the first choice of its patches, layer by layer.

    Args:
        pictures: uint8 [H, H, 3] as the model sees them.
        maps: `row` of each picture and `experts` [M][P].
        grid: rows and columns of patches.
        layers: numbers of the blocks with experts.
        colours: of each expert.
    """
    rows = [
        {"row": each["row"], "layer": layer, "patch": patch, "expert": expert}
        for each in maps
        for layer, experts in zip(layers, each["experts"], strict=True)
        for patch, expert in enumerate(experts)
    ]
    shown = _some(len(layers))
    tints_E3 = np.array([to_rgb(colour) for colour in colours])

    def plot() -> Canvas:
        size = min(len(pictures), MAX_SAMPLES)
        columns = len(shown) + 1
        width = 1.05 * columns
        figure = Canvas(figsize=(width, 1.05 * size + 0.55), layout="constrained")
        axes = figure.subplots(size, columns, squeeze=False)
        for line, picture, each in zip(axes, pictures, maps, strict=False):
            _picture(line[0], picture)
            for axis, number in zip(line[1:], shown, strict=True):
                expert_P = np.array(each["experts"][number]).reshape(grid)
                _picture(axis, _tinted(picture, tints_E3[expert_P]))
        for axis, number in zip(axes[0, 1:], shown, strict=True):
            axis.set_title(f"layer {layers[number]}", fontsize=8.5, loc="center")
        bright = _over(0.8, tints_E3)  # as they look on a bright picture
        _legend(figure, [to_hex((red, green, blue)) for red, green, blue in bright])
        return figure

    caption = (
        "The first choice of every patch, as a tint over the picture; a few samples evenly spread over the data set, as the "
        "model sees them. Look for maps that follow the object, its rim or its ground. Bad: one colour all over (a layer "
        "that does not route), the same map whatever the picture (routing by place alone), or noise without borders."
    )
    return draw("moe_patch_choices", "Which expert patches choose", caption, rows, plot)


def plot_word_choices(
    captions: Sequence[Mapping[str, Any]], layers: Sequence[int], colours: Sequence[str]
) -> Figure:
    """Captions, and below each word its first choice, layer by layer.

    Args:
        captions: `words` of each and `experts` [M][R].
        layers: numbers of the blocks with experts.
        colours: of each expert.
    """
    captions = [each for each in captions if each["words"]]
    rows = [
        {"caption": number, "place": place, "word": word, "layer": layer, "expert": experts[place]}
        for number, each in enumerate(captions)
        for layer, experts in zip(layers, each["experts"], strict=True)
        for place, word in enumerate(each["words"])
    ]
    shown = _some(len(layers))

    def plot() -> Canvas:
        drawn = captions[:MAX_SAMPLES]
        lines = math.ceil(len(drawn) / 2)
        figure, axes = canvas((0.85 + 0.17 * len(shown)) * lines + 0.4, lines, 2)
        for axis, each in zip(hide_unused(axes, len(drawn)), drawn, strict=True):
            table = np.array([each["experts"][number] for number in shown])
            palette = ListedColormap(list(colours))
            axis.pcolormesh(
                table,
                cmap=palette,
                vmin=-0.5,
                vmax=len(colours) - 0.5,
                edgecolors=PAPER,
                linewidth=1.2,
            )
            places = np.arange(len(each["words"])) + 0.5
            axis.set_xticks(places, each["words"], rotation=55, ha="left", color=INK)
            axis.xaxis.tick_top()
            axis.set_yticks(np.arange(len(shown)) + 0.5, [f"layer {layers[n]}" for n in shown])
            axis.invert_yaxis()
            _bare(axis)
        _legend(figure, colours)
        return figure

    caption = (
        "The first choice of every word of a caption (of every piece, where a word has several). Look for words of a kind "
        "that keep to an expert. Bad: one colour for all words of a layer, or colours that depend on the place in the "
        "caption alone."
    )
    return draw("moe_word_choices", "Which expert caption words choose", caption, rows, plot)


def plot_frequent_words(
    words: Sequence[Mapping[str, Any]], layers: Sequence[int], colours: Sequence[str]
) -> Figure:
    """How the most frequent words of all captions divide their first choices.

    Args:
        words: `word`, `count` and `shares` [M][E], the most frequent first.
        layers: numbers of the blocks with experts.
        colours: of each expert.
    """
    rows = [
        {"word": each["word"], "count": each["count"], "layer": layer, "expert": e, "share": share}
        for each in words
        for layer, shares in zip(layers, each["shares"], strict=True)
        for e, share in enumerate(shares)
    ]
    shown = _some(len(layers))

    def plot() -> Canvas:
        figure, axes = canvas(0.8 + 0.17 * len(words), 1, len(shown), sharey=True)
        names = [each["word"] for each in words]
        for axis, number in zip(axes[0], shown, strict=True):
            left = np.zeros(len(words))
            for e, colour in enumerate(colours):
                share = 100 * np.array([each["shares"][number][e] for each in words])
                axis.barh(np.arange(len(words)), share, left=left, color=colour, height=0.82)
                left += share
            axis.set_title(f"layer {layers[number]}")
            axis.set(xlim=(0, 100), ylim=(len(words) - 0.4, -0.6))
            axis.xaxis.set_major_formatter("{x:.0f} %")
            _bare(axis)
        axes[0, 0].set_yticks(np.arange(len(words)), names, color=INK)
        _legend(figure, colours)
        return figure

    caption = (
        "First choices of the most frequent words of all captions. Look for words of one attribute that share a colour. "
        "Bad: bars that are all alike (the router does not look at the word), or of one colour."
    )
    return draw("moe_words", "Frequent words and their experts", caption, rows, plot)


def plot_information(
    rows: Sequence[Mapping[str, Any]], model: str, task: str, title: str
) -> Figure:
    """What choices say of attributes, per layer and tower.

    Args:
        rows: `model`, `task`, `tower`, `layer`, `about`, `bits`, `share`, `shuffled`.
        model: whose are drawn.
        task: of which task.
        title: of the model, for people.
    """
    own = [row for row in rows if (row["model"], row["task"]) == (model, task)]
    towers = list(dict.fromkeys(row["tower"] for row in own))

    def plot() -> Canvas:
        most = max(len({row["layer"] for row in own if row["tower"] == tower}) for tower in towers)
        figure, axes = canvas(0.95 + 0.3 * most, 1, len(towers))
        high = 100 * max(0.05, *(row["share"] for row in own))
        for axis, tower in zip(axes[0], towers, strict=True):
            mine = [row for row in own if row["tower"] == tower]
            layers = list(dict.fromkeys(row["layer"] for row in mine))
            names = list(dict.fromkeys(row["about"] for row in mine))
            value = {(row["layer"], row["about"]): 100 * row["share"] for row in mine}
            table = np.array([[value[layer, name] for name in names] for layer in layers])
            lines = [f"layer {layer}" for layer in layers]
            heat_map(axis, table, names, lines, high=high, text="{:.1f}")
            axis.tick_params(axis="x", labelrotation=35 if len(names) > 5 else 0)
            axis.set_title(f"{tower} tower")
        return figure

    by_chance = {
        is_token: 100
        * max((r["shuffled"] for r in own if (r["about"] in TOKENS) == is_token), default=0)
        for is_token in (False, True)
    }
    caption = (
        f"Mutual information between the first choice of a token and an attribute of its sample, in per cent of the entropy "
        f"of the choice, in {title} on {task}; with shuffled labels at most {by_chance[False]:.1f}. The last column is the "
        f"token itself, its place in the picture or which word piece it is; shuffled, at most {by_chance[True]:.1f}. "
        "Look for layers that know an attribute. Bad: all columns but the last at the level of shuffled labels (experts "
        "have nothing to do with attributes), or zeros all along a row (one expert takes all)."
    )
    return draw("moe_information", "What the choice of an expert says", caption, rows, plot)


def _tinted(picture: np.ndarray, tint_HW3: np.ndarray) -> np.ndarray:
    """A grey picture under the colours of its patches."""
    side = len(picture)
    place = [np.arange(side) * size // side for size in tint_HW3.shape[:2]]
    tint = tint_HW3[np.ix_(*place)]
    grey = picture.mean(axis=2, keepdims=True) / 255
    return _over(grey, tint) * 255


def _over(grey: float | np.ndarray, tint: np.ndarray) -> np.ndarray:
    """A colour over a grey, both from 0 to 1."""
    return (1 - _TINT) * grey + _TINT * tint


def _picture(axis: Axes, pixels: np.ndarray) -> None:
    axis.imshow(pixels.round().astype(np.uint8), interpolation="none")
    axis.set_xticks([])
    axis.set_yticks([])
    _bare(axis)


def _bare(axis: Axes) -> None:
    axis.tick_params(length=0)
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _legend(figure: Canvas, colours: Sequence[str]) -> None:
    handles = [
        Patch(color=colour, label=f"expert {e}" if e else "expert 0 (base)")
        for e, colour in enumerate(colours)
    ]
    figure.legend(
        handles=handles, loc="outside lower left", ncols=min(len(handles), 6), handlelength=1.0
    )


def _some(num_layers: int) -> list[int]:
    """Numbers of the layers that are drawn, evenly spread."""
    places = np.linspace(0, num_layers - 1, min(num_layers, MAX_LAYERS))
    return [int(place) for place in places]
