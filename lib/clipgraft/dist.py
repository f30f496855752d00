"""Processes: who this one is, and the few collectives that training needs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as torch_dist

from clipgraft.config import ConfigError
from clipgraft.exchange import Exchange, SharedMean
from clipgraft.orphan import NOTHING_TO_DO

log = logging.getLogger(__name__)

PATIENCE = timedelta(hours=2)  # with a process that writes a large state to a slow disk

_exchange: Exchange | None = None  # where all processes are on CPUs of one machine


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
    """Join the processes that torchrun started (NCCL on devices, gloo on CPUs, on those of one machine memory that they share); alone without torchrun.

    They part in good order if all leave together. NCCL would have one that fails alone wait for the others, who wait for it:
    it leaves without a word, and torchrun ends them; where memory is shared they learn it when its process ends.
    """
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
        # What hosts agree on goes through gloo, so that no device is waited for.
        backend = "cpu:gloo,cuda:nccl" if has_device else "gloo"
        torch_dist.init_process_group(backend, timeout=PATIENCE)
    global _exchange
    if size > 1 and not has_device and _are_neighbours(size):
        try:
            _exchange = Exchange(rank, size, _said, PATIENCE.total_seconds())
        except OSError as error:  # a container that forbids it, say
            if rank == 0:
                log.warning("processes cannot share memory (%s): they talk through gloo, slower", error)  # fmt: skip
    is_agreed = False
    try:
        if said_by_first(os.environ.get(NOTHING_TO_DO, "")):
            sys.exit(0)
        yield World(rank, size, device)
        is_agreed = True
    except SystemExit as left:
        is_agreed = left.code in (os.EX_OK, os.EX_TEMPFAIL)
        raise
    finally:
        ended, _exchange = _exchange, None
        if is_agreed and ended is not None:
            ended.close()
        if is_agreed and torch_dist.is_initialized():
            torch_dist.destroy_process_group()


def _are_neighbours(size: int) -> bool:
    """Whether all processes are on one machine, and can share memory."""
    return os.environ.get("LOCAL_WORLD_SIZE") == str(size) and hasattr(os, "memfd_create")


def part() -> tuple[int, int] | None:
    """Which of the jobs that share a stage's work this is, and how many they are; None: it has all of it."""
    k, _, num = os.environ.get("CLIPGRAFT_PART", "").partition("-of-")
    return (int(k), int(num)) if num else None


def gather(local_BD: torch.Tensor) -> torch.Tensor:
    """Rows of all processes, rank r at [r*B, (r+1)*B), without gradient.

    Args:
        local_BD: this process's rows, as many on each.
    Returns:
        All rows [G, D]; `local_BD` itself in a single process.
    """
    if not torch_dist.is_initialized():
        return local_BD
    local_BD = local_BD.detach().contiguous()
    if _exchange is not None:
        return _exchange.gather(local_BD)
    parts = [torch.empty_like(local_BD) for _ in range(torch_dist.get_world_size())]
    torch_dist.all_gather(parts, local_BD)
    return torch.cat(parts)


def is_first_on_node() -> bool:
    """Whether this process speaks for its node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def same_on_node(text: str) -> str:
    """What the first process of this node says; called by all processes together."""
    if not torch_dist.is_initialized():
        return text
    return _said(text)[torch_dist.get_rank() - int(os.environ.get("LOCAL_RANK", "0"))]


def said_by_first(text: str) -> str:
    """What the first process of all says; called by all processes together."""
    return _said(text)[0] if torch_dist.is_initialized() else text


def _said(text: str) -> list[str]:
    said = [""] * torch_dist.get_world_size()
    torch_dist.all_gather_object(said, text)
    return said


def mean(value: torch.Tensor) -> torch.Tensor:
    """Mean over processes of a tensor without gradient."""
    if not torch_dist.is_initialized():
        return value
    return _sum(value).div_(torch_dist.get_world_size())


def total(value: torch.Tensor) -> torch.Tensor:
    """Sum over processes, for a loss of it that each of them computes alike.

    The gradient of this process's value is scaled up by the number of processes, since those of parameters are averaged
    over them afterwards.
    """
    if not torch_dist.is_initialized():
        return value
    return _sum(value.detach()) + torch_dist.get_world_size() * (value - value.detach())


def _sum(value: torch.Tensor) -> torch.Tensor:
    if _exchange is not None:
        return _exchange.total(value.flatten()).view(value.shape)
    value = value.clone()
    torch_dist.all_reduce(value)
    return value


class GroupMean:
    """As `SharedMean`, through gloo or NCCL."""

    def __init__(self, num: int, dtype: torch.dtype, device: torch.device) -> None:
        """Of `num` elements."""
        self.vector_X = torch.zeros(num, dtype=dtype, device=device)

    def compute(self, number: int) -> None:
        """By all processes together; that they have the same number is not looked at."""
        torch_dist.all_reduce(self.vector_X)
        self.vector_X.div_(torch_dist.get_world_size())


def mean_of_vectors(num: int, dtype: torch.dtype, device: torch.device) -> SharedMean | GroupMean:
    """What computes means of vectors of `num` elements again and again; made by all processes together.

    Raises:
        ConfigError: in all of them, if one may not share so much memory.
    """
    if _exchange is not None:
        try:
            return SharedMean(_exchange, num, dtype)
        except OSError as error:
            size = (_exchange.size + 1) * num * dtype.itemsize
            raise ConfigError(
                f"processes cannot share {size / 2**20:,.0f} MB of memory for their gradients ({error}). "
                "Hint: fewer processes on this machine, or more memory for the job"
            ) from None
    return GroupMean(num, dtype, device)


def is_alone() -> bool:
    """Whether this is the only process."""
    return not torch_dist.is_initialized()


def shares_memory() -> bool:
    """Whether processes talk through memory: then DDP, which would not, is not for them."""
    return _exchange is not None


def largest(number: int, device: torch.device) -> int:
    """The largest that a process has; all get the same answer."""
    if not torch_dist.is_initialized():
        return number
    if _exchange is not None:
        return max(number, *_exchange.hear(_exchange.tell(number)))
    tensor = torch.tensor([number], device=device)
    torch_dist.all_reduce(tensor, torch_dist.ReduceOp.MAX)
    return int(tensor.item())


def ask_largest(find: Callable[[], int]) -> Callable[[], int]:
    """As `largest`, without waiting now: what is returned gives the answer.

    Args:
        find: this process's number: asked now, or by the answer if this process is alone.
    """
    if not torch_dist.is_initialized():
        return find
    if _exchange is not None:
        own, heard = find(), _exchange
        message = heard.tell(own)
        return lambda: max(own, *heard.hear(message))
    number = torch.tensor([find()])
    work = torch_dist.all_reduce(number, torch_dist.ReduceOp.MAX, async_op=True)

    def answer() -> int:
        work.wait()
        return int(number.item())

    return answer


def is_share(value: object) -> bool:
    """Whether this is a process's share of a tensor (a DTensor, told without importing them)."""
    return hasattr(value, "full_tensor")


def own(value: torch.Tensor) -> torch.Tensor:
    """This process's share of a tensor. Any other as it is."""
    return value.to_local() if is_share(value) else value  # type: ignore[attr-defined]


def whole(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which each process has a share; by all processes together. Any other as it is."""
    return value.full_tensor() if is_share(value) else value  # type: ignore[attr-defined]


def barrier() -> None:
    """Wait for all processes."""
    if torch_dist.is_initialized():
        torch_dist.barrier()
