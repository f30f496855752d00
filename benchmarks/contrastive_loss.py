"""Losses over all pairs of a batch: loss and backward of the same features, beside open_clip and fast_clip's formulas.

    python benchmarks/contrastive_loss.py [--quick]

open_clip's ClipLoss holds the whole matrix of similarities, several times; fast_clip's loss is written here as its
formulas say (two passes, each with a matrix of margins, of exponentials and a mask). Peak memory is that of a process of
its own, above what it held before the loss; on a GPU, that of torch's allocator. Products take most of the time:
`limit_share` is the time of ours that as many multiplications would take at the rate of one big product.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import ROOT, Row, faster, one_core, rates, report, within
from torch import Tensor

from clipgraft import dist
from clipgraft.losses.global_contrastive import (
    global_contrastive_loss,
    log_negatives,
    own_anchors,
)
from clipgraft.objectives import Features, gather_pairs, pair_loss

D, TAU = 512, 0.03
GIB = 2**30
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Measure and report."""
    if "--peak" in sys.argv:
        torch.set_num_threads(1)
        _, _, side, num, device = sys.argv
        print(peak_bytes(LOSSES[side](), int(num), device))
        return
    quick = "--quick" in sys.argv
    one_core()
    torch.set_num_threads(1)
    rows = rows_on("cpu", 4096 if quick else 16_384, repeats=3 if quick else 5)
    if quick:
        rows.append(not_measured("peak memory at B = 65,536", "4 GiB", "takes minutes"))
    else:
        rows.append(largest_row("cpu"))
    if torch.cuda.is_available():
        rows += [*rows_on("cuda", 16_384, repeats=9), largest_row("cuda")]
    else:
        rows.append(not_measured("the same on a GPU", "", "no GPU here"))
    report("contrastive_loss", rows)


def rows_on(device: str, num: int, repeats: int) -> list[Row]:
    """Time and memory at the sizes that matter."""
    where = "" if device == "cpu" else f", {torch.cuda.get_device_name()}"
    rows = []
    for size, target in ((2048, 1.0), (num, 1 / 1.3)):
        sides = {
            name: partial(work, LOSSES[name](), *features(size, device), 0.5 if size == 2048 else 0)
            for name in ("ours", "open_clip")
        }
        measured = rates(sides, repeats)
        name = f"InfoNCE, loss and backward, B = {size:,}{where}"
        row = faster(name, measured["ours"], measured["open_clip"], "pairs/s", target)
        share = statistics.median(measured["ours"]) * 4 * 2 * D / flops_per_second(device)
        rows.append(replace(row, limit_share=share))
    for ours, peer, bound in (("ours", "open_clip", 8.0), ("ours_rgcl_g", "fast_clip", 20.0)):
        target = bound if num == 16_384 else None  # it grows with the batch
        name = f"peak extra memory, {ours} and {peer}, B = {num:,}{where}"
        if device == "cpu" and peer == "fast_clip" and available_bytes() < 60 * num**2:
            rows.append(not_measured(name, "MiB", "too little free memory for fast_clip", target))
            continue
        our, its = (measure_peak(side, num, device) / 2**20 for side in (ours, peer))
        rows.append(Row(name, our, its, "MiB", its / our, target))
    return rows


def largest_row(device: str) -> Row:
    """Whether a batch that others cannot hold runs in 4 GiB, features and all."""
    peak = measure_peak("ours_rgcl_g", 65_536, device) + 4 * 65_536 * D * 4
    note = "RGCL-g; features and their gradients included; fast_clip's formulas need 176 GiB"
    return within(f"peak memory at B = 65,536 ({device})", [peak / GIB], 4.0, "GiB", note)


def not_measured(name: str, unit: str, why: str, target: float | None = None) -> Row:
    """A row that says why it has no number."""
    return Row(name, None, None, unit, None, target, note=why)


# --- the sides ----------------------------------------------------------------------------------------------


def our_infonce() -> Loss:
    """Ours, as training calls it."""

    def loss(image_BD: Tensor, text_BD: Tensor, scale: Tensor) -> Tensor:
        return pair_loss(dist.World(0, 1, image_BD.device), Features(image_BD, text_BD, scale))

    return loss


