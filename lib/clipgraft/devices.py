"""What a process computes on: its precision, its attention, its random numbers, and what to call it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h


def attention(device: torch.device) -> AbstractContextManager[None]:
    """Plain attention on CPUs, torch's choice elsewhere.

    torch's fused CPU kernel is made for long sequences: at the 16 to 64 tokens of short training its backward takes
    half of the step (in bf16; the plain one makes the step twice as fast).
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, have the allocator of the C library keep what tensors leave, for the next ones.

    By default glibc gives large blocks back to the kernel at once, and gets them again page by page, zeroed: 9,700 page
    faults in each training step of a small model, a quarter of its time. Where the C library is another one, nothing
    changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if device.type == "cpu" and mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def precision(device: torch.device, wish: str | None = None) -> torch.dtype:
    """What is wished for (bf16 or fp32), or else bf16 where the hardware multiplies it.

    CLIPGRAFT_PRECISION=fp32 forces float32 where nothing is wished for.
    """
    if wish is not None:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[wish]
    if os.environ.get("CLIPGRAFT_PRECISION") == "fp32":
        return torch.float32
    if device.type == "cuda":
        # By default torch says yes to older GPUs too, which emulate it and are slower than in float32.
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if is_fast else torch.float32
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return torch.float32
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


@contextmanager
def float32_products() -> Iterator[None]:
    """A context in which products of float32 matrices are not rounded to TF32, whatever holds outside.

    NVIDIA's images set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which torch takes for the precision `high`.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def device_name(device: torch.device) -> str:
    """What to call the device in a log line."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )


def device_memory(device: torch.device) -> dict[str, int]:
    """What this process has taken of a GPU's memory at most, and all there is, in MB; nothing of a CPU."""
    if device.type != "cuda":
        return {}
    taken, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(device)
    return {
        "peak_device_mb": taken // 2**20,
        "device_mb": total.total_memory // 2**20,
    }


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for what the device is at: only pinned memory goes so."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def fetch_later(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the host; what is returned waits for it, not for work that was queued after it."""
    copy = tensor.detach().to("cpu", non_blocking=True, copy=True)
    if not tensor.is_cuda:
        return lambda: copy
    copied = torch.cuda.Event()
    copied.record()

    def fetch() -> Tensor:
        copied.synchronize()
        return copy

    return fetch


def random_state() -> list[Any]:
    """Of torch's own generators."""
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *gpu]


def set_random_state(state: list[Any]) -> None:
    """Go on from there; on a device of another kind than it was, with what it has."""
    torch.set_rng_state(state[0])
    for each in state[1:] if torch.cuda.is_initialized() else []:
        torch.cuda.set_rng_state(each)
