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

Lengths are in units of a canvas 64 units wide, whatever the image size in pixels.
"""

import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

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

_CANVAS = 64.0
_SUPERSAMPLING = 4  # of the outline; textures are antialiased by formula

_HUE_DEGREES = dict(zip(ATTRIBUTES["colour"], (2, 26, 50, 125, 178, 217, 272, 325), strict=True))
# Close in tone: were they far apart, they would be most of what an untrained image tower sees, and
# contrastive learning would not get past them.
_BACKGROUND_RGB = {
    "cream": (0.93, 0.89, 0.80),
    "grey": (0.85, 0.86, 0.87),
    "sky": (0.80, 0.86, 0.94),
    "mint": (0.79, 0.90, 0.83),
}
_RADIUS = {"small": (13.0, 15.0), "large": (19.0, 21.0)}
# Where in the room that its outline leaves the object sits: -1 touches left or top.
_PLACE = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "centre": (0, 0)}

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
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


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


def draw_picture(
    attributes: Mapping[str, str],
    rng: np.random.Generator,
    *,
    image_size: int = 64,
    noise: float = DEFAULT_NOISE,
) -> Image.Image:
    """Draws an object with these attributes; angle, place, hue and light are up to chance."""
    outline = _place_outline(attributes, rng)
    mask = _rasterise(outline, image_size)
    # Blurring the mask tells how deep inside the object a pixel lies; it shades the rim.
    softness = 1.6 * image_size / _CANVAS
    depth = _as_floats(mask.filter(ImageFilter.GaussianBlur(softness)))[..., None]
    inside = _as_floats(mask)[..., None]

    axis = (np.arange(image_size, dtype=np.float32) + 0.5) * (_CANVAS / image_size)
    x, y = axis[None, :], axis[:, None]
    texture = _texture(attributes["texture"], x, y, rng)[..., None]
    paint, ink = _choose_paints(attributes["colour"], rng)
    surface = paint + texture * (ink - paint)
    centre_x, centre_y = outline.mean(axis=0)
    light = 1.0 - 0.006 * ((x - centre_x) + (y - centre_y))[..., None]
    surface = surface * light * (0.55 + 0.45 * depth)

    ground = _paint_background(attributes["background"], x, y, rng)
    shadow = np.roll(depth, round(2.0 * image_size / _CANVAS), axis=(0, 1))
    ground = ground * (1.0 - 0.35 * shadow)
    rim = np.clip(6.0 * depth - 0.6, 0.0, 1.0)  # white, as around a sticker
    ground = ground + rim * (0.97 - ground)
    pixels = ground + inside * (surface - ground)
    pixels += noise * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray((pixels.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8))


def sample_sheet(
    path: Path | str,
    *,
    seed: int = 0,
    split: str = "train",
    num_samples: int = 24,
    num_columns: int = 6,
    zoom: int = 2,
    image_size: int = 64,
    noise: float = DEFAULT_NOISE,
    mention: Mapping[str, float] = DEFAULT_MENTION,
) -> None:
    """Writes a contact sheet: the first pictures of a split, enlarged, over their captions."""
    font = ImageFont.load_default(size=11)
    picture, margin, text_height = zoom * image_size, 14, 62
    cell_width, cell_height = picture + margin, picture + text_height
    num_rows = math.ceil(num_samples / num_columns)
    size = (num_columns * cell_width + margin, num_rows * cell_height + margin)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i in range(num_samples):
        sample = draw_sample(seed, split, i, image_size=image_size, noise=noise, mention=mention)
        left = margin + i % num_columns * cell_width
        top = margin + i // num_columns * cell_height
        sheet.paste(sample.image.resize((picture, picture), Image.Resampling.NEAREST), (left, top))
        text = _wrap(sample.captions[0], picture, pen, font)
        pen.multiline_text((left, top + picture + 3), text, fill="#333333", font=font, spacing=2)
    sheet.save(path)


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


def _wrap(caption: str, width: int, pen: ImageDraw.ImageDraw, font: Font) -> str:
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font=font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


# --- outlines -------------------------------------------------------------------------------------


def _ring(num_points: int, radius: float = 1.0, start_degrees: float = -90.0) -> np.ndarray:
    angles = np.radians(start_degrees) + np.arange(num_points) * (2 * np.pi / num_points)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> np.ndarray:
    points = _ring(10)
    points[1::2] *= 0.46
    return points


def _heart() -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(angles) ** 3
    y = 13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)
    return np.stack([x, -y], axis=1)


def _cross() -> np.ndarray:
    arm = 0.36
    corner = np.array([[arm, -1.0], [arm, -arm], [1.0, -arm]])
    quarter_turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return np.concatenate([corner @ np.linalg.matrix_power(quarter_turn, k) for k in range(4)])


def _crescent() -> np.ndarray:
    horn = np.radians(48)  # where the two arcs meet, seen from the centre of the outer one
    outer = np.linspace(horn, 2 * np.pi - horn, 40)
    bite = np.array([math.cos(horn) + 0.30, 0.0])
    radius = math.hypot(0.30, math.sin(horn))
    half = math.atan2(math.sin(horn), -0.30)
    inner = np.linspace(2 * np.pi - half, half, 32)[1:-1]
    arcs = [
        np.stack([np.cos(outer), np.sin(outer)], axis=1),
        bite + radius * np.stack([np.cos(inner), np.sin(inner)], axis=1),
    ]
    return np.concatenate(arcs)


def _normalise(points: np.ndarray, stretch: float) -> np.ndarray:
    """Centres an outline on its box and gives it the area of a disc of radius `stretch`."""
    points = points - (points.min(axis=0) + points.max(axis=0)) / 2
    x, y = points.T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    scaled: np.ndarray = points * (stretch * math.sqrt(math.pi / area))
    return scaled


# Equal areas, so that size says nothing of shape; less for those that would grow too wide.
_OUTLINES = {
    "circle": _normalise(_ring(48), 0.96),
    "square": _normalise(_ring(4, start_degrees=-45), 0.96),
    "triangle": _normalise(_ring(3), 0.88),
    "pentagon": _normalise(_ring(5), 0.96),
    "star": _normalise(_star(), 0.84),
    "heart": _normalise(_heart(), 0.94),
    "cross": _normalise(_cross(), 0.90),
    "crescent": _normalise(_crescent(), 0.84),
}


def _place_outline(attributes: Mapping[str, str], rng: np.random.Generator) -> np.ndarray:
    angle = math.radians(rng.uniform(-6, 6))
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    points = _OUTLINES[attributes["shape"]] @ turn * rng.uniform(*_RADIUS[attributes["size"]])
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 2.0
    room = (_CANVAS - 2 * margin) - (high - low)
    place = np.array(_PLACE[attributes["position"]])
    jitter = np.where(place == 0, rng.uniform(-0.12, 0.12, 2), -place * rng.uniform(0, 0.25, 2))
    placed: np.ndarray = points - low + margin + room * (1 + place + jitter) / 2
    return placed


def _rasterise(outline: np.ndarray, image_size: int) -> Image.Image:
    fine = image_size * _SUPERSAMPLING
    mask = Image.new("L", (fine, fine))
    corners = (outline * (fine / _CANVAS)).ravel().tolist()
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    return mask.reduce(_SUPERSAMPLING)


# --- paint ----------------------------------------------------------------------------------------


def _as_floats(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255.0


def _texture(name: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How much ink is at each pixel, 0 to 1: a signed distance to the pattern's edge, softened."""
    pixel = _CANVAS / x.size
    angle, period = math.radians(rng.uniform(-15, 15)), rng.uniform(7.5, 8.5)
    phase_u, phase_v = rng.uniform(0, 1, 2)
    u = (x * math.cos(angle) + y * math.sin(angle)) / period + phase_u
    v = (y * math.cos(angle) - x * math.sin(angle)) / period + phase_v

    def soften(distance: np.ndarray) -> np.ndarray:
        ink: np.ndarray = np.clip(distance * (period / pixel) + 0.5, 0.0, 1.0)
        return ink

    match name:
        case "striped":
            return soften(0.25 - _to_nearest(u))
        case "dotted":
            return soften(0.33 - np.hypot(_to_nearest(u), _to_nearest(v)))
        case "checkered":
            across, along = (soften(0.5 * (0.5 - 2 * _to_nearest(w / 1.4)) * 1.4) for w in (u, v))
            differ: np.ndarray = across + along - 2 * across * along
            return differ
        case "zigzag":
            return soften(0.7 * (0.25 - _to_nearest(u + 0.9 * _to_nearest(v / 1.3))))
        case "tiled":
            return soften(0.13 - np.minimum(_to_nearest(u), _to_nearest(v)))
    assert name == "plain", name
    return np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=np.float32)