def our_rgcl_g() -> Loss:
    """FastCLIP v3 at inner rate 1, ours."""

    def loss(image_BD: Tensor, text_BD: Tensor, scale: Tensor) -> Tensor:
        features = Features(image_BD, text_BD, scale)
        pairs = gather_pairs(dist.World(0, 1, image_BD.device), features)
        tau_B2 = (1 / scale.detach()).expand(len(image_BD), 2)
        log_g_B2, _ = log_negatives(pairs, tau_B2)
        anchors = own_anchors(pairs, tau_B2, log_g_B2, "rgcl_g")
        return global_contrastive_loss(
            image_BD, text_BD, scale, pairs, anchors, log_g_B2, log_g_B2, kind="rgcl_g", rho=8.0
        )

    return loss


def open_clips() -> Loss:
    """open_clip's loss in one process."""
    from open_clip.loss import ClipLoss

    return ClipLoss()


def fast_clips() -> Loss:
    """FastCLIP v3 at inner rate 1, from its formulas: in one process, features have twice the gradient they should."""

    def loss(image_BD: Tensor, text_BD: Tensor, scale: Tensor) -> Tensor:
        num = len(image_BD)
        image_BB, text_BB = image_BD @ text_BD.T, text_BD @ image_BD.T
        others_BB = 1 - torch.eye(num, dtype=torch.int64, device=image_BD.device)

        def mean_B(sim_BB: Tensor) -> Tensor:
            margin_BB = (sim_BB - sim_BB.diagonal()[:, None]) * scale
            return (margin_BB.exp() * others_BB).sum(1) / (num - 1)

        first = mean_B(image_BB), mean_B(text_BB)
        u = [g_B.detach() for g_B in first]
        second = mean_B(text_BB.T), mean_B(image_BB.T)
        surrogate = sum((g / v).mean() for pass_ in (first, second) for g, v in zip(pass_, u, strict=True)) / 2  # fmt: skip
        tau = 1 / scale
        logs = (u[0].log() + u[1].log()).mean() / 2
        return surrogate * tau.detach() + tau * (8.0 + logs)

    return loss


LOSSES = {
    "ours": our_infonce,
    "open_clip": open_clips,
    "ours_rgcl_g": our_rgcl_g,
    "fast_clip": fast_clips,
}


# --- measuring ----------------------------------------------------------------------------------------------


def features(num: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Features of pairs that are somewhat alike, and 1 / tau."""
    generator = torch.Generator().manual_seed(0)
    image_BD = torch.randn(num, D, generator=generator)
    text_BD = image_BD + torch.randn(num, D, generator=generator)
    sides = (F.normalize(x, dim=1).to(device).requires_grad_() for x in (image_BD, text_BD))
    return *sides, torch.tensor(1 / TAU, device=device, requires_grad=True)  # type: ignore[return-value]


def work(
    loss: Loss, image_BD: Tensor, text_BD: Tensor, scale: Tensor, seconds_of: float = 0
) -> int:
    """Loss and backward, again and again for so many seconds; how many pairs of samples that were."""
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < seconds_of:
        for tensor in (image_BD, text_BD, scale):
            tensor.grad = None
        loss(image_BD, text_BD, scale).backward()
        if image_BD.is_cuda:
            torch.cuda.synchronize()
        count += len(image_BD) ** 2
    return count


def flops_per_second(device: str) -> float:
    """Rate of one big float32 product."""
    a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        if a.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / statistics.median(seconds)


def measure_peak(side: str, num: int, device: str) -> int:
    """`peak_bytes`, in a process of its own."""
    command = [sys.executable, __file__, "--peak", side, str(num), device]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout))


def peak_bytes(loss: Loss, num: int, device: str) -> int:
    """Most memory that loss and backward held, above what was held before (features, and their gradients)."""
    work(loss, *features(512, device))  # buffers of libraries
    inputs = features(num, device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work(loss, *inputs)
        return torch.cuda.max_memory_allocated() - before - 2 * num * D * 4
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    work(loss, *inputs)
    return status_bytes("VmHWM") - before - 2 * num * D * 4


def status_bytes(field: str) -> int:
    """A line of /proc/self/status."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def available_bytes() -> int:
    """Memory that is free, or could be."""
    line = Path("/proc/meminfo").read_text().split("MemAvailable:")[1]
    return int(line.split()[0]) * 1024


if __name__ == "__main__":
    main()
