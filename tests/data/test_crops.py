"""Laws of crops. Oracles: arithmetic, and Pillow's antialiased bicubic."""

import io
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from clipgraft.data.crops import center_boxes, cut, random_boxes
from clipgraft.data.images import decode


def boxes(width, height, scale, uniform):
    uniform_B4 = np.atleast_2d(np.asarray(uniform, float))
    ones = np.ones(len(uniform_B4))
    return random_boxes(width * ones, height * ones, uniform_B4, scale)


def test_a_crop_keeps_the_share_of_the_area_that_was_drawn():
    # Middle of the range of shapes is a square; of area 0.25 + 0.5 * 0.5 = 0.5, its side is 0.707.
    side = 0.5**0.5
    first, last = boxes(100, 100, (0.25, 0.75), [[0.5, 0.5, 0, 0], [0.5, 0.5, 1, 0.5]])
    np.testing.assert_allclose(first, [0, 0, side, side])
    np.testing.assert_allclose(last, [1 - side, (1 - side) / 2, 1, (1 + side) / 2])


@pytest.mark.parametrize(("width", "height"), [(512, 384), (100, 100), (3, 5), (30, 40)])
def test_areas_and_shapes_are_spread_over_their_ranges(width, height):
    box_B4 = boxes(width, height, (0.3, 0.6), np.random.default_rng(0).random((20_000, 4)))
    assert box_B4.min() >= 0 and box_B4.max() <= 1 + 1e-12
    across_B, down_B = box_B4[:, 2] - box_B4[:, 0], box_B4[:, 3] - box_B4[:, 1]
    share_B, aspect_B = across_B * down_B, across_B * width / (down_B * height)
    assert 0.3 - 1e-9 <= share_B.min() < 0.301 and 0.599 < share_B.max() <= 0.6 + 1e-9
    assert share_B.mean() == pytest.approx(0.45, abs=0.003)
    assert 0.75 - 1e-9 <= aspect_B.min() < 0.76 and 1.3 < aspect_B.max() <= 4 / 3 + 1e-9
    assert ((box_B4[:, 0] + box_B4[:, 2]) / 2).mean() == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 90), (90, 7), (33, 32), (2000, 1)])
def test_any_picture_can_be_cropped(width, height):
    pixels = np.full((height, width, 3), 200, np.uint8)
    out = np.empty((16, 16, 3), np.uint8)
    box_B4 = boxes(width, height, (0.1, 1.0), np.random.default_rng(0).random((200, 4)))
    assert np.isfinite(box_B4).all() and box_B4.min() >= 0 and box_B4.max() <= 1 + 1e-12
    for box in box_B4.tolist():
        out[:] = 0
        cut(pixels, box, out)
        assert (out == 200).all()


def test_a_banner_gives_the_largest_part_of_a_bearable_shape():
    left, top, right, bottom = boxes(900, 90, (0.8, 1.0), [0.3, 0.3, 0.5, 0.5])[0]
    assert (top, bottom) == (0, 1)
    assert (right - left) * 900 / 90 == pytest.approx(4 / 3)
    assert left + right == pytest.approx(1)


def test_a_scale_of_one_is_the_middle_square():
    np.testing.assert_allclose(boxes(30, 10, (1, 1), [0.1, 0.2, 0.3, 0.4]), [[1 / 3, 0, 2 / 3, 1]])
    np.testing.assert_allclose(center_boxes(np.array([10]), np.array([30])), [[0, 1 / 3, 1, 2 / 3]])


def test_the_part_in_the_box_is_cut_out():
    pixels = np.arange(40 * 30 * 3).reshape(30, 40, 3).astype(np.uint8)
    out = np.empty((10, 10, 3), np.uint8)
    cut(pixels, (0.25, 0.2, 0.5, 0.2 + 1 / 3), out)
    np.testing.assert_array_equal(out, pixels[6:16, 10:20])


def ssim(one, other):
    """Structural similarity of two pictures (Wang et al. 2004): Gaussian window, sigma 1.5, inner part."""
    x, y = one.astype(np.float64), other.astype(np.float64)

    def mean(z):
        return cv2.GaussianBlur(z, (11, 11), 1.5)[5:-5, 5:-5]

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    cov = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return (similar / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean()


def texture(seed):
    """Something like a photo: its spectrum falls as 1/f, and edges cut through it."""
    rng = np.random.default_rng(seed)
    fy, fx = np.meshgrid(np.fft.fftfreq(300), np.fft.fftfreq(400), indexing="ij")
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = 1
    planes = np.fft.fft2(rng.normal(size=(3, 300, 400))) / frequency
    planes = np.fft.ifft2(planes).real
    planes += (
        planes.std()
        * 2
        * (np.fft.ifft2(np.fft.fft2(rng.normal(size=(300, 400))) / frequency**2).real > 0)
    )
    planes = (planes - planes.mean()) / planes.std() * 50 + 128
    return planes.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def photos():
    folder = Path(os.environ.get("REALDATA", "")) / "flickr8k"
    if "REALDATA" not in os.environ or not folder.is_dir():
        pytest.skip("REALDATA, a folder of real image sets, is not set, or has no flickr8k")
    with tarfile.open(sorted(folder.glob("val-*.tar"))[0]) as tar:
        names = [member for member in tar if member.name.endswith(".jpg")][:40]
        return [decode(tar.extractfile(member).read()) for member in names]


@pytest.mark.parametrize("what", ["texture", "flickr8k"])
@pytest.mark.parametrize("shape", [1.0, 0.75, 1.33])
@pytest.mark.parametrize(
    "reduction", [0.8, 1.05, 1.2, 1.33, 1.44, 1.49, 1.51, 1.65, 1.8, 2, 2.3, 2.5, 2.9, 3.3, 4.5]
)
def test_a_crop_looks_like_pillows_antialiased_bicubic(what, shape, reduction):
    pictures = [texture(seed) for seed in range(4)] if what == "texture" else photos()
    similar = []
    for pixels in pictures:
        height, width = pixels.shape[:2]
        across, down = round((height - 12) * min(shape, 1)), round((height - 12) / max(shape, 1))
        left, top, size = 7, 5, round((across * down) ** 0.5 / reduction)
        out = np.empty((size, size, 3), np.uint8)
        box = (left / width, top / height, (left + across) / width, (top + down) / height)
        cut(pixels, box, out)
        part = Image.fromarray(pixels[top : top + down, left : left + across])
        theirs = np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))
        similar.append(ssim(out, theirs))
    assert np.mean(similar) >= 0.97
    assert min(similar) >= (0.97 if what == "flickr8k" else 0.955)


def test_a_plain_resize_would_not_pass():
    pixels = texture(0)[:288, :288]
    near = cv2.resize(pixels, (96, 96), interpolation=cv2.INTER_NEAREST)
    data = io.BytesIO()
    Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC).save(data, "PNG")
    assert ssim(near, np.asarray(Image.open(data))) < 0.9