def _to_nearest(w: np.ndarray) -> np.ndarray:
    """Distance to the nearest whole number: a triangle wave from 0 to 1/2."""
    distance: np.ndarray = np.abs(w - np.rint(w))
    return distance


def _choose_paints(colour: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The paint of the object and the ink of its texture, a lighter tone of it."""
    hue = (_HUE_DEGREES[colour] + rng.uniform(-6, 6)) / 360.0
    saturation, value = rng.uniform(0.72, 0.92), rng.uniform(0.82, 0.98)
    channel = (np.array([5.0, 3.0, 1.0]) + hue * 6.0) % 6.0
    paint = value - value * saturation * np.clip(np.minimum(channel, 4.0 - channel), 0.0, 1.0)
    ink = paint + rng.uniform(0.55, 0.75) * (1.0 - paint)
    return paint.astype(np.float32), ink.astype(np.float32)


def _paint_background(
    name: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A muted tone that fades along a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    fade = ((x - _CANVAS / 2) * math.cos(angle) + (y - _CANVAS / 2) * math.sin(angle)) / _CANVAS
    tone = np.array(_BACKGROUND_RGB[name], dtype=np.float32) + np.float32(rng.uniform(-0.03, 0.03))
    return (tone * (1.0 + np.float32(rng.uniform(0.05, 0.12)) * fade[..., None])).astype(np.float32)
