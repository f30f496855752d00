"""Images: bytes to RGB, smaller copies to store, and the squares that evaluation shows a model.

Everything that opens a stored image goes through here, so that orientation tags, transparency, 16-bit greys and
palettes mean the same in every stage. Pictures are cropped first and resized once.
"""

from __future__ import annotations

import io
import re
from contextlib import suppress

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

# Stages have their own workers: OpenCV's inner threads would only fight with them.
cv2.setNumThreads(0)
# Pillow's guard is global and only warns; `open_image` takes the limit of the stage instead.
Image.MAX_IMAGE_PIXELS = None

MAX_MEGAPIXELS = 200.0  # a small file can claim to be a huge picture; no setting allows more

SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")

# Pillow knows more, among them formats that are programs (EPS) or have had holes.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_ORIENTATION = 0x0112  # EXIF tag
_START, _END = b"\xff\xd8", b"\xff\xd9"  # of a JPEG
# libjpeg's warnings of wrong bytes among the pixels; of bytes too many in the header it warns as well.
_DAMAGE = re.compile(r"Huffman|before marker 0x(?:da|c4|d[0-7])")
_EXTRA = re.compile(r"(\d+) extraneous bytes before marker 0xd9")


class BadImage(ValueError):
    """An image that cannot be used: `reason` is one of a few words, `detail` the particulars."""

    def __init__(self, reason: str, detail: str) -> None:
        """Keep both parts apart; reasons are counted."""
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def open_image(data: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """Read an image's header; its pixels are decoded later.

    Raises:
        BadImage: if it is no image, its header ends early, or it is larger than `max_megapixels`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Exception as error:
        raise _bad(_short(error) if data else "the file is empty", data) from None
    width, height = image.size
    if width * height > max_megapixels * 1e6:
        raise BadImage(
            "too many pixels", f"{width}x{height}, more than {max_megapixels:g} megapixels"
        )
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode: upright, 8 bits, RGB, transparency on white, first frame.

    Raises:
        BadImage: if the pixels are damaged or missing, or of a kind whose white is not known.
    """
    if image.mode in ("I", "F"):
        raise BadImage("undecodable", f"its pixels are numbers without a range (mode {image.mode})")
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip it to white
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow raises whatever its decoders raise
        raise _bad(_short(error)) from None


def decode_whole(data: bytes) -> np.ndarray:
    """Pixels of an image of which nothing is missing: uint8 HWC RGB, upright; the same as `decode` gives.

    A JPEG must hold all its pixels; that it lacks its end marker alone is forgiven, unless it is progressive,
    since later passes may be missing then. Of other formats the first picture must be whole. Wrong bytes in the
    middle show where the format has a checksum (PNG) or where libjpeg loses its way, which is mostly, not always.

    Raises:
        BadImage: `undecodable`, `truncated` or `too many pixels`.
    """
    image = open_image(data)
    if image.format in ("JPEG", "MPO"):
        pixels, data = _whole_jpeg(data, bool(image.info.get("progressive")))
        if pixels is not None and image.mode in ("RGB", "L") and _is_upright(image):
            return pixels
        image = open_image(data)
    try:
        return np.asarray(to_rgb(image))
    except BadImage as error:
        raise _bad(error.detail, data) from None


def shrink(data: bytes, short_side: int, quality: int) -> bytes:
    """JPEG bytes whose short side is at most `short_side`; never enlarges.

    A JPEG that is small enough, upright and of an ordinary colour space stays as it is, byte for byte; if it lacks
    its end marker it is given one, which other programs insist on.

    Raises:
        BadImage: if it cannot be decoded.
    """
    image = open_image(data)
    is_small = min(image.size) <= short_side
    if is_small and image.format == "JPEG" and image.mode in ("RGB", "L") and _is_upright(image):
        is_open = _END not in data[-64:] and not image.info.get("progressive")
        return data + _END if is_open else data
    pixels = decode_whole(data)
    if not is_small:
        height, width = pixels.shape[:2]
        scale = short_side / min(height, width)
        pixels = _resize(pixels, max(1, round(width * scale)), max(1, round(height * scale)))
    return bytes(
        # Half the colour resolution, as cameras store it: decoding takes a quarter less time.
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420"
        )
    )


def decode(data: bytes) -> np.ndarray:
    """Pixels of an image that `index` has accepted: uint8 HWC RGB, upright.

    JPEGs take the fast way (the GIL is released), unless they say how they are to be turned.
    A missing end marker is not an error.

    Raises:
        BadImage: if it cannot be decoded.
    """
    if data[:2] != _START:
        return np.asarray(to_rgb(open_image(data)))
    if not _may_be_turned(data):
        with suppress(ValueError, KeyError):  # Pillow gives a better account of damage
            height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False)
            if height * width <= MAX_MEGAPIXELS * 1e6:
                return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False))
    return np.asarray(to_rgb(open_image(data + _END)))


