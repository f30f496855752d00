"""Gradient accumulation for losses that need the whole batch (GradCache, arXiv:2101.06983).

The batch is encoded in parts, without gradient; the loss of all features gives each feature its gradient; then each part
is encoded again, and its features' gradients go back through the model. Losses are not sums over parts, so nothing less
would be the gradient of the whole batch. The price is a second forward pass. Random numbers of the model (patch dropout)
are drawn twice alike; batch norm would see each part by itself, twice.
"""

# Shapes: B local batch, D embedding

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft import parallel
from clipgraft.devices import random_state, set_random_state

Encode = Callable[[nn.Module, int], tuple[Tensor | None, ...]]
Loss = tuple[Tensor, dict[str, Tensor]]


def backward_in_parts(
    model: nn.Module,
    num_parts: int,
    encode: Encode,
    loss_of: Callable[..., Loss],
    read: Callable[[nn.Module], Tensor] | None = None,
) -> Loss:
    """Add the gradients of the loss of a batch to the model's parameters; processes average once.

    Args:
        model: maybe in DDP, or sharded.
        num_parts: of the batch of this process.
        encode: features of a part: image, text, then scalars (1 / tau, a bias or None).
        loss_of: the loss of the features of all parts, and of the sum of what was read.
        read: what is read off the model after a part went through it, to be summed over parts.

    Returns:
        The loss and what is to be logged, without gradient.
    """
    plain = getattr(model, "module", model)
    states, cached, sums = [], [], []
    with torch.no_grad():
        for part in range(num_parts):
            states.append(random_state())
            cached.append(encode(plain, part))
            if read is not None:
                sums.append(read(plain))
    sides = [torch.cat(side) for side in zip(*(each[:2] for each in cached), strict=True)]
    leaves: list[Any] = [
        None if x is None else x.detach().clone().requires_grad_()
        for x in (*sides, *cached[-1][2:], *([torch.stack(sums).sum(0)] if sums else []))
    ]
    num_scalars = len(cached[-1]) - 2
    loss, extras = loss_of(*leaves)
    loss.backward()
    d_sides = [leaf.grad.chunk(num_parts) for leaf in leaves[:2]]
    d_others = [None if leaf is None else leaf.grad for leaf in leaves[2:]]
    d_scalars, d_sums = d_others[:num_scalars], d_others[num_scalars:]
    for part, state in enumerate(states):
        set_random_state(state)
        is_last = part == num_parts - 1
        with nullcontext() if is_last else parallel.no_sync(model):
            features = encode(model, part)
            gradients: list[Any] = [d_side[part] for d_side in d_sides]
            # The parameters of the scalars are the same in all parts: once is enough.
            gradients += d_scalars if is_last else [None] * len(d_scalars)
            if read is not None:
                features, gradients = (*features, read(plain)), [*gradients, *d_sums]
            pairs: list[tuple[Any, Any]] = [
                (x, d) for x, d in zip(features, gradients, strict=True) if _has_both(x, d)
            ]
            torch.autograd.backward([x for x, _ in pairs], [d for _, d in pairs])
    return loss.detach(), extras


def _has_both(features: Tensor | None, gradient: Tensor | None) -> bool:
    return features is not None and gradient is not None and features.requires_grad
