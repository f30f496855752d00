"""Laws of opening, shrinking and cropping images. Oracle: Pillow, and arithmetic."""

import io

import numpy as np
import pytest
from pictures import encoded, jpeg
from PIL import Image

from clipgraft.data.images import (
    BadImage,
    decode,
    open_image,
    random_resized_crop,
    resize_center,
    shrink,
    to_rgb,
)


class Draws:
    """A generator whose next numbers are known."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def random(self, count):
        assert count == len(self.numbers)
        return np.array(self.numbers)


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


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", jpeg()[:-200]])
def test_what_is_no_whole_image_is_a_bad_image(data):
    with pytest.raises(BadImage) as caught:
        to_rgb(open_image(data))
    assert caught.value.reason == "undecodable"


def test_a_jpeg_without_its_end_marker_is_still_read():
    assert decode(jpeg()[:-2]).shape == (30, 40, 3)


def test_center_crop_takes_the_middle_square():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    assert (resize_center(pixels, 5) == 200).all()


def test_a_crop_keeps_the_share_of_the_area_that_was_drawn():
    columns = np.arange(100, dtype=np.uint8)
    pixels = np.broadcast_to(columns[None, :, None], (100, 100, 3))
    # Middle of the range of shapes is a square; of area 0.25 + 0.5 * 0.5 = 0.5, its side is 71 of 100.
    crop = random_resized_crop(pixels, 71, (0.25, 0.75), Draws(0.5, 0.5, 0.0, 0.0))
    np.testing.assert_array_equal(crop[0, :, 0], columns[:71])
    crop = random_resized_crop(pixels, 71, (0.25, 0.75), Draws(0.5, 0.5, 0.999, 0.0))
    np.testing.assert_array_equal(crop[0, :, 0], columns[29:])


@pytest.mark.parametrize("shape", [(1, 1), (7, 90), (90, 7), (33, 32)])
def test_any_picture_can_be_cropped(shape):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    for _ in range(50):
        assert random_resized_crop(pixels, 16, (0.1, 1.0), rng).shape == (16, 16, 3)


def test_a_scale_of_one_turns_random_crops_off():
    pixels = decode(jpeg())
    crop = random_resized_crop(pixels, 16, (1.0, 1.0), np.random.default_rng(0))
    np.testing.assert_array_equal(crop, resize_center(pixels, 16))
