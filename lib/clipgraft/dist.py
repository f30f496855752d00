"""Processes: who this one is, and the few collectives that training needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist


@dataclass(frozen=True)
class World:
    """This process among all: rank, number of processes, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0


@contextmanager
def world() -> Iterator[World]:
    """Join the processes that torchrun started (NCCL on devices, gloo on CPUs); alone without torchrun."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    has_device = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if has_device
        else torch.device("cpu")
    )
    if has_device:
        torch.cuda.set_device(device)
    if size > 1:
        torch_dist.init_process_group("nccl" if has_device else "gloo")
    try:
        yield World(rank, size, device)
    finally:
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, local_BD: torch.Tensor) -> torch.Tensor:
        local_BD = local_BD.contiguous()
        parts = [torch.empty_like(local_BD) for _ in range(torch_dist.get_world_size())]
        torch_dist.all_gather(parts, local_BD)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, grad_GD: torch.Tensor) -> torch.Tensor:
        grad_GD = grad_GD.clone()  # it is not ours to change
        torch_dist.all_reduce(grad_GD)
        rows = grad_GD.shape[0] // torch_dist.get_world_size()
        return grad_GD[torch_dist.get_rank() * rows :][:rows]


def gather(local_BD: torch.Tensor) -> torch.Tensor:
    """Rows of all processes, rank r at [r*B, (r+1)*B), with gradient.

    The gradient of a row is summed over the processes, so with a loss that is a mean over local rows and gradients
    averaged by DDP, parameters get the gradient of the global mean.

    Args:
        local_BD: this process's rows, as many on each.
    Returns:
        All rows [G, D]; `local_BD` itself in a single process.
    """
    if not torch_dist.is_initialized():
        return local_BD
    gathered: torch.Tensor = _Gather.apply(local_BD)  # type: ignore[no-untyped-call]
    return gathered


def mean(value: torch.Tensor) -> torch.Tensor:
    """Mean over processes of a tensor without gradient."""
    if not torch_dist.is_initialized():
        return value
    value = value.clone()
    torch_dist.all_reduce(value)
    return value / torch_dist.get_world_size()


def any_true(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process; all processes get the same answer."""
    if not torch_dist.is_initialized():
        return flag
    tensor = torch.tensor([int(flag)], device=device)
    torch_dist.all_reduce(tensor)
    return bool(tensor.item())


def barrier() -> None:
    """Wait for all processes."""
    if torch_dist.is_initialized():
        torch_dist.barrier()
