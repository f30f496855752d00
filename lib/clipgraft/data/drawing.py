"""Drawing: how the objects of `shapes` are painted; angle, place, hue and light are up to chance.

Lengths are in units of a canvas 64 units wide, whatever the image size in pixels.
"""

import math
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

_CANVAS = 64.0
_SUPERSAMPLING = 4  # of the outline; textures are antialiased by formula

_HUE_DEGREES = {
    "red": 2,
    "orange": 26,
    "yellow": 50,
    "green": 125,
    "teal": 178,
    "blue": 217,
    "purple": 272,
    "pink": 325,
}
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


def draw_picture(
    attributes: Mapping[str, str],
    rng: np.random.Generator,
    *,
    image_size: int,
    noise: float,
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


# --- outlines -------------------------------------------------------------------------------------


def _ring(num_points: int, start_degrees: float = -90.0) -> np.ndarray:
    angles = np.radians(start_degrees) + np.arange(num_points) * (2 * np.pi / num_points)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


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
