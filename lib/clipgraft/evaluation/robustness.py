"""Robustness: what a model keeps of its accuracy when it sees fewer tokens than it was made for.

The curves of CLIPA (arXiv 2305.07017) are about tokens dropped in training; these are about tokens dropped at test time,
of one side at a time. Patches are drawn by the row of the image alone, the same for every model of one image size. A text
that is cut loses its end and is padded to the length that the tower knows.
"""

# Shapes: B batch

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from clipgraft.config import ConfigError
from clipgraft.data.draws import draw_bits
from clipgraft.evaluation_settings import RobustnessSettings, name_of
from clipgraft.lean import open_clip
from clipgraft.models.patches import drop_patches
from clipgraft.reductions import ImageReduction, num_kept

log = logging.getLogger(__name__)

Ahead = Callable[[range], None]  # is told the rows of a batch before its forward
Metrics = dict[str, float]


def robustness(
    settings: RobustnessSettings,
    model: nn.Module,
    text_length: int,
    device: torch.device,
    plain: Metrics,
    of_images: Callable[[Ahead], Metrics],
    of_texts: Callable[[int], Metrics],
) -> list[dict[str, Any]]:
    """The main metrics with fewer tokens of one side, the other side being whole.

    Args:
        settings: how many tokens.
        model: that is measured.
        text_length: tokens of a text that it was made for; longer cuts than that are left out.
        device: of the model.
        plain: its metrics on whole images and texts.
        of_images: measures with what `fewer_patches` yields.
        of_texts: measures with texts cut to so many tokens.
    Returns:
        Points of the curves: `tower`, `reduction` in words, `num_tokens` (patches; of texts with start and end) and
        `metrics`; first of a tower the one in which nothing is dropped.
    """
    points = []
    if settings.image:
        _check_towers(model, settings.image[0])
        rows, columns = getattr(model, "models", [model])[0].visual.grid_size
        points.append(_point("image", "none", rows * columns, plain))
    for reduction in settings.image:
        with fewer_patches(model, reduction, device) as ahead:
            metrics = of_images(ahead)
        num = num_kept(reduction, rows, columns)
        points.append(_point("image", name_of(reduction), num, metrics))
    cuts = sorted((cut for cut in settings.text if cut < text_length), reverse=True)
    if len(cuts) < len(settings.text):
        log.info(
            "robustness.text: texts of this model have %d tokens, longer cuts left out", text_length
        )
    if cuts:
        points.append(_point("text", "none", text_length, plain))
    return points + [_point("text", f"cut {cut}", cut, of_texts(cut)) for cut in cuts]


def _point(tower: str, reduction: str, num_tokens: int, metrics: Metrics) -> dict[str, Any]:
    return {
        "tower": tower,
        "reduction": reduction,
        "num_tokens": int(num_tokens),
        "metrics": metrics,
    }


@contextmanager
def fewer_patches(
    model: nn.Module, reduction: ImageReduction, device: torch.device
) -> Iterator[Ahead]:
    """Let a model, or each of several side by side, see a part of each image in evaluation.

    Args:
        model: with open_clip's own image tower.
        reduction: which part.
        device: of the model.
    Yields:
        What has to be told the rows of a batch before its forward.
    Raises:
        ConfigError: if the tower has no patches to drop.
    """
    towers = _check_towers(model, reduction)

    def draw(rows: range) -> None:
        bits_B = draw_bits(0, np.arange(rows.start, rows.stop), 0, 1)[:, 0].view(np.int64)
        for tower in towers:
            tower.image_bits_B = torch.from_numpy(bits_B).to(device)

    try:
        for each, tower in zip(getattr(model, "models", [model]), towers, strict=True):
            drop_patches(each, reduction)
            tower.drops_in_evaluation = True
        yield draw
    finally:
        for tower in towers:
            tower.drops_in_evaluation, tower.image_bits_B = False, None


def _check_towers(model: nn.Module, reduction: ImageReduction) -> list[Any]:
    """The image towers of a model, or of several side by side.

    Raises:
        ConfigError: if one has no patches to drop.
    """
    towers = [each.visual for each in getattr(model, "models", [model])]
    for tower in towers:
        if not isinstance(tower, open_clip.transformer.VisionTransformer):
            raise ConfigError(
                f"robustness.image = {reduction.kind}: the image tower is a {type(tower).__name__}, which has no patches "
                "to drop. Hint: robustness: {text: [8]}"
            )
    return towers
