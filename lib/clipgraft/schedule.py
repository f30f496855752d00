"""Schedules: steps, warm-up and learning rate as pure functions of the settings, for training and for its plan.

Apart from `recipes`, since an edit here changes what training does.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipgraft.recipes import TrainSettings


def num_steps(settings: TrainSettings) -> int:
    """Optimizer steps; the last one may show more samples than were asked for."""
    return math.ceil(settings.samples_seen / settings.batch_size)


def num_warmup_steps(settings: TrainSettings) -> int:
    """Steps with a rising learning rate."""
    optim = settings.optim
    if optim.warmup_steps is not None:
        return optim.warmup_steps
    if optim.warmup_samples is not None:
        return math.ceil(optim.warmup_samples / settings.batch_size)
    return round((0.05 if optim.warmup is None else optim.warmup) * num_steps(settings))


def peak_lr(settings: TrainSettings) -> float:
    """Learning rate at the end of the warm-up: as given, or in proportion to the global batch."""
    optim = settings.optim
    if optim.lr_per_256 is not None:
        return optim.lr_per_256 * settings.batch_size / 256
    assert optim.lr is not None
    return optim.lr


def cosine_lr(
    step: int, num_steps: int, warmup_steps: int, lr: float, lr_min: float = 0.0
) -> float:
    """Learning rate of step `step` (from 0): linear up to `lr` over the warm-up, then a half cosine to `lr_min`."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return lr_min + (lr - lr_min) * (1 + math.cos(math.pi * progress)) / 2
