"""Shapes: the built-in data set, one decorated object per picture, drawn on demand.

It exists so that the whole pipeline runs on a laptop without a download, and so that what a model
has learnt can be read off attribute by attribute. Three decisions shaped it:

- The attributes are graded. Colour is easy (saturated, well separated hues), shape is medium (an
  outline, moved and slightly turned), texture is hard (a fine pattern under noise). Plain
  contrastive learning takes them in this order, and experts are grown to mend that. The idea is
  that of the Trifeature pictures of Hermann & Lampinen (arXiv:2006.12433).
- Size, position and background are there for the captions. Without them a batch holds many pairs
  with equal captions, and InfoNCE takes each for a negative of the other.
- A sample is a pure function of (seed, split, i): no state, no files, any order, any number of
  processes.

What is true of a picture is drawn here, and what is said of it; how it is painted is in `drawing`.
"""

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

from clipgraft.data.drawing import draw_picture

# Canonical values: the class names of zero-shot classification, and words of the captions.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink"),
    "shape": ("circle", "square", "triangle", "pentagon", "star", "heart", "cross", "crescent"),
    "texture": ("plain", "striped", "dotted", "checkered", "zigzag", "tiled"),
    "size": ("small", "large"),
    "position": ("left", "right", "top", "bottom", "centre"),
    "background": ("cream", "grey", "sky", "mint"),
}

# How often a caption speaks of an attribute. Easy ones are said less often: what they settle in a
# batch is taken from the pressure to learn the hard ones.
DEFAULT_MENTION: dict[str, float] = {
    "colour": 1.0,
    "shape": 1.0,
    "texture": 1.0,
    "size": 0.6,
    "position": 1.0,
    "background": 0.25,
}
DEFAULT_NOISE = 0.03  # standard deviation, pixel values being 0 to 1

# Places in this tuple, and these numbers, enter the random streams: append, never reorder.
SPLITS = ("train", "renders", "combinations")
_PICTURE_STREAM, _CAPTION_STREAM, _HELD_OUT_STREAM = 1, 2, 3