def prepare(pixels: np.ndarray, size: int, resize_mode: str, interpolation: str) -> np.ndarray:
    """A picture as open_clip prepares it for evaluation, to the pixel.

    Args:
        pixels: uint8 HWC RGB.
        size: side of the square.
        resize_mode: `shortest`: the short side is resized, and the middle taken; `squash`: both sides are.
        interpolation: `bicubic` or `bilinear`, both with antialias.

    Returns:
        uint8 [size, size, 3].
    Raises:
        BadImage: if it is so narrow that its whole length at that size would be too many pixels.
    """
    height, width = pixels.shape[:2]
    if resize_mode == "squash":
        target = (size, size)
    else:
        assert resize_mode == "shortest", resize_mode
        short = min(width, height)
        target = (int(size * width / short), int(size * height / short))
        if target[0] * target[1] > MAX_MEGAPIXELS * 1e6:
            raise BadImage("too many pixels", f"{width} x {height} at {size} pixels a side")
    image = Image.fromarray(pixels).resize(target, Image.Resampling[interpolation.upper()])
    left, top = (round((side - size) / 2) for side in target)
    return np.asarray(image)[top : top + size, left : left + size]


def _resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    if pixels.shape[:2] == (height, width):
        return pixels
    shrinks = pixels.shape[0] * pixels.shape[1] > width * height
    # Averaging areas is what keeps a smaller picture free of moire.
    return cv2.resize(
        pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    )


def _whole_jpeg(data: bytes, is_progressive: bool) -> tuple[np.ndarray | None, bytes]:
    """Pixels of a JPEG as they are stored, if libjpeg has nothing to say, and its bytes with an end marker."""
    complaint = ""
    for candidate in (data,) if is_progressive else (data, data + _END):
        try:
            pixels = simplejpeg.decode_jpeg(candidate, colorspace="RGB", strict=True)
            return np.asarray(pixels), candidate
        except ValueError as error:
            complaint = str(error)
        if "Premature end" not in complaint:
            break
    if "remature end" in complaint:  # of the file, or of the pixels before the end marker
        raise BadImage("truncated", f"libjpeg: {complaint}")
    if _DAMAGE.search(complaint) or _is_left_over(data, _EXTRA.search(complaint)):
        raise _bad(f"libjpeg: {complaint}", data)
    return None, data  # Pillow decides


def _may_be_turned(data: bytes) -> bool:
    """Whether a JPEG has EXIF or an orientation in XMP before its pixels, by which Pillow turns it; also if unsure."""
    place = len(_START)
    while data[place : place + 1] == b"\xff":
        marker, size = data[place + 1 : place + 2], data[place + 2 : place + 4]
        if marker == b"\xda":  # pixels follow
            return False
        if not (b"\xc0" <= marker < b"\xd0" or b"\xda" < marker < b"\xff"):  # it has no size
            return True
        end = place + 2 + int.from_bytes(size, "big")
        if marker == b"\xe1":
            segment = data[place + 4 : end]
            if segment.startswith(b"Exif\0") or b"tiff:Orientation" in segment:
                return True
        place = end
    return True


def _is_upright(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) == 1
    except Exception:  # broken metadata: decoding decides
        return False


def _is_left_over(data: bytes, extra: re.Match[str] | None) -> bool:
    """Whether the bytes between the last pixel and the end are pixels for which there was no place left.

    Cameras leave a few bytes there, or fill up with one value; wrong bytes in the middle that decode to more
    pixels than the right ones leave what they have displaced.
    """
    num = int(extra[1]) if extra else 0
    return num > 32 and len(set(data[: data.rfind(_END)][-num:])) > 1


def _bad(detail: str, data: bytes = b"") -> BadImage:
    """What a complaint of Pillow about these bytes means."""
    is_truncated = "truncated" in detail.lower() or _ends_early(data)
    return BadImage("truncated" if is_truncated else "undecodable", detail)


def _ends_early(data: bytes) -> bool:
    """Whether a file that could not be decoded lacks its end, by what its format says of it (TIFF says nothing)."""
    if data[:3] == _START + b"\xff":
        return _END not in data[-64:]
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return b"IEND" not in data[-64:]
    if data[:4] == b"GIF8":
        return not data.rstrip(b"\0").endswith(b";")
    if data[:4] == b"RIFF":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if data[:2] == b"BM":
        return len(data) < int.from_bytes(data[2:6], "little")
    return False


def _short(error: Exception) -> str:
    text = str(error).split("<_io", 1)[0].strip() or type(error).__name__
    return text[:200]
