"""Answers as HTML: bars of scores, and which expert each patch and each word chose.

Drawn here and not by matplotlib as in the report: all layers at once, in colours that do for light and dark, on a phone
as well, and with what is under the pointer in words.
"""

# Shapes: P patches, R pieces of a text, M layers, H height, W width

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

from clipgraft.evaluation.choices import TowerChoices
from clipgraft.report.read import expert_colours

NUM_CLASSES = 5
DENSE = "<p class='quiet'>No experts in the {tower} tower of {model}: every token takes the same MLP.</p>"

CSS = """
.bars { display: grid; grid-template-columns: minmax(0, 1fr) 5rem 4.2rem; gap: .2rem .6rem; align-items: center; margin: 0 0 1rem; }
.bars h3 { grid-column: 1 / -1; margin: .3rem 0 0; font-size: 1rem; }
.bars span { overflow-wrap: anywhere; }
.bars b { font-weight: 400; white-space: nowrap; text-align: right; font-variant-numeric: tabular-nums; }
.bars i { display: block; height: .6rem; border-radius: .3rem; background: #0072B2; min-width: 1px; }
.quiet { opacity: .75; }
.maps { display: flex; flex-wrap: wrap; gap: .8rem; }
.maps figure { margin: 0; width: 9.5rem; }
.maps figcaption, .legend { font-size: .85rem; }
.maps svg { width: 100%; height: auto; display: block; border-radius: .3rem; }
.words td, .legend i { box-shadow: 0 0 0 1px rgba(128, 128, 128, .6); }
.words { overflow-x: auto; }
.words table { border-collapse: separate; border-spacing: 2px; border: 0; margin: 0; width: auto; }
.words th { font-weight: 400; padding: .1rem .4rem; border: 0; white-space: nowrap; }
.words td { width: 3rem; height: 1.3rem; border: 0; border-radius: .2rem; text-align: center; font-size: .8rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .4rem 0; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .3rem; }
#found .grid-wrap { max-height: none; }
#found .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(9rem, 40%), 1fr)); }
#found .thumbnail-item { height: auto; aspect-ratio: auto; }
#found .thumbnail-item img { aspect-ratio: 1; }
#found .caption-label { position: static; max-width: none; white-space: normal; text-align: left; }
"""


def show_captions(captions: Sequence[tuple[str, float]]) -> str:
    """Captions and their cosines."""
    if not captions:
        return "<p class='quiet'>This data set has no captions.</p>"
    return _bars("captions of the data set, by cosine", captions, "{:.3f}", 1.0)


def show_classes(classes: Mapping[str, Sequence[tuple[str, float]]]) -> str:
    """The likeliest classes of each label."""
    if not classes:
        return (
            "<p class='quiet'>No classes to choose from: name labels, or classes of your own.</p>"
        )
    return "".join(
        _bars(name, [(each, 100 * p) for each, p in found[:NUM_CLASSES]], "{:.1f} %", 100.0)
        for name, found in classes.items()
    )


def show_patches(
    square_HW3: np.ndarray, grid: Sequence[int], choices: TowerChoices | None, model: str
) -> str:
    """A picture, and over it for every layer the first choice of each patch."""
    if choices is None:
        return DENSE.format(tower="image", model=escape(model))
    colours = expert_colours(choices.num_experts)
    picture = f"<image href='{_url(square_HW3)}' width='{grid[1]}' height='{grid[0]}'/>"
    expert_PM = choices.shown[0][1]
    maps = [_map(picture, grid, "the picture", "")]
    for number, layer in enumerate(choices.layers):
        tints = "".join(
            f"<rect x='{patch % grid[1]}' y='{patch // grid[1]}' width='1' height='1' fill='{colours[expert]}' "
            f"fill-opacity='.62'><title>patch {patch}: expert {expert}</title></rect>"
            for patch, expert in enumerate(expert_PM[:, number].tolist())
        )
        maps.append(_map(picture, grid, f"layer {layer}", tints))
    return f"{_legend(colours)}<div class='maps'>{''.join(maps)}</div>"


def show_words(words: Sequence[str], choices: TowerChoices | None, model: str) -> str:
    """Pieces of a text, and below each its first choice in every layer."""
    if choices is None:
        return DENSE.format(tower="text", model=escape(model))
    colours = expert_colours(choices.num_experts)
    expert_RM = choices.shown[0][1]
    head = "".join(f"<th>{escape(word)}</th>" for word in words)
    lines = "".join(
        f"<tr><th>layer {layer}</th>{_cells(expert_RM[:, number].tolist(), colours)}</tr>"
        for number, layer in enumerate(choices.layers)
    )
    return (
        f"{_legend(colours)}<div class='words'><table><tr><th></th>{head}</tr>{lines}</table></div>"
    )


def _bars(title: str, rows: Iterable[tuple[str, float]], form: str, whole: float) -> str:
    lines = "".join(
        f"<span>{escape(name)}</span><div><i style='width:{100 * max(0.0, value) / whole:.1f}%'></i></div>"
        f"<b>{form.format(value)}</b>"
        for name, value in rows
    )
    return f"<div class='bars'><h3>{escape(title)}</h3>{lines}</div>"


def _map(picture: str, grid: Sequence[int], caption: str, tints: str) -> str:
    size = f"viewBox='0 0 {grid[1]} {grid[0]}'"
    return (
        f"<figure><svg {size} role='img' aria-label='{caption}'>{picture}{tints}</svg>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _cells(experts: Sequence[int], colours: Sequence[str]) -> str:
    return "".join(
        f"<td style='background:{colours[e]};color:{_ink_on(colours[e])}'>{e}</td>" for e in experts
    )


def _ink_on(colour: str) -> str:
    """Black or white, whichever can be read on a colour."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#fff" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else "#000"


def _legend(colours: Sequence[str]) -> str:
    names = (
        f"<span><i style='background:{colour}'></i>expert {e}{'' if e else ' (base)'}</span>"
        for e, colour in enumerate(colours)
    )
    return f"<div class='legend'>{''.join(names)}</div>"


def _url(pixels_HW3: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
