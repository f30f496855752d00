"""Laws of opening, shrinking and cropping images. Oracle: Pillow, and arithmetic."""

import io

import numpy as np
import open_clip
import pytest
from pictures import encoded, jpeg
from PIL import Image

from clipgraft.data.images import (
    BadImage,
    decode,
    decode_whole,
    open_image,
    prepare,
    shrink,
    to_rgb,
)


def test_decode_agrees_with_pillow():
    data = jpeg()
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int)
    assert np.abs(decode(data).astype(int) - theirs).max() <= 2


def test_grey_images_have_three_equal_channels():
    pixels = decode(encoded(Image.new("L", (8, 8), 77), "JPEG"))
    assert pixels.shape == (8, 8, 3) and (pixels == 77).all()


def test_sixteen_bit_grey_keeps_its_shades():
    ramp = np.linspace(0, 65535, 16, dtype=np.uint16).reshape(4, 4)
    pixels = np.asarray(to_rgb(open_image(encoded(Image.fromarray(ramp), "PNG"))))
    np.testing.assert_array_equal(pixels[..., 0], ramp >> 8)


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(to_rgb(open_image(encoded(image, "PNG")))).min() == 255


@pytest.mark.parametrize("tag", [3, 6, 8])
def test_orientation_tags_are_obeyed_by_every_way_in(tag):
    upright = Image.open(io.BytesIO(jpeg(48, 32)))
    turn = {
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = tag
    stored = encoded(upright.transpose(turn[tag]), "JPEG", quality=98, exif=exif)
    expected = np.asarray(upright, int)
    for pixels in (
        decode(stored),
        decode(shrink(stored, 32, 98)),
        np.asarray(to_rgb(open_image(stored))),
    ):
        assert pixels.shape == expected.shape
        assert np.abs(pixels.astype(int) - expected).mean() < 4


def _turned_by_xmp(xmp: bytes) -> bytes:
    return jpeg(48, 32, xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/">' + xmp + b"</x:xmpmeta>")


def _turned_behind(segments: bytes) -> bytes:
    """A JPEG with these bytes before its EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(48, 32, exif=exif)
    place = data.index(b"\xff\xe1")
    return data[:place] + segments + data[place:]


@pytest.mark.parametrize(
    "stored",
    [
        _turned_by_xmp(b'<rdf:Description tiff:Orientation="6"/>'),
        _turned_by_xmp(b"<tiff:Orientation>6</tiff:Orientation>"),
        _turned_behind(2 * (b"\xff\xe2" + (60_002).to_bytes(2, "big") + bytes(60_000))),
        _turned_behind(b"\xff\xff"),  # bytes that only fill
    ],
)
def test_whatever_turns_a_jpeg_turns_it_in_every_way_in(stored):
    by_pillow = np.asarray(to_rgb(open_image(stored)))
    assert by_pillow.shape == (48, 32, 3)
    assert np.array_equal(decode(stored), by_pillow)
    assert np.array_equal(decode_whole(stored), by_pillow)
    assert decode(shrink(stored, 32, 98)).shape == by_pillow.shape


def test_jpegs_that_nothing_turns_are_decoded_the_fast_way(monkeypatch):
    stored = [jpeg(), jpeg(icc_profile=bytes(150_000)), _turned_by_xmp(b"<dc:title/>")]
    expected = [decode_whole(data) for data in stored]
    monkeypatch.setattr("clipgraft.data.images.to_rgb", None)
    for data, pixels in zip(stored, expected, strict=True):
        assert np.array_equal(decode(data), pixels)


def test_small_jpegs_keep_their_bytes():
    data = jpeg(40, 30)
    assert shrink(data, 30, 50) == data


@pytest.mark.parametrize(
    ("size", "short_side", "expected"), [((60, 30), 20, (40, 20)), ((10, 50), 20, (10, 50))]
)
def test_shrinking_keeps_the_aspect_and_never_enlarges(size, short_side, expected):
    png = encoded(Image.new("RGB", size, "teal"), "PNG")
    image = Image.open(io.BytesIO(shrink(png, short_side, 95)))
    assert (image.format, image.size) == ("JPEG", expected)


def test_shrinking_averages_what_it_drops():
    checkers = np.indices((64, 64)).sum(axis=0) % 2 * 255
    png = encoded(Image.fromarray(checkers.astype(np.uint8)), "PNG")
    pixels = decode(shrink(png, 32, 100))
    assert np.abs(pixels.astype(int) - 127).max() <= 2


def test_huge_images_are_refused_by_their_header():
    png = encoded(Image.new("1", (2000, 1000)), "PNG")
    with pytest.raises(BadImage, match="too many pixels: 2000x1000"):
        open_image(png, max_megapixels=1.9)
    assert open_image(png, max_megapixels=2.0).size == (2000, 1000)


@pytest.mark.parametrize(
    "data", [b"", b"<html>404</html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_what_is_no_image_is_undecodable(data):
    with pytest.raises(BadImage) as caught:
        decode_whole(data)
    assert caught.value.reason == "undecodable"


def photo(seed=0) -> Image.Image:
    """Smooth noise with grain, so that every byte of its file tells of some pixels."""
    smooth = np.asarray(Image.open(io.BytesIO(jpeg(80, 60, seed))), int)
    grain = np.random.default_rng(seed).integers(-20, 21, smooth.shape)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


WHOLE = {
    "jpeg": encoded(photo(), "JPEG", quality=90),
    "progressive": encoded(photo(), "JPEG", quality=90, progressive=True),
    "cmyk": encoded(photo().convert("CMYK"), "JPEG", quality=90),
    "png": encoded(photo(), "PNG"),
    "palette": encoded(photo().quantize(64), "PNG"),
    "gif": encoded(photo().quantize(64), "GIF"),
    "webp": encoded(photo(), "WEBP"),
    "lossless webp": encoded(photo(), "WEBP", lossless=True),
    "bmp": encoded(photo(), "BMP"),
    "tiff": encoded(photo(), "TIFF"),
}
# Bytes at the end that hold no pixels: end markers, and PNG's checksum and end chunk.
SPARE = {"jpeg": 2, "cmyk": 2, "png": 21, "palette": 21, "gif": 2}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", WHOLE)
def test_an_image_that_ends_early_is_never_taken_for_whole(kind):
    data = WHOLE[kind]
    pixels = decode_whole(data)
    for length in [*range(16, len(data), 41), *range(len(data) - 30, len(data))]:
        if len(data) - length <= SPARE.get(kind, 0):
            np.testing.assert_array_equal(decode_whole(data[:length]), pixels)
            np.testing.assert_array_equal(decode(data[:length]), decode(data))
        else:
            with pytest.raises(BadImage) as caught:
                decode_whole(data[:length])
            is_told = kind != "tiff" or length > 200  # its header does not say how long it is
            assert caught.value.reason == "truncated" or not is_told, length


def test_a_later_frame_may_be_missing():
    frames = [photo(seed).quantize(64) for seed in range(2)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_whole(data[: len(data) * 3 // 4]), decode_whole(data))


@pytest.mark.parametrize("progressive", [False, True])
def test_bytes_missing_inside_a_jpeg_are_mostly_seen(progressive):
    rng, num_seen = np.random.default_rng(0), 0
    for seed in range(40):
        data = encoded(photo(seed), "JPEG", quality=90, progressive=progressive)
        first = rng.integers(len(data) // 3, len(data) // 2)
        try:
            decode_whole(data[:first] + bytes(300) + data[first + 300 :])
        except BadImage:
            num_seen += 1
    assert num_seen >= 30


def test_harmless_bytes_beside_the_pixels_lose_no_jpeg():
    data = WHOLE["jpeg"]
    tables = data.index(b"\xff\xdb")
    for other in (
        data + bytes(99),
        data + b"junk",
        data[:tables] + b"\0\0\0" + data[tables:],
        data[:-2] + bytes(500) + data[-2:],
        data[:-2] + b"abc" + data[-2:],
    ):
        np.testing.assert_array_equal(decode_whole(other), decode_whole(data))


@pytest.mark.parametrize("kind", WHOLE)
def test_all_ways_in_give_the_same_pixels(kind):
    theirs = np.asarray(Image.open(io.BytesIO(WHOLE[kind])).convert("RGB"), int)
    limit = 1 if kind == "cmyk" else 0
    for pixels in (decode_whole(WHOLE[kind]), decode(WHOLE[kind])):
        assert np.abs(pixels.astype(int) - theirs).max() <= limit


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_range_are_refused(mode):
    tiff = encoded(Image.new(mode, (20, 20), 1), "TIFF")
    with pytest.raises(BadImage, match=f"undecodable.*mode {mode}"):
        decode_whole(tiff)


def test_formats_that_are_programs_are_not_opened():
    with pytest.raises(BadImage, match="undecodable"):
        open_image(encoded(Image.new("RGB", (20, 20)), "EPS"))


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (11, 13), (24, 24), (50, 24)])
def test_pictures_are_prepared_as_in_open_clip_to_the_pixel(shape, resize_mode, interpolation):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    transform = open_clip.image_transform(
        24,
        is_train=False,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        resize_mode=resize_mode,
        interpolation=interpolation,
    )
    theirs = (transform(Image.fromarray(pixels)).permute(1, 2, 0).numpy() * 255).round()
    np.testing.assert_array_equal(prepare(pixels, 24, resize_mode, interpolation), theirs)
