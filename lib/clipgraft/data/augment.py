"""Augmentation of a batch on the device that it is on: mirror, colour jitter, grey.

Every number that decides comes with the batch, drawn by the loader from (seed, row, visit), so the pictures are the
same on any device and for any number of processes. All samples take the same path and masks choose, so nothing
waits for the host. Jitter is torchvision's ColorJitter with its order fixed: brightness, contrast, saturation, hue.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipgraft.recipes import AugmentationSettings

# Columns of the uniform numbers of a sample.
_FLIP, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAY = range(7)
NUM_UNIFORM = 7

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision rounds it


def augments(settings: AugmentationSettings) -> bool:
    """Whether these settings change any picture."""
    return bool(settings.flip_prob or settings.gray_scale_prob or _jitters(settings))


def augment(
    images_BCHW: Tensor, uniform_BK: Tensor | None, settings: AugmentationSettings
) -> Tensor:
    """Mirror, jitter and grey each picture as its numbers say.

    Args:
        images_BCHW: uint8, RGB.
        uniform_BK: float32 in [0, 1), K = NUM_UNIFORM, on the same device; None where nothing is to be done.
        settings: probabilities and ranges.

    Returns:
        float32 in 0..255, or, where nothing is to be done, the bytes as they are.
    """
    if not augments(settings):
        return images_BCHW
    assert uniform_BK is not None, "the loader was not told to draw"
    uniform_KB111 = uniform_BK.T[..., None, None, None]
    if settings.flip_prob:
        is_flipped_B111 = uniform_KB111[_FLIP] < settings.flip_prob
        images_BCHW = torch.where(is_flipped_B111, images_BCHW.flip(-1), images_BCHW)
    images_BCHW = images_BCHW.float()
    if _jitters(settings):
        is_jittered_B111 = uniform_KB111[_JITTER] < settings.color_jitter_prob
        jittered_BCHW = _jitter(images_BCHW / 255, uniform_KB111, settings.color_jitter) * 255
        images_BCHW = torch.where(is_jittered_B111, jittered_BCHW, images_BCHW)
    if settings.gray_scale_prob:
        is_gray_B111 = uniform_KB111[_GRAY] < settings.gray_scale_prob
        images_BCHW = torch.where(is_gray_B111, _gray(images_BCHW), images_BCHW)
    return images_BCHW


def _jitters(settings: AugmentationSettings) -> bool:
    return bool(any(settings.color_jitter) and settings.color_jitter_prob)


def _jitter(
    images_BCHW: Tensor, uniform_KB111: Tensor, ranges: tuple[float, float, float, float]
) -> Tensor:
    """Pictures in 0..1 with factors drawn from [max(0, 1 - r), 1 + r], and hue shifted by [-r, r] of the circle."""
    brightness, contrast, saturation, hue = ranges
    if brightness:
        black = torch.zeros_like(images_BCHW[:, :1])
        images_BCHW = _blend(images_BCHW, black, _factor(uniform_KB111[_BRIGHTNESS], brightness))
    if contrast:
        mean_B111 = _gray(images_BCHW).mean(dim=(1, 2, 3), keepdim=True)
        images_BCHW = _blend(images_BCHW, mean_B111, _factor(uniform_KB111[_CONTRAST], contrast))
    if saturation:
        gray_B1HW = _gray(images_BCHW)
        factor_B111 = _factor(uniform_KB111[_SATURATION], saturation)
        images_BCHW = _blend(images_BCHW, gray_B1HW, factor_B111)
    if hue:
        shift_B111 = (uniform_KB111[_HUE] * 2 - 1) * hue
        images_BCHW = _shift_hue(images_BCHW, shift_B111)
    return images_BCHW


def _factor(uniform_B111: Tensor, strength: float) -> Tensor:
    low = max(0.0, 1 - strength)
    return low + uniform_B111 * (1 + strength - low)


def _blend(images: Tensor, other: Tensor, share_B111: Tensor) -> Tensor:
    return (share_B111 * images + (1 - share_B111) * other).clamp(0, 1)


def _gray(images_BCHW: Tensor) -> Tensor:
    """Brightness of each pixel [B, 1, H, W]."""
    red, green, blue = images_BCHW.unbind(1)
    return (red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]).unsqueeze(1)


def _shift_hue(images_BCHW: Tensor, shift_B111: Tensor) -> Tensor:
    """Turn colours round the HSV circle; `shift` is in turns. Brightness and saturation stay.

    In HSV a channel is V - C * max(0, min(k, 4 - k, 1)), with k = (n + 6 H) mod 6 and n = 5, 3, 1 for R, G, B;
    so only H has to be found.
    """
    value_B1HW, darkest_B1HW = images_BCHW.amax(1, keepdim=True), images_BCHW.amin(1, keepdim=True)
    chroma_B1HW = value_B1HW - darkest_B1HW
    red, green, blue = images_BCHW.split(1, dim=1)
    safe_B1HW = torch.where(chroma_B1HW == 0, torch.ones_like(chroma_B1HW), chroma_B1HW)
    sixth_B1HW = torch.where(
        value_B1HW == red,
        (green - blue) / safe_B1HW,
        torch.where(
            value_B1HW == green, 2 + (blue - red) / safe_B1HW, 4 + (red - green) / safe_B1HW
        ),
    )
    n_C11 = torch.arange(5.0, 0.0, -2.0, device=images_BCHW.device).view(3, 1, 1)
    k_BCHW = (n_C11 + sixth_B1HW + 6 * shift_B111).remainder(6)
    return value_B1HW - chroma_B1HW * torch.minimum(k_BCHW, 4 - k_BCHW).clamp(0, 1)
