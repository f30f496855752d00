"""The benchmarks of training, in small form: both sides run, and what they are given and how time is sorted is right."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from clipgraft.models.build import build, normalize

ROOT = Path(__file__).parent.parent
PARTS = {"attention", "mlp", "model", "loss", "optimizer", "data", "gaps"}


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


LONG = pytest.mark.skipif(
    not os.environ.get("CLIPGRAFT_LONG_TESTS"), reason="takes a minute: make test LONG=1"
)


def quick(name: str, *words: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(ROOT / f"benchmarks/{name}.py"), "--quick", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT / "lib"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def ratios(told: dict) -> dict[str, float]:
    """By row; what is not measured says why."""
    assert all(row["note"] for row in told["rows"] if row["ratio"] is None)
    return {row["name"]: row["ratio"] for row in told["rows"] if row["ratio"] is not None}


def test_both_sides_of_a_step_run_and_all_their_time_has_a_part():
    told = quick("train_step", "--only", "step", "parts")
    measured = ratios(told)
    for what in ("step, same", "padded to 77", "top 2 of 4: step", "MFU", "mlps", "routers"):
        assert any(what in name and ratio > 0 for name, ratio in measured.items()), what
    assert {name.rpartition(", ")[2] for name in told["profiles"]} == {"ours", "open_clip"}
    for name, shares in told["profiles"].items():
        assert shares.keys() == PARTS and sum(shares.values()) == pytest.approx(1, abs=0.02), name
        assert min(shares[part] for part in PARTS - {"gaps"}) > 0, (name, shares)


@LONG
def test_every_switch_has_a_row():
    measured = ratios(quick("train_step", "--only", "switches"))
    switches = ("fp32", "torch's choice", "trimmed", "AdamW", "grad_checkpointing", "accumulate")
    for what in (*switches, "a whole", "stem", "last block", "freed memory"):
        assert any(what in name and ratio > 0 for name, ratio in measured.items()), what


@LONG
def test_both_trainings_run_to_their_end_on_the_same_photos():
    told = quick("train_run")
    assert any("start-up" in name and ratio > 0 for name, ratio in ratios(told).items())
    about = told["rows"][0]["note"]
    ours, theirs = re.search(r"quarter ([\d.]+) \(ours\), ([\d.]+)", about).groups()
    assert max(float(ours), float(theirs)) < 1.1 * math.log(16), (
        "both begin near the log of the batch"
    )


def test_sides_are_given_the_same_pictures_and_texts():
    from _sides import MEAN_STD, OpenClip, our_batch
    from train_step import cpu_cases

    case = cpu_cases(quick=True)[0]
    ours, (images_BCHW, text_BL) = our_batch(case, 1), OpenClip(16).batch(case, 1)
    torch.testing.assert_close(normalize(ours.images_BCHW, *MEAN_STD), images_BCHW)
    assert ours.images_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours.text_BL[:, :16], text_BL) and not ours.text_BL[:, 16:].any()
    other = our_batch(case, 0)
    assert not torch.equal(ours.images_BCHW, other.images_BCHW)


def test_flops_of_a_step_are_those_that_torch_counts_without_padding():
    from _turns import batch_of, text_lengths
    from train_step import flops, gpu_cases

    case = replace(gpu_cases(quick=True)[-1], num_experts=0, lengths=(14.1, 4.0), longest=24)
    images_BCHW, text_BL = batch_of(case, 0, 77)
    model = build(case.config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for row, length in enumerate(text_lengths(case, 0)):
            pixels = images_BCHW[row : row + 1].float()
            image_BD, text_BD, _ = model(pixels, text_BL[row : row + 1, :length])
            (image_BD.sum() + text_BD.sum()).backward()
    counted = counter.get_total_flops() / case.batch
    assert flops(case) == pytest.approx(counted, rel=0.02)


def test_operators_belong_to_the_part_that_caused_them_also_backwards():
    from _profile import by_part, marked, marks

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(8), nn.LayerNorm(8)
            self.attn, self.mlp = nn.Linear(8, 13), nn.Linear(8, 17)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + F.linear(self.attn(self.ln_1(x)), self.attn.weight.T)
            return x + self.mlp(self.ln_2(x)) @ self.mlp.weight

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.resblocks, self.head = nn.ModuleList([Block()]), nn.Linear(8, 19)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.resblocks[0](x))

    model, weight = Tower(), torch.randn(19, 23)
    optimizer = torch.optim.AdamW(model.parameters())
    how = {"activities": [ProfilerActivity.CPU], "record_shapes": True, "acc_events": True}
    with marks(model), profile(**how) as taken:
        marked("loss", lambda y: (y @ weight).sum())(model(torch.randn(5, 8))).backward()
        optimizer.step()
    products = [
        (e, part) for e, part in by_part(taken.events()) if e.name in ("aten::mm", "aten::addmm")
    ]
    sizes = {13: "attention", 17: "mlp", 19: "model", 23: "loss"}
    for event, part in products:  # a product belongs to the layer whose output is as wide
        wide = {size for shape in event.input_shapes for size in shape} & sizes.keys()
        assert part in {sizes[size] for size in wide}, (event.name, event.input_shapes, part)
    found = [part for _, part in products]
    assert {part: found.count(part) for part in sizes.values()} == {"attention": 6, "mlp": 6, "model": 3, "loss": 2}  # fmt: skip
    others = {(event.name, part) for event, part in by_part(taken.events())}
    assert ("aten::native_layer_norm", "model") in others
    assert any(part == "optimizer" for _, part in others)
