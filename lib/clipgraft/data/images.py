"""Images: bytes to RGB, and the two ways a picture becomes a square for the model.

Everything that opens a stored image goes through here, so that orientation tags, transparency, 16-bit greys and
palettes mean the same in every stage. Pictures are cropped first and resized once.
"""

from __future__ import annotations

import io
import math

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

# Stages have their own workers: OpenCV's inner threads would only fight with them.
cv2.setNumThreads(0)
# Pillow's guard is global and only warns; `open_image` takes the limit of the stage instead.
Image.MAX_IMAGE_PIXELS = None

SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")

_ORIENTATION = 0x0112  # EXIF tag
_ASPECT = (3 / 4, 4 / 3)  # of a random crop, width over height


class BadImage(ValueError):
    """An image that cannot be used: `reason` is one of a few words, `detail` the particulars."""

    def __init__(self, reason: str, detail: str) -> None:
        """Keep both parts apart; reasons are counted."""
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def open_image(data: bytes, max_megapixels: float = math.inf) -> Image.Image:
    """Read an image's header; its pixels are decoded later.

    Raises:
        BadImage: if it is no image, or larger than `max_megapixels`.
    """
    try:
        image = Image.open(io.BytesIO(data))
    except Exception as error:
        raise BadImage("undecodable", "the file is empty" if not data else _short(error)) from None
    width, height = image.size
    if width * height > max_megapixels * 1e6:
        raise BadImage(
            "too many pixels", f"{width}x{height}, more than {max_megapixels:g} megapixels"
        )
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode: upright, 8 bits, RGB, transparency on white, first frame.

    Raises:
        BadImage: if the pixels are damaged or missing.
    """
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip it to white
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow raises whatever its decoders raise
        raise BadImage("undecodable", _short(error)) from None


def shrink(data: bytes, short_side: int, quality: int, max_megapixels: float = math.inf) -> bytes:
    """JPEG bytes whose short side is at most `short_side`; never enlarges.

    A JPEG that is small enough, upright and of an ordinary colour space stays as it is, byte for byte.

    Raises:
        BadImage: if it cannot be decoded.
    """
    image = open_image(data, max_megapixels)
    is_small = min(image.size) <= short_side
    if is_small and image.format == "JPEG" and image.mode in ("RGB", "L") and _is_upright(image):
        return data
    pixels = np.asarray(to_rgb(image))
    if not is_small:
        height, width = pixels.shape[:2]
        scale = short_side / min(height, width)
        pixels = _resize(pixels, max(1, round(width * scale)), max(1, round(height * scale)))
    return bytes(
        simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=quality, colorspace="RGB")
    )


def decode(data: bytes) -> np.ndarray:
    """Pixels of an image that `index` has accepted: uint8 HWC RGB, upright.

    JPEGs take the fast way (the GIL is released), unless they say how they are to be turned.
    Recoverable damage, such as a missing end marker, is not an error.

    Raises:
        BadImage: if it cannot be decoded.
    """
    if data[:2] != b"\xff\xd8" or b"Exif\0" in data[:65536]:
        return np.asarray(to_rgb(open_image(data)))
    try:
        return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False))
    except ValueError:  # CMYK, or damage of which Pillow gives a better account
        return np.asarray(to_rgb(open_image(data)))


def random_resized_crop(
    pixels: np.ndarray, size: int, scale: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """A random part of the picture as a square of `size` pixels.

    The share of the area is uniform in `scale`; width over height is log-uniform in 3/4..4/3 as far as the
    picture has room for it. Unlike torchvision's, no draw is thrown away, so an item takes four numbers always.

    Args:
        pixels: uint8 HWC.
        size: side of the square.
        scale: range of the share of the area; (1, 1) is the middle square.
        rng: four numbers are drawn.
    """
    if scale[0] >= 1:
        return resize_center(pixels, size)
    height, width = pixels.shape[:2]
    share, shape, across, down = rng.random(4)
    area = width * height * (scale[0] + share * (scale[1] - scale[0]))
    # With this area, width <= W and height <= H hold for these aspects.
    low, high = max(area / height**2, _ASPECT[0]), min(width**2 / area, _ASPECT[1])
    if low <= high:
        aspect = low * (high / low) ** shape
        crop_width, crop_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
    else:  # a banner: the largest part of a bearable aspect
        aspect = min(max(width / height, _ASPECT[0]), _ASPECT[1])
        crop_width, crop_height = min(width, height * aspect), min(height, width / aspect)
    crop_width, crop_height = (
        min(width, max(1, round(crop_width))),
        min(height, max(1, round(crop_height))),
    )
    left, top = int(across * (width - crop_width + 1)), int(down * (height - crop_height + 1))
    return _resize(pixels[top : top + crop_height, left : left + crop_width], size, size)


def resize_center(pixels: np.ndarray, size: int) -> np.ndarray:
    """The middle square of the picture, `size` pixels wide."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return _resize(pixels[top : top + side, left : left + side], size, size)


def _resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    if pixels.shape[:2] == (height, width):
        return pixels
    shrinks = pixels.shape[0] * pixels.shape[1] > width * height
    # Averaging areas is what keeps a smaller picture free of moire.
    return cv2.resize(
        pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    )


def _is_upright(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) == 1
    except Exception:  # broken metadata: decoding decides
        return False


def _short(error: Exception) -> str:
    text = str(error).split("<_io", 1)[0].strip() or type(error).__name__
    return text[:200]
