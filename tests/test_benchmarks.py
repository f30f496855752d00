"""The benchmarks, in small form: what they write can be read, both sides run, and how time is sorted is right."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from clipgraft import training_state
from clipgraft.checkpoint import load_model
from clipgraft.data.labels import read_labels
from clipgraft.data.shards import Shards
from clipgraft.data.tokens import BEGINS, CLASS, Tokens
from clipgraft.models.build import build, normalize
from clipgraft.models.training_blocks import speed_up

ROOT = Path(__file__).parent.parent
PARTS = {"attention", "mlp", "model", "loss", "optimizer", "normalise + copies", "gaps"}


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


LONG = pytest.mark.skipif(
    not os.environ.get("CLIPGRAFT_LONG_TESTS"), reason="takes a minute: make test LONG=1"
)


@functools.cache
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


@LONG
@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py"))
)
def test_every_benchmark_runs_to_its_end(name):
    if name == "evaluate" and "REALDATA" in os.environ:
        from evaluate import CACHE, PEER

        if not CACHE.is_dir():
            pytest.skip(f"{PEER[0]} is not in {CACHE}: benchmarks/evaluate.py fetches it")
    told = quick(name)
    assert told["name"] == name
    assert ratios(told)
    lacking = [row["name"] for row in told["rows"] if row["note"].startswith("REALDATA")]
    if lacking:
        pytest.skip(f"the others ran; without REALDATA not measured: {', '.join(lacking)}")


def test_both_sides_of_a_step_run_and_all_their_time_has_a_part():
    told = quick("train_step", "--only", "step", "parts")
    measured = ratios(told)
    for what in ("same longest", "padded to 77", "top 2 of 4: step", "MFU", "mlps", "routers"):
        assert any(what in name and ratio > 0 for name, ratio in measured.items()), what
    assert {name.rpartition(", ")[2] for name in told["profiles"]} == {"ours", "open_clip"}
    for name, shares in told["profiles"].items():
        assert shares.keys() == PARTS and sum(shares.values()) == pytest.approx(1, abs=0.02), name
        assert min(shares[part] for part in PARTS - {"gaps"}) > 0, (name, shares)


def test_a_side_that_is_optional_fails_alone_and_its_rows_say_why(monkeypatch):
    import train_step
    from _sides import Ours

    [case] = train_step.cpu_cases(quick=True)
    sides = {"compiled": Ours(changes={"no_such_setting": 1}), "ours_compiled": Ours()}
    monkeypatch.setattr(train_step, "compiled_sides", lambda case, context: sides)
    rows, profiles = train_step.step_rows(case, 0.05, 1)
    measured = {row.name.partition("step, ")[2]: row for row in rows}
    assert [name for name, row in measured.items() if row.ratio is None] == [
        "open_clip with --torchcompile",
        "both compiled",
    ]
    for name in ("open_clip with --torchcompile", "both compiled"):
        assert "ValidationError" in measured[name].note or "ConfigError" in measured[name].note
    assert len(rows) == 4 and len(profiles) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="processes take a CUDA device each")
def test_two_processes_run_as_one_side():
    import train_step

    [case] = train_step.cpu_cases(quick=True)
    rows = train_step.process_rows(case, 0.05, 1)
    assert len(rows) == len(train_step.MEETINGS)
    assert all(row.ratio is not None and row.ratio > 0 for row in rows)


@dataclass(frozen=True)
class LastFails:
    """A side of two processes, of which the first would wait for the other one for long."""

    processes = 2

    def size(self, case: object) -> int:
        return 1

    def run(self, case: object, orders: object, folder: Path) -> None:
        if os.environ["RANK"] == "1":
            raise ValueError("the last one fails")
        time.sleep(500)


def test_a_process_that_fails_is_told_while_the_first_one_says_nothing():
    import train_step
    from _turns import turns

    [case] = train_step.cpu_cases(quick=True)
    with pytest.raises(RuntimeError, match="the last one fails"):
        turns({"odd": LastFails()}, case, 0.05, 1)


def test_waiting_for_data_is_a_part_of_a_profile(monkeypatch):
    import _profile

    now = 0.0

    def took(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(_profile, "time", SimpleNamespace(perf_counter=lambda: now))

    def loader() -> Iterator[int]:
        for step in range(6):
            took(3.0 if step in (2, 3) else 50.0)
            yield step

    @contextmanager
    def taken() -> Iterator[dict[str, float]]:
        table: dict[str, float] = {}
        took(9.0)
        yield table
        took(9.0)
        table |= {"mlp": 0.1, "gaps": 0.9}

    found: list[dict[str, float]] = []
    seen = []
    for step in _profile.watched(loader(), taken, range(2, 4), found.append):
        seen.append(step)
        took(2.0 if step in (2, 3) else 70.0)
    assert seen == list(range(6))
    assert found == [{"mlp": 0.1, "data": pytest.approx(0.6), "gaps": pytest.approx(0.3)}]


def test_the_file_of_results_has_what_was_measured_before_time_ran_out(tmp_path, monkeypatch):
    import train_step
    from _common import Row

    def one_and_no_more(*_):
        yield [Row("a", 1.0, 1.0, "samples/s", 1.0, None)], {}
        raise KeyboardInterrupt

    monkeypatch.setattr(train_step, "every_step", one_and_no_more)
    monkeypatch.setattr("sys.argv", ["train_step", "--quick", "--json", str(tmp_path / "found")])
    with pytest.raises(KeyboardInterrupt):
        train_step.main()
    assert [row["name"] for row in json.loads((tmp_path / "found").read_text())["rows"]] == ["a"]


@LONG
def test_every_switch_has_a_row():
    measured = ratios(quick("train_step"))
    switches = ("fp32", "torch's choice", "trimmed", "AdamW", "grad_checkpointing", "accumulate")
    switches += ("vocabulary", "without their padding")
    if not torch.cuda.is_available():
        switches += ("through memory", "bucket_view", "static graph")
    for what in (*switches, "a whole", "stem", "last block", "freed memory"):
        assert any(what in name and ratio > 0 for name, ratio in measured.items()), what


@LONG
def test_both_trainings_run_to_their_end_on_the_same_photos():
    told = quick("train_run")
    measured = ratios(told)
    sides = ("ours", "open_clip on photos", "open_clip on our shards")
    assert [name.partition(", ")[2] for name in told["profiles"]] == list(sides)
    for shares in told["profiles"].values():
        assert shares.keys() == {*PARTS, "data"} and sum(shares.values()) == pytest.approx(
            1, abs=0.02
        )
        assert min(shares[part] for part in PARTS - {"gaps"}) > 0, shares
    for what in ("excluding start-up", "including start-up"):
        for source in ("photos", "our shards"):
            assert any(f": {what}, open_clip on {source}" in name for name in measured)
    [prepared] = [name for name in measured if "with preparation" in name]
    assert (
        0
        < measured[prepared]
        < measured[prepared.replace("with preparation", "including start-up")]
    )
    for row in told["rows"]:
        found = re.search(r"quarter ([\d.]+) \(ours\), ([\d.]+)", row["note"])
        losses = map(float, found.groups()) if found else ()
        assert all(each < 1.1 * math.log(16) for each in losses), (
            "they begin at the log of the batch"
        )


def test_shards_and_labels_of_many_rows_can_be_read(tmp_path, monkeypatch):
    from loader import ours, prepare, write_many

    monkeypatch.delenv("REALDATA", raising=False)
    monkeypatch.setattr("_photos.WIDTH", 192)
    monkeypatch.setattr("_photos.HEIGHT", 144)
    prepare(tmp_path, 24)
    shard, labelled = write_many(tmp_path, 1000)
    shards = Shards.open(shard)
    labels_N = read_labels(labelled, shards.samples_id)
    assert len(shards) == len(labels_N) == 1000
    assert shards.jpeg(999) == shards.jpeg(999 % 24) and labels_N[999] == labels_N[999 % 24]
    monkeypatch.setattr("loader.BATCH", 8)
    assert ours(tmp_path, "staged", epochs=1)() == 24


def test_tokens_of_many_rows_can_be_read(tmp_path):
    from text_reduction import SYNTAX, draw_batches, index, write_big

    captions = [
        f"a {colour} dog jumps over number {i}" for i, colour in enumerate(("red", "blue", "old"))
    ]
    assert index(captions, tmp_path) == 3
    big = tmp_path / "big"
    big.mkdir()
    write_big(tmp_path, big, 1000)
    few, many = Tokens.open(tmp_path), Tokens.open(big)
    assert many.num_captions == 1002
    for first in (0, 600, 999):
        three_B = first + np.arange(3)
        text_BL = many.encode(three_B, 8, SYNTAX)
        assert (text_BL == few.encode(np.arange(3), 8, SYNTAX)).all()
        assert (many.captions_of(three_B)[0] == three_B).all()
        assert (many.first_sentence(three_B) == few.first_sentence(np.arange(3))).all()
    assert len(draw_batches(big, 6)["batch_seconds"]) == 1


def test_made_up_captions_are_those_of_flickr8k_by_length_and_class(tmp_path, monkeypatch):
    from token_reduction import LENGTH, PIECES, SHARES, write_captions

    monkeypatch.delenv("REALDATA", raising=False)
    _, num = write_captions(tmp_path, 1000)
    Tokens.open(tmp_path)
    length_C = np.diff(np.load(tmp_path / "tokens/caption_offsets.npy"))
    words_T = np.load(tmp_path / "tokens/words.npy")
    class_W = words_T[(words_T & BEGINS) > 0] & CLASS
    assert len(length_C) == num == 1000
    assert (length_C.mean(), length_C.std()) == pytest.approx(LENGTH, rel=0.05)
    assert len(words_T) / len(class_W) == pytest.approx(PIECES, abs=0.01)
    assert np.bincount(class_W) / len(class_W) == pytest.approx(SHARES, abs=0.02)


def test_a_step_of_token_reduction_gives_gradients():
    from token_reduction import b16, built, training_step

    config = b16(1, 32, 8)
    config["text_cfg"] |= {"width": 64, "heads": 2}
    config["vision_cfg"] |= {"width": 64, "head_width": 32}
    model = built(config, {"kind": "grid"})
    assert training_step(model, 2, 32, 8, torch.device("cpu"))() == 2
    assert all(each.grad is not None for each in model.parameters())


@pytest.mark.parametrize("name", ["ours", "open_clip", "ours_rgcl_g", "fast_clip"])
def test_losses_of_all_sides_run(name):
    from contrastive_loss import LOSSES, features

    inputs = features(6, "cpu")
    LOSSES[name]()(*inputs).backward()
    assert all(each.grad is not None for each in inputs)


def test_points_and_a_model_of_the_benchmarks_can_be_read(tmp_path):
    from cluster import inertias, ours, write_points
    from evaluate import towers, write_model

    write_points(tmp_path / "points.npy", 200, 16, 0)
    _, [assigned_N] = ours([tmp_path / "points.npy"], 0)
    assert all(0 < each < 1 for each in inertias(tmp_path / "points.npy", assigned_N))
    write_model(tmp_path / "model", towers("tests/config/small.yaml"))
    assert load_model(tmp_path / "model/ours").spec["config"]["vision_cfg"]["image_size"] == 48


def test_evaluation_is_compared_with_the_fastest_number_of_workers(tmp_path, monkeypatch):
    import evaluate

    own = {f"{a}_retrieval_recall@{k}": 0.5 for a in ("image", "text") for k in (1, 5, 10)}
    ways = {way: {f"R@{k}": 0.5 for k in (1, 5, 10)} for way in ("image_to_text", "text_to_image")}
    seconds, calls = {0: 4.0, 1: 2.0, 4: 3.0}, []

    def peers(models, data, out, task, workers):
        calls.append(workers)
        return seconds[workers], own

    monkeypatch.setattr(evaluate, "peers", peers)
    monkeypatch.setattr(evaluate, "ours", lambda *_: (1.0, {"retrieval": ways}))
    monkeypatch.setattr(evaluate, "as_folder", lambda *_: (1.0, own))
    (tmp_path / "samples.json").write_text('{"num_samples": 6}')
    where = tmp_path, tmp_path / "wds_data_test", tmp_path, tmp_path / "out"
    rows = {row.name: row for row in evaluate.compared(*where, 2, evaluate.WORKERS)}
    assert calls == [0, 1, 4, 1, 4, 1, 4]
    best = next(
        row for name, row in rows.items() if name.startswith("stage: retrieval") and row.target
    )
    assert (best.peer, best.ratio) == (
        3.0,
        2.0,
    ) and "1 workers, the fastest of 0, 1, 4" in best.note
    default = rows[f"{best.name}, beside 4 workers"]
    assert (default.peer, default.target) == (2.0, None) and "its default" in default.note


def test_saving_misses_its_bound_where_the_pace_is_wrong(tmp_path, monkeypatch):
    from resume import saving_of_state

    model = nn.Linear(8, 8)
    assert saving_of_state("paced", model, tmp_path / "paced", 3).ratio > 1
    monkeypatch.setattr(training_state, "SAVE_SECONDS", 0.01)
    monkeypatch.setattr(training_state, "SAVE_SHARE", 1.0)
    monkeypatch.setattr(training_state.Pace, "is_due", lambda self: True)
    assert saving_of_state("always", model, tmp_path / "always", 3).ratio < 0.1


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


@pytest.mark.parametrize("is_fast", [False, True])
def test_flops_of_a_step_are_those_that_torch_counts_without_padding(is_fast):
    from _turns import batch_of, text_lengths
    from train_step import flops, gpu_cases, left_out

    case = replace(gpu_cases(quick=True)[-1], num_experts=0, lengths=(14.1, 4.0), longest=24)
    images_BCHW, text_BL = batch_of(case, 0, 77)
    model = build(case.config)
    if is_fast:
        speed_up(model)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for row, length in enumerate(text_lengths(case, 0)):
            pixels = images_BCHW[row : row + 1].float()
            image_BD, text_BD, _ = model(pixels, text_BL[row : row + 1, :length])
            (image_BD.sum() + text_BD.sum()).backward()
    counted = counter.get_total_flops() / case.batch
    assert 0 < left_out(case) < flops(case)
    assert flops(case) - is_fast * left_out(case) == pytest.approx(counted, rel=1e-6)


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