_TEMPLATES = (
    "a {size} {texture} {colour} {shape} {position} {background}",
    "a {texture} {size} {colour} {shape} {background} {position}",
    "a {size} {colour} {shape} {with_texture} {position} {background}",
    "{background} a {size} {texture} {colour} {shape} {position}",
    "{position} a {size} {colour} {shape} {with_texture} {background}",
)
# What a caption may say instead of the canonical word, which it says at least half of the time.
_SYNONYMS = {
    "red": ("crimson", "scarlet"),
    "orange": ("tangerine",),
    "yellow": ("golden",),
    "green": ("emerald",),
    "teal": ("turquoise",),
    "blue": ("azure",),
    "purple": ("violet",),
    "pink": ("magenta",),
    "circle": ("disc",),
    "square": ("box",),
    "cross": ("plus",),
    "crescent": ("moon",),
    "plain": ("solid",),
    "striped": ("lined",),
    "dotted": ("spotted",),
    "checkered": ("checked",),
    "zigzag": ("chevron",),
    "tiled": ("grid",),
    "small": ("little", "tiny"),
    "large": ("big", "huge"),
    "grey": ("gray",),
}
_UNSAID_SHAPE = ("shape", "figure")
_TEXTURE_NOUNS = {
    "plain": "without pattern",
    "striped": "with stripes",
    "dotted": "with dots",
    "checkered": "with checks",
    "zigzag": "with chevrons",
    "tiled": "with tiles",
}
_POSITION_PHRASES = {
    "left": ("at the left", "on the left"),
    "right": ("at the right", "on the right"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "centre": ("at the centre", "in the middle"),
}
_BACKGROUND_PHRASES = ("on a {} background", "on {}", "against {}")


T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """A picture, what is said of it and what is true of it."""

    image: Image.Image
    captions: list[str]
    attributes: dict[str, str]  # attribute -> canonical value


def draw_sample(
    seed: int,
    split: str,
    i: int,
    *,
    image_size: int = 64,
    noise: float = DEFAULT_NOISE,
    mention: Mapping[str, float] = DEFAULT_MENTION,
    num_captions: int = 1,
) -> Sample:
    """Draws the i-th sample of a split, the same one every time.

    Args:
        seed: names the data set, and so decides which combinations are held out.
        split: "train"; "renders", new pictures of combinations that train has; "combinations",
            pictures of colour x shape x texture combinations that train does not have.
        i: place in the split, which has no end.
        image_size: width and height in pixels; changes no attribute and no caption.
        noise: standard deviation of the pixel noise, pixel values being 0 to 1.
        mention: attribute -> how often a caption speaks of it; attributes left out keep their
            default.
        num_captions: asking for more keeps the first ones.

    Raises:
        ValueError: for an unknown split or attribute, or a probability outside 0 to 1.
    """
    mention = _complete_mention(mention)
    address = (seed, _split_id(split), i)
    rng = np.random.default_rng([*address, _PICTURE_STREAM])
    attributes = _draw_attributes(combinations_of(seed, split), rng)
    image = draw_picture(attributes, rng, image_size=image_size, noise=noise)
    # Captions have a stream of their own: what is said never changes what is drawn.
    rng = np.random.default_rng([*address, _CAPTION_STREAM])
    captions = [describe(attributes, mention, rng) for _ in range(num_captions)]
    return Sample(image, captions, attributes)


@functools.lru_cache(maxsize=16)
def combinations_of(seed: int, split: str) -> tuple[tuple[str, str, str], ...]:
    """The (colour, shape, texture) combinations that a split draws from.

    One in eight is held out: where the shuffled numbers of the three values sum to 0 modulo 8.
    Every colour with every shape then lacks at most one texture, and so on round: train has every
    pair of values, and each value is held out equally often (a cut Latin square).
    """
    rng = np.random.default_rng([seed, _HELD_OUT_STREAM])
    names = [ATTRIBUTES[attribute] for attribute in ("colour", "shape", "texture")]
    shuffled = [rng.permutation(8) for _ in names]
    wants_held_out = _split_id(split) == _split_id("combinations")
    return tuple(
        (names[0][c], names[1][s], names[2][t])
        for c, s, t in itertools.product(*(range(len(values)) for values in names))
        if ((shuffled[0][c] + shuffled[1][s] + shuffled[2][t]) % 8 == 0) == wants_held_out
    )


def zero_shot_templates(attribute: str) -> list[str]:
    """Prompts that classify one attribute, with ``{c}`` where its canonical value goes.

    Each names one value of a second attribute; averaging the prompts averages that one out.

    Raises:
        ValueError: for an unknown attribute.
    """
    shapes, colours = ATTRIBUTES["shape"], ATTRIBUTES["colour"]
    match attribute:
        case "colour" | "texture" | "size":
            return [f"a {{c}} {shape}" for shape in shapes]
        case "shape":
            return [_with_article(f"a {colour} {{c}}") for colour in colours]
        case "position":
            return [f"a {shape} at the {{c}}" for shape in shapes]
        case "background":
            return [f"a {shape} on a {{c}} background" for shape in shapes]
    raise ValueError(
        f"shapes has no attribute {attribute!r}.\nHint: it has {', '.join(ATTRIBUTES)}."
    )


def describe(
    attributes: Mapping[str, str], mention: Mapping[str, float], rng: np.random.Generator
) -> str:
    """Says in a few words what the picture shows: at most 13, and no punctuation."""
    said = {name: value for name, value in attributes.items() if rng.random() < mention[name]}
    word = {name: _say(value, rng) for name, value in said.items()}
    slots = {name: word.get(name, "") for name in ("colour", "texture", "size")}
    slots["shape"] = word.get("shape") or _pick(_UNSAID_SHAPE, rng)
    slots["with_texture"] = _TEXTURE_NOUNS[said["texture"]] if "texture" in said else ""
    slots["position"] = slots["background"] = ""
    if "position" in said:
        slots["position"] = _pick(_POSITION_PHRASES[said["position"]], rng)
    if "background" in said:
        slots["background"] = _pick(_BACKGROUND_PHRASES, rng).format(word["background"])
    words = _pick(_TEMPLATES, rng).format(**slots).split()
    return _with_article(" ".join(words))


# --- attributes and words -------------------------------------------------------------------------


def _split_id(split: str) -> int:
    if split not in SPLITS:
        raise ValueError(f"shapes has no split {split!r}.\nHint: it has {', '.join(SPLITS)}.")
    return SPLITS.index(split)


def _complete_mention(mention: Mapping[str, float]) -> dict[str, float]:
    for attribute, probability in mention.items():
        if attribute not in ATTRIBUTES:
            raise ValueError(
                f"mention names {attribute!r}, which shapes does not have.\n"
                f"Hint: it has {', '.join(ATTRIBUTES)}."
            )
        if not 0.0 <= probability <= 1.0:
            raise ValueError(
                f"mention of {attribute!r} is {probability}.\nHint: it is a probability, 0 to 1."
            )
    return {**DEFAULT_MENTION, **mention}


def _draw_attributes(
    combinations: Sequence[tuple[str, str, str]], rng: np.random.Generator
) -> dict[str, str]:
    colour, shape, texture = _pick(combinations, rng)
    return {
        "colour": colour,
        "shape": shape,
        "texture": texture,
        **{name: _pick(ATTRIBUTES[name], rng) for name in ("size", "position", "background")},
    }


def _pick(choices: Sequence[T], rng: np.random.Generator) -> T:
    return choices[int(rng.integers(len(choices)))]


def _say(value: str, rng: np.random.Generator) -> str:
    synonyms = _SYNONYMS.get(value, ())
    return _pick(synonyms, rng) if synonyms and rng.random() < 0.25 else value


def _with_article(caption: str) -> str:
    return re.sub(r"\ba (?=[aeiou])", "an ", caption)
