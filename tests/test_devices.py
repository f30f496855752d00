"""What a process computes on."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from clipgraft.devices import fetch_later, precision
from clipgraft.evaluation.encode import true_float32

PAGES = """
import resource, sys, torch
from clipgraft.devices import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory(torch.device("cpu"))
def step():
    return [torch.ones(2**22) for _ in range(5)][0].sum().item()  # 16 MB each
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not the GNU C library")
def test_freed_memory_that_is_kept_is_used_again():
    """Else every step gets 80 MB of pages anew; glibc's own thresholds move, and are held here where they begin."""
    counts = {}
    fixed = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    for how in ("keep", "plain"):
        command = [sys.executable, "-c", PAGES, how]
        env = {**os.environ, **fixed}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        counts[how] = int(done.stdout)
    assert 10 * counts["keep"] < counts["plain"]  # it may grow once more, never in every step


def test_a_number_that_is_read_late_is_as_it_was():
    value = torch.tensor(2.0, requires_grad=True)
    read = fetch_later(value)
    value.data.fill_(3.0)
    assert read() == read() == 2.0


@pytest.mark.parametrize(("major", "wanted"), [(7, torch.float32), (8, torch.bfloat16)])
def test_a_gpu_that_only_emulates_bf16_computes_in_float32(monkeypatch, major, wanted):
    """Compute capability 7 (V100, T4) has tensors of it, and no fast products."""
    monkeypatch.delenv("CLIPGRAFT_PRECISION", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    about = SimpleNamespace(major=major, minor=5, name="a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert precision(torch.device("cuda")) is wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_number_on_a_gpu_that_is_read_late_is_as_it_was():
    value = torch.tensor(2.0, device="cuda")
    read = fetch_later(value)
    value.fill_(3.0)
    assert read() == 2.0


def test_evaluation_computes_in_float32_whatever_was_set_before():
    """As by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which torch takes for `high`."""

    def now() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = now()
    torch.set_float32_matmul_precision("high")
    try:
        with true_float32():
            assert now() == ("highest", False)
        assert now() == ("high", before[1])
        with pytest.raises(ZeroDivisionError), true_float32():
            _ = 1 / 0
        assert now() == ("high", before[1])
    finally:
        torch.set_float32_matmul_precision(before[0])
