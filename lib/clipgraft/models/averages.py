"""Means of models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from clipgraft.config import ConfigError


def mean_of_states(
    base: Mapping[str, Tensor], others: Iterable[tuple[str, Mapping[str, Tensor]]]
) -> dict[str, Tensor]:
    """Mean of state dicts, summed as differences from the first: what all have in common stays as it is, to the bit.

    Args:
        base: the first.
        others: the others, each with its name for messages; looked at one after the other, so that two are in memory.

    Raises:
        ConfigError: if one has other tensors than the first.
    """
    sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in base.items()}
    count = 1
    for where, state in others:
        count += 1
        for name in {*base, *state}:
            if name not in base or name not in state or state[name].shape != base[name].shape:
                raise ConfigError(
                    f"{where}: {name} is not as in the first model. Hint: experts of one base have one architecture"
                )
            sums[name] += state[name].double() - base[name].double()
    return {
        name: (base[name].double() + total / count).to(base[name].dtype)
        for name, total in sums.items()
    }
