"""What a process computes on: its precision, its attention, its random numbers, and what to call it."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention(device: torch.device) -> AbstractContextManager[None]:
    """Plain attention on CPUs, torch's choice elsewhere.

    torch's fused CPU kernel is made for long sequences: at the 16 to 64 tokens of short training its backward takes
    half of the step (in bf16; the plain one makes the step twice as fast).
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def precision(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it, else float32; CLIPGRAFT_PRECISION=fp32 forces the latter."""
    if os.environ.get("CLIPGRAFT_PRECISION") == "fp32":
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return torch.float32
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


def device_name(device: torch.device) -> str:
    """What to call the device in a log line."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )


def random_state() -> list[Any]:
    """Of torch's own generators."""
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *gpu]


def set_random_state(state: list[Any]) -> None:
    """Go on from there; on a device of another kind than it was, with what it has."""
    torch.set_rng_state(state[0])
    for each in state[1:] if torch.cuda.is_initialized() else []:
        torch.cuda.set_rng_state(each)
