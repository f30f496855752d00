"""AdamW: which parameters decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from clipgraft.recipes import OptimSettings

_UNDECAYED = ("bn", "ln", "bias", "logit_scale")  # open_clip's list


def parameter_groups(
    named_parameters: Mapping[str, nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: decayed, not decayed, frozen ones left out.

    Norms, biases and logit_scale are not decayed, as in open_clip (token and position tables are). Biases are
    recognised by name, too, because those of stacked experts have two dimensions.
    """
    trained = {name: p for name, p in named_parameters.items() if p.requires_grad}
    kept = {
        name: p
        for name, p in trained.items()
        if p.ndim < 2 or any(part in name for part in _UNDECAYED)
    }
    decayed = [p for name, p in trained.items() if name not in kept]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": list(kept.values()), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    named_parameters: Mapping[str, nn.Parameter], settings: OptimSettings, lr: float
) -> torch.optim.AdamW:
    """AdamW over the parameters that want a gradient; the caller sets the learning rate of each step."""
    groups = parameter_groups(named_parameters, settings.weight_decay)
    devices = {p.device.type for group in groups for p in group["params"]}
    return torch.optim.AdamW(
        groups,
        lr=lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=devices <= {"cuda", "cpu"},
    )
