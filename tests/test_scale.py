"""What training needs at scale, against the models, the optimizer and the stages themselves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clipgraft import cost, scale
from clipgraft import footprint as fp
from clipgraft.config import ConfigError
from clipgraft.data.shards import _PLACE
from clipgraft.models.build import build
from clipgraft.models.moe import insert_experts
from clipgraft.recipes import PhaseSettings

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "workflow" / "docs" / "scale.md"


def phase(**changes: Any) -> PhaseSettings:
    raw = {"name": "x", "samples_seen": 640, "batch_size": 64, "image_size": 16, "text_length": 8}
    return PhaseSettings(**{**raw, "optim": {"lr": 1e-3}, **changes})


@pytest.fixture
def tall_config(tiny_config) -> dict[str, Any]:
    """Towers of different depth and width."""
    config = json.loads(json.dumps(tiny_config))
    config["vision_cfg"] |= {"layers": 3, "width": 64}
    return config


def test_the_tables_of_the_page_are_what_the_command_prints():
    done = subprocess.run(
        [sys.executable, "-m", "clipgraft.scale"], capture_output=True, text=True, check=True
    )
    page = PAGE.read_text()
    tables = re.findall(r"## (.+)\n\n((?:\|.*\n)+)", done.stdout + "\n")
    assert len(tables) == 7
    for title, table in tables:
        assert f"## {title}\n" in page
        assert table in page, f"python -m clipgraft.scale prints another table for {title!r}"


def test_blocks_and_mlps_have_the_parameters_of_open_clip(tall_config):
    model = build(tall_config)
    towers = (model.visual, model.text)
    for tower, (num, width, size) in zip(towers, cost.blocks(tall_config), strict=True):
        blocks = tower.transformer.resblocks
        assert (len(blocks), sum(p.numel() for p in blocks[0].parameters())) == (num, size)
        assert blocks[0].ln_1.weight.numel() == width
    dense = sum(p.numel() for p in model.parameters())
    insert_experts(model, 4, 2, image_layers="all", text_layers="all")
    grown = sum(p.numel() for p in model.parameters()) - dense
    routers = sum(p.numel() for name, p in model.named_parameters() if name.endswith("router"))
    mlps = [num * (2 * w * h + w + h) for num, w, h in cost.mlps(tall_config)]
    assert grown - routers == 3 * sum(mlps)


def test_what_is_whole_of_a_sharded_model_is_what_no_block_has_and_two_blocks(tall_config):
    model = build(tall_config)
    inside = [p for t in (model.visual, model.text) for p in t.transformer.resblocks.parameters()]
    outside = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in inside)
    wide = sum(p.numel() for p in model.visual.transformer.resblocks[0].parameters())
    found = fp.passing_parameters(
        tall_config, phase(text_length=tall_config["text_cfg"]["context_length"])
    )
    assert found == outside - 1 + 2 * wide  # but for the temperature


def test_weights_gradients_and_moments_are_those_of_adamw():
    """Of a real step, but for the bf16 copy that autocast keeps."""
    model = nn.Linear(300, 200, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    moments = sum(x.nbytes for x in optimizer.state[model.weight].values() if x.ndim)
    held = model.weight.nbytes + model.weight.grad.nbytes + moments
    assert held == (fp.STATE - fp.BF16) * model.weight.numel()
    assert 3 * fp.FP32 * model.weight.numel() == fp.FP32 * model.weight.numel() + moments


@pytest.mark.parametrize("num", [8, 64])
def test_each_measure_takes_less_memory_than_the_one_before(tall_config, num):
    big = {**tall_config, "vision_cfg": tall_config["vision_cfg"] | {"layers": 24, "width": 1024}}
    layouts = [
        fp.Layout(num),
        fp.Layout(num, recomputes=True),
        fp.Layout(num, is_sharded=True, recomputes=True),
    ]
    totals = [fp.memory_of(big, phase(batch_size=4096), each).total for each in layouts]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 3


def test_the_layout_that_fits_is_the_first_that_does(tall_config):
    big = {**tall_config, "vision_cfg": tall_config["vision_cfg"] | {"layers": 24, "width": 1024}}
    training = phase(batch_size=4096)
    sizes = {}
    for memory in np.geomspace(1e8, 1e12, 60):
        layout = fp.first_that_fits(big, training, 8, memory)
        if layout is not None:
            assert fp.memory_of(big, training, layout).total <= memory
            sizes[str(layout)] = memory
    assert list(sizes)[-1] == "ddp" and len(sizes) > 2
    assert fp.first_that_fits(big, training, 8, 1e6) is None


def test_rates_are_those_that_the_benchmarks_measured():
    def row(benchmark: str, name: str) -> float:
        rows = json.loads((ROOT / f"benchmarks/results/{benchmark}.json").read_text())["rows"]
        return next(each["ours"] for each in rows if each["name"].startswith(name))

    both = row("index", "index, then shard")
    assert fp.INDEX == row("index", "index")
    assert 1 / (1 / fp.SHARD + 1 / fp.INDEX) == pytest.approx(both)
    assert fp.DECODE[0.9] == row("loader", "stage-sized shards, crops of 90 %")
    assert fp.DECODE[0.4] == row("loader", "stage-sized shards, crops of 40 %")
    assert fp.KMEANS == row("cluster", "k-means, 1,000,000")


def test_bytes_of_a_place_are_those_of_the_file():
    assert fp.PLACE == _PLACE.itemsize


def test_weights_that_are_taken_as_they_are_need_no_samples(tall_config):
    (taken, trained), machine = (
        [scale.Preset("x", tall_config, [phase(samples_seen=num)]) for num in (0, 64_000)],
        scale.machine_of("H200", 0.3),
    )
    unseen = "samples that are never seen"
    assert scale.data_needs(taken, 1_000_000)[unseen] == 0
    assert scale.data_needs(trained, 1_000_000)[unseen] == 1_000_000 / 64_000
    both = list(scale.first_rows([taken, trained], machine))
    assert {len(row) for row in both if row[0] == "x"} == {4}


def test_what_is_not_known_is_said():
    with pytest.raises(ConfigError, match=r"--gpu TPU is not known. Hint: one of V100"):
        scale.machine_of("TPU", 0.3)
    with pytest.raises(ConfigError, match=r"--mfu 27: .* Hint: 0.27"):
        scale.machine_of("H200", 27)
