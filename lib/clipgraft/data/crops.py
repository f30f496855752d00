"""Crops: which part of a picture becomes the square of a sample, for whole batches, and cutting it out.

A box is in shares of the picture's width and height, so it means the same whatever size the picture is decoded to.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

_ASPECT = (3 / 4, 4 / 3)  # of a random crop, width over height

# How a crop is resized, by its reduction (geometric mean of the axes). Averaging areas would do for all, but takes
# three to four times as long; against Pillow's antialiased bicubic the SSIM of photos stays above 0.97 with each of
# these in its range (tests/data/test_crops.py, benchmarks/LOG.md).
_BLUR_FROM, _AREA_FROM = 1.55, 2.4


def random_boxes(
    width_B: np.ndarray, height_B: np.ndarray, uniform_B4: np.ndarray, scale: tuple[float, float]
) -> np.ndarray:
    """A random part of each picture.

    The share of the area is uniform in `scale`; width over height is log-uniform in 3/4..4/3 as far as the
    picture has room for it. Unlike torchvision's, no draw is thrown away, so a sample takes four numbers always.

    Args:
        width_B: of the pictures, in any unit.
        height_B: in the same unit.
        uniform_B4: numbers in [0, 1): share, aspect, place across, place down.
        scale: range of the share of the area; (1, 1) is the middle square.

    Returns:
        left, top, right, bottom in 0..1, float64 [B, 4].
    """
    if scale[0] >= 1:
        return center_boxes(width_B, height_B)
    share_B, shape_B, across_B, down_B = uniform_B4.T
    ratio_B = np.asarray(width_B, np.float64) / height_B
    area_B = scale[0] + share_B * (scale[1] - scale[0])  # of a picture with area 1
    # With this area, width <= 1 and height <= 1 hold for these aspects.
    low_B, high_B = (
        np.maximum(area_B * ratio_B, _ASPECT[0]),
        np.minimum(ratio_B / area_B, _ASPECT[1]),
    )
    aspect_B = low_B * (high_B / low_B) ** shape_B
    across, down = np.sqrt(area_B * aspect_B / ratio_B), np.sqrt(area_B * ratio_B / aspect_B)
    # A banner has no room: the largest part of a bearable aspect.
    is_banner_B = low_B > high_B
    aspect_B = ratio_B.clip(*_ASPECT)
    across = np.where(is_banner_B, aspect_B / ratio_B, across).clip(max=1)
    down = np.where(is_banner_B, ratio_B / aspect_B, down).clip(max=1)
    left_B, top_B = across_B * (1 - across), down_B * (1 - down)
    return np.stack([left_B, top_B, left_B + across, top_B + down], axis=1)


def center_boxes(width_B: np.ndarray, height_B: np.ndarray) -> np.ndarray:
    """The middle square of each picture: left, top, right, bottom in 0..1, float64 [B, 4]."""
    side_B = np.minimum(width_B, height_B)
    margin_B2 = (1 - np.stack([side_B / width_B, side_B / height_B], axis=1)) / 2
    return np.concatenate([margin_B2, 1 - margin_B2], axis=1)


def whole_boxes(width_B: np.ndarray, height_B: np.ndarray) -> np.ndarray:
    """All of each picture, to be squashed: left, top, right, bottom in 0..1, float64 [B, 4]."""
    return np.tile([0.0, 0.0, 1.0, 1.0], (len(width_B), 1))


def cut(pixels: np.ndarray, box: tuple[float, float, float, float], out: np.ndarray) -> None:
    """Write a part of a picture into a square, resized once.

    Args:
        pixels: uint8 HWC.
        box: left, top, right, bottom in 0..1.
        out: uint8 [S, S, 3], contiguous.
    """
    height, width = pixels.shape[:2]
    left, right = round(box[0] * width), round(box[2] * width)
    top, bottom = round(box[1] * height), round(box[3] * height)
    left, top = min(left, width - 1), min(top, height - 1)
    _resize(pixels[top : max(bottom, top + 1), left : max(right, left + 1)], out)


def _resize(pixels: np.ndarray, out: np.ndarray) -> None:
    size = len(out)
    height, width = pixels.shape[:2]
    reduction = math.sqrt(height * width) / size
    how = cv2.INTER_CUBIC
    if reduction > _AREA_FROM:
        how = cv2.INTER_AREA
    elif reduction > _BLUR_FROM:
        pixels = cv2.GaussianBlur(pixels, (3, 3), 0)
    elif reduction > 1:
        how = cv2.INTER_LINEAR
    cv2.resize(pixels, (size, size), dst=out, interpolation=how)
