"""Training: the loop, its resume, and that processes do not change the result."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from clipgraft import dist, objectives, training_state
from clipgraft.checkpoint import load_model, read_weights
from clipgraft.config import ConfigError
from clipgraft.data.download import download
from clipgraft.data.index import build_index
from clipgraft.data.memory import SampleMemory
from clipgraft.data.shapes import draw_sample
from clipgraft.data.shards import write_shards
from clipgraft.embed import embed
from clipgraft.gradcache import backward_in_parts
from clipgraft.models.positions import resize_positions, sincos_table
from clipgraft.objectives import Features, pair_loss
from clipgraft.pretrain import pretrain
from clipgraft.settings import (
    EmbedSettings,
    IndexJob,
    PretrainJob,
    ShardJob,
)
from clipgraft.sources import TarSource
from clipgraft.train import Fit
from clipgraft.training_state import TrainingState

NUM = 40


def make_data(folder: Path) -> tuple[Path, Path]:
    """Index and shards of a few pictures with two captions each, from a tar."""
    with tarfile.open(folder / "x.tar", "w") as tar:
        for i in range(NUM):
            sample = draw_sample(0, "train", i, image_size=32, num_captions=2)
            image = io.BytesIO()
            sample.image.save(image, "JPEG", quality=95)
            captions = json.dumps({"captions": sample.captions}).encode()
            for name, content in ((f"{i:04d}.jpg", image.getvalue()), (f"{i:04d}.json", captions)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for name in ("download", "index", "shard"):
        (folder / name).mkdir()
    download(TarSource(kind="tars", tars=str(folder / "x.tar")), folder / "download", threads=1)
    build_index(IndexJob(tokenize=True), folder / "download", folder / "index", threads=1)
    settings = ShardJob(image_size=16, oversize=1.0)
    write_shards(settings, folder / "index", folder / "shard", threads=1)
    return folder / "index", folder / "shard"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


def phase(**changes: object) -> PretrainJob:
    raw = {
        "name": "short",
        "image_size": 16,
        "text_length": 24,  # more than captions have: padding is trimmed, and left out
        "samples_seen": 160,
        "batch_size": 16,
        "optim": {"lr": 1e-3},
        "crop_scale": (0.8, 1.0),
        "seed": 0,
        "model": {
            "config": {
                "embed_dim": 16,
                "vision_cfg": {"patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
                "text_cfg": {"width": 32, "heads": 2, "layers": 2},
            }
        },
    }
    return PretrainJob(**{**raw, **changes})


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLIPGRAFT_PRECISION", "fp32")


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_training_learns_and_tells_what_it_did(data, tmp_path):
    out = folder(tmp_path / "out")
    settings = phase(samples_seen=960, optim={"lr": 3e-3})
    facts = pretrain(settings, *data, None, out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(math.log(16), rel=0.3)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert facts["samples_seen"] == 960 == rows[-1]["samples_seen"]
    assert facts["num_steps"] == 60 == rows[-1]["step"]
    for key in ("tau", "lr", "samples_per_second", "data_wait", "seconds"):
        assert math.isfinite(rows[-1][key])


def test_gradients_are_no_longer_than_they_may_be(data, tmp_path):
    """All of them together, as the optimizer is given them; and shorter ones are left alone."""
    norms: dict[float | None, list[float]] = {}
    for most in (None, 0.05, 1e3):
        found = norms[most] = []

        def measure(optimizer: torch.optim.Optimizer, *_: object, found=found) -> None:
            every = [p.grad for group in optimizer.param_groups for p in group["params"]]
            found.append(torch.cat([grad.double().flatten() for grad in every]).norm().item())

        hook = register_optimizer_step_pre_hook(measure)
        optim = {"lr": 1e-4, "max_grad_norm": most}
        try:
            pretrain(phase(samples_seen=48, optim=optim), *data, None, folder(tmp_path / str(most)))
        finally:
            hook.remove()
    assert len(norms[None]) == 3 and min(norms[None]) > 1
    assert norms[0.05] == pytest.approx([0.05] * 3, rel=1e-4)
    assert norms[1e3] == norms[None]


@pytest.mark.parametrize(("by", "end"), [(9.0, 0.05), (-9.0, 0.2)])
def test_the_temperature_stays_between_its_bounds(data, tmp_path, by, end):
    """However far a step moves the log of its inverse, the one parameter without a dimension."""

    def move(optimizer: torch.optim.Optimizer, *_: object) -> None:
        (scale,) = (p for group in optimizer.param_groups for p in group["params"] if not p.dim())
        scale.data += by

    hook = register_optimizer_step_post_hook(move)
    try:
        settings = phase(samples_seen=48, temperature=0.1, loss={"tau_bounds": (0.05, 0.2)})
        pretrain(settings, *data, None, folder(tmp_path / "out"))
    finally:
        hook.remove()
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["tau"] for row in rows] == pytest.approx([end] * 3, rel=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lamb", "lion", "sgd"])
def test_every_optimizer_goes_on_after_a_kill_with_the_same_bits(data, tmp_path, monkeypatch, name):
    """With a learning rate of its own for the temperature."""
    loss = {"kind": "rgcl_g", "rho": 0.5, "lr_tau": 1e-2, "lr_tau_schedule": "const"}
    optim = {"name": name, "lr": 1e-3, "weight_decay": 0.1}
    settings, whole = phase(loss=loss, temperature=0.1, optim=optim), folder(tmp_path / "whole")
    pretrain(settings, *data, None, whole)
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(last["loss"]) and last["tau"] != pytest.approx(0.1, rel=1e-2)
    monkeypatch.setattr(training_state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(TrainingState, "save", saving_until(4, TrainingState.save))
    state, out = TrainingState(tmp_path / "resume", "tag"), folder(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings, *data, None, out, state=state)
    assert not (out / "model.safetensors").exists()
    pretrain(settings, *data, None, out, state=state)
    state.close()
    assert (whole / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_resumed_training_has_all_rows_of_one_that_was_not_stopped(data, tmp_path, monkeypatch):
    whole, out = folder(tmp_path / "whole"), folder(tmp_path / "out")
    pretrain(phase(), *data, None, whole)
    monkeypatch.setattr(training_state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(TrainingState, "save", saving_until(4, TrainingState.save))
    state = TrainingState(tmp_path / "resume", "tag")
    with pytest.raises(KeyboardInterrupt):
        pretrain(phase(), *data, None, out, state=state)
    facts = pretrain(phase(), *data, None, out, state=state)
    state.close()
    expected, rows = (
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        for each in (whole, out)
    )
    assert [row["step"] for row in rows] == list(range(1, 11))
    timed = {"seconds", "samples_per_second", "data_wait"}
    for row, other in zip(rows, expected, strict=True):
        assert {key: row[key] for key in row.keys() - timed} == {
            key: other[key] for key in other.keys() - timed
        }
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and facts["train_seconds"] == seconds[-1]


def test_threads_of_the_loader_do_not_change_the_result(data, tmp_path):
    outs = [folder(tmp_path / str(threads)) for threads in (1, 3)]
    for threads, out in zip((1, 3), outs, strict=True):
        pretrain(phase(), *data, None, out, threads=threads)
    first, second = (read_weights(out) for out in outs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_phase_starts_from_the_one_before_with_positions_interpolated(data, tmp_path):
    short, full = folder(tmp_path / "short"), folder(tmp_path / "full")
    pretrain(phase(), *data, None, short)
    settings = phase(image_size=32, text_length=16, samples_seen=0)
    pretrain(settings, *data, short, full)
    before, after = read_weights(short), read_weights(full)
    assert after["visual.positional_embedding"].shape == (1 + 16, 32)
    assert after["text.positional_embedding"].shape == (16, 32)
    resized = {name for name in before if before[name].shape != after[name].shape}
    assert resized == {"visual.positional_embedding", "text.positional_embedding"}
    same = before.keys() - resized
    assert all(torch.equal(before[name], after[name]) for name in same)
    assert load_model(full).spec["preprocess"]["size"] == 32


def test_frozen_positions_stay_and_learned_ones_move(data, tmp_path):
    """The two phases of CLIPA v1, then a recomputed table as in v2."""
    name, outs = "visual.positional_embedding", [folder(tmp_path / each) for each in "abc"]
    changes = {"samples_seen": 48, "optim": {"lr": 1e-2, "weight_decay": 0.5}}
    pretrain(phase(**changes, pos_embed="sincos_frozen"), *data, None, outs[0])
    frozen = read_weights(outs[0])[name]
    assert torch.equal(frozen, sincos_table(32, 2, "mae"))
    facts = pretrain(phase(**changes, image_size=32, pos_embed="learned"), *data, outs[0], outs[1])
    state = {name: frozen, "text.positional_embedding": torch.zeros(12, 32)}
    loaded = load_model(outs[1])
    resize_positions(state, loaded.model)
    moved = (read_weights(outs[1])[name] - state[name])[1:].abs().mean(dim=1)
    assert (moved > 1e-4).all() and moved.max() < 0.2
    assert loaded.model.visual.positional_embedding.requires_grad
    done = {"pos_embed": "learned", "image": "interpolate", "sincos_form": None, "text": "linear"}
    assert facts["positions"] == loaded.spec["positions"] == done
    rules = {"pos_embed": "sincos_frozen", "pos_resize": "recompute", "sincos_form": "moco"}
    pretrain(phase(**changes, image_size=24, **rules), *data, outs[1], outs[2])
    assert torch.equal(read_weights(outs[2])[name], sincos_table(32, 3, "moco"))
    assert not load_model(outs[2]).model.visual.positional_embedding.requires_grad


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path):
    world = dist.World(0, 3, torch.device("cpu"))
    fit = SimpleNamespace(world=world, settings=phase())
    message = "batch_size = 16 does not divide by 3 processes. Hint: 15, or fewer processes"
    with pytest.raises(ConfigError, match=message):
        Fit.run(fit, tmp_path)


def test_a_loss_that_is_not_finite_stops_and_names_the_steps(data, tmp_path, monkeypatch):
    def broken(*_: object, **__: object) -> torch.Tensor:
        return torch.tensor(float("nan"), requires_grad=True)

    monkeypatch.setattr(objectives, "contrastive_loss", broken)
    with pytest.raises(ConfigError, match="loss is nan between steps 0 and 1 of 10"):
        pretrain(phase(), *data, None, folder(tmp_path / "out"))


def test_a_batch_larger_than_the_data_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=rf"batch_size = 64 is larger than the data \({NUM}"):
        pretrain(phase(batch_size=64), *data, None, folder(tmp_path / "out"))


def test_embeddings_are_unit_rows_in_sample_order_and_average_the_captions(data, tmp_path):
    model, out = folder(tmp_path / "model"), folder(tmp_path / "embed")
    pretrain(phase(), *data, None, model)
    embed(EmbedSettings(), model, *data, out)
    import numpy as np

    from clipgraft.data.samples import Samples
    from clipgraft.data.tokens import Tokenizer

    text_ND = np.load(out / "text.npy").astype(np.float32)
    image_ND = np.load(out / "image.npy").astype(np.float32)
    assert text_ND.shape == image_ND.shape == (NUM, 16)
    np.testing.assert_allclose(np.linalg.norm(image_ND, axis=1), 1, atol=2e-3)
    loaded, samples = load_model(model), Samples.open(data[0])
    tokens_CL = torch.from_numpy(
        Tokenizer(loaded.tokenizer).encode_batch(samples.captions(7), text_length=24)
    )
    with torch.no_grad():
        features_CD = loaded.model.eval().encode_text(tokens_CL, normalize=True)
    mean_D = torch.nn.functional.normalize(features_CD.mean(0), dim=0).numpy()
    assert len(features_CD) == 2
    np.testing.assert_allclose(text_ND[7], mean_D, atol=2e-3)


def test_augmented_training_on_shuffled_blocks_does_not_depend_on_threads(data, tmp_path):
    changes = {
        "samples_seen": 64,
        "flip_prob": 0.5,
        "color_jitter": (0.4, 0.4, 0.4, 0.1),
        "gray_scale_prob": 0.2,
        "shuffle_block": 4,
    }
    weights = []
    for name, threads, settings in (
        ("one", 1, phase(**changes)),
        ("three", 3, phase(**changes)),
        ("other", 1, phase(**changes | {"flip_prob": 0.4})),
    ):
        out = folder(tmp_path / name)
        pretrain(settings, *data, None, out, threads=threads)
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


LOSSES = {
    "siglip": {"kind": "siglip"},
    "v0": {"kind": "gcl", "temperature": "learned"},
    "v1": {"kind": "gcl", "gamma": {"schedule": "constant", "min": 0.5}},
    "v2": {"kind": "rgcl", "lr_tau": 0.0133, "lr_tau_schedule": "const", "rho": 0.5},
    "v3": {"kind": "rgcl_g", "rho": 0.5, "lr_tau": 2e-4, "lr_tau_schedule": "step_thresh"},
    "scent": {"kind": "rgcl_g", "rho": 0.5, "gamma": {"schedule": "scent"}},
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_learns_to_tell_pairs_apart(data, tmp_path, name):
    out = folder(tmp_path / "out")
    settings = phase(samples_seen=960, optim={"lr": 3e-3}, temperature=0.1, loss=LOSSES[name])
    pretrain(settings, *data, None, out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    key = "loss" if name == "siglip" else "infonce"
    assert rows[-1][key] < rows[0][key] - 0.3
    assert all(math.isfinite(value) for value in rows[-1].values())
    if name != "siglip":
        assert rows[0]["gamma"] == 1 >= rows[-1]["gamma"] > 0
        assert rows[0]["drift"] == 0 < rows[-1]["drift"]
    if name in ("v1", "v2"):
        assert rows[-1]["tau"] == pytest.approx(0.1)
    if name == "v2":
        assert rows[-1]["tau_mean"] != pytest.approx(0.1, rel=1e-3)


def test_the_sigmoid_loss_may_follow_another_one(data, tmp_path):
    first, second = folder(tmp_path / "first"), folder(tmp_path / "second")
    pretrain(phase(samples_seen=64), *data, None, first)
    assert load_model(first).model.logit_bias is None
    pretrain(phase(samples_seen=64, loss={"kind": "siglip"}), *data, first, second)
    bias = load_model(second).model.logit_bias
    assert bias is not None and 0 < abs(bias.item() + 10) < 0.1


@pytest.mark.parametrize("name", ["v2", "v3"])
def test_what_is_remembered_of_samples_survives_a_stop(data, tmp_path, monkeypatch, name):
    settings, whole = phase(loss=LOSSES[name], temperature=0.1), folder(tmp_path / "whole")
    tables = []
    monkeypatch.setattr(
        objectives,
        "SampleMemory",
        lambda *args: tables.append(SampleMemory(*args)) or tables[-1],
    )
    pretrain(settings, *data, None, whole)
    monkeypatch.setattr(training_state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(TrainingState, "save", saving_until(4, TrainingState.save))
    state, out = TrainingState(tmp_path / "resume", "tag"), folder(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings, *data, None, out, state=state)
    pretrain(settings, *data, None, out, state=state)
    state.close()
    expected, killed, got = (table.state() for table in tables)
    assert not torch.equal(expected, killed) and expected[:, 0].isfinite().all()
    assert torch.equal(expected, got)
    assert (whole / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def saving_until(step: int, save):
    """A kill right after the state of a step was saved, once."""
    killed = []

    def save_and_die(self: TrainingState, state: dict) -> None:
        save(self, state)
        if state["step"] == step and not killed:
            killed.append(True)
            raise KeyboardInterrupt

    return save_and_die


@pytest.mark.parametrize("name", ["contrastive", *LOSSES])
def test_a_batch_in_parts_trains_like_the_whole_batch(data, tmp_path, name):
    weights = []
    for accumulate in (1, 4):
        out = folder(tmp_path / str(accumulate))
        loss = LOSSES.get(name, {"kind": "contrastive"})
        optim = {"lr": 1e-2, "eps": 1e-2}  # with a small eps, Adam takes whole steps for rounding
        settings = phase(
            loss=loss, accumulate=accumulate, temperature=0.1, samples_seen=64, optim=optim
        )
        pretrain(settings, *data, None, out)
        weights.append(read_weights(out))
    whole, parts = weights
    for key in whole:
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-5, atol=4e-6)


def test_parts_have_the_gradient_of_the_whole_and_draw_the_same_random_numbers():
    torch.manual_seed(0)
    model = Towers().double()
    x = torch.randn(2, 8, 6, dtype=torch.float64)

    def loss_of(image_BD, text_BD, scale, bias):
        assert bias is None
        features = Features(image_BD, text_BD, scale)
        return pair_loss(dist.World(0, 1, torch.device("cpu")), features), {}

    def encode(model, part, num_parts):
        return (*model(*(side.chunk(num_parts)[part] for side in x)), None)

    whole, _ = loss_of(*encode(model, 0, 1))
    whole.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for num_parts in (2, 4):
        model.zero_grad()
        loss, _ = backward_in_parts(model, num_parts, partial(encode, num_parts=num_parts), loss_of)
        assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
        for name, p in model.named_parameters():
            assert (p.grad - expected[name]).norm() <= 1e-6 * expected[name].norm()
    model.dropout, drawn = 0.5, []
    backward_in_parts(
        model, 2, lambda m, part: drawn.append(encode(m, part, 2)) or drawn[-1], loss_of
    )
    for first, second in zip(drawn[:2], drawn[2:], strict=True):
        assert torch.equal(first[0], second[0])
    assert not torch.equal(drawn[0][0], encode(model, 0, 2)[0])


class Towers(torch.nn.Module):
    """The least that has an image, a text and a scale."""

    dropout = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, image, text):
        sides = self.image(F.dropout(image, self.dropout)), self.text(text)
        return (*(F.normalize(side, dim=1) for side in sides), self.logit_scale.exp())


IMAGE_REDUCTIONS = {"resize": 16, "random": 8, "grid": 4, "block": 4}  # of 16 patches
TEXT_REDUCTIONS = ["truncate", "random", "block", "syntax", "frequency"]


def small_patches(**changes: object) -> PretrainJob:
    model = phase().model.model_dump()
    model["config"]["vision_cfg"]["patch_size"] = 4
    return phase(text_length=6, model=model, **changes)


@pytest.mark.parametrize("text", TEXT_REDUCTIONS)
@pytest.mark.parametrize("image", IMAGE_REDUCTIONS)
def test_any_image_reduction_goes_with_any_text_reduction(data, tmp_path, caplog, image, text):
    settings = small_patches(samples_seen=32, image_reduction=image, text_reduction=text)
    with caplog.at_level("INFO", logger="clipgraft"):
        facts = pretrain(settings, *data, None, folder(tmp_path / "out"))
    kept = IMAGE_REDUCTIONS[image]
    assert (facts["image_tokens"], facts["text_tokens"]) == (1 + kept, 6)
    assert math.isfinite(facts["metrics"]["loss"])
    share = "16" if image == "resize" else f"{kept} of 16"
    assert f"image 16 px = {share} patches, text 6 tokens" in caplog.text


def test_dropped_patches_and_words_are_the_same_again_with_other_threads_and_another_start(
    data, tmp_path, monkeypatch
):
    changes = {"image_reduction": "random", "text_reduction": "frequency", "samples_seen": 96}
    outs = {name: folder(tmp_path / name) for name in ("one", "three", "later", "other")}
    pretrain(small_patches(**changes), *data, None, outs["one"], threads=1)
    pretrain(small_patches(**changes), *data, None, outs["three"], threads=3)
    pretrain(small_patches(**changes, seed=1), *data, None, outs["other"])
    monkeypatch.setattr(training_state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(TrainingState, "save", saving_until(2, TrainingState.save))
    state = TrainingState(tmp_path / "resume", "tag")
    with pytest.raises(KeyboardInterrupt):
        pretrain(small_patches(**changes), *data, None, outs["later"], state=state)
    pretrain(small_patches(**changes), *data, None, outs["later"], state=state)
    state.close()
    bytes_of = {name: (out / "model.safetensors").read_bytes() for name, out in outs.items()}
    assert bytes_of["one"] == bytes_of["three"] == bytes_of["later"] != bytes_of["other"]


def test_a_reduced_phase_writes_a_whole_model(data, tmp_path):
    out = folder(tmp_path / "out")
    pretrain(small_patches(image_reduction="grid", samples_seen=32), *data, None, out)
    loaded = load_model(out).model
    assert loaded.visual.positional_embedding.shape == (1 + 16, 32)
    with torch.no_grad():
        loaded.train().encode_image(torch.zeros(2, 3, 16, 16))  # drops nothing, needs no draws


PHASE = """
import sys, json
from pathlib import Path
from clipgraft.pretrain import pretrain
from clipgraft.settings import PretrainJob
settings, index, shard, out = sys.argv[1:]
pretrain(PretrainJob(**json.loads(settings)), Path(index), Path(shard), None, Path(out))
"""


def test_two_processes_drop_the_patches_that_one_does(data, tmp_path):
    script = tmp_path / "phase.py"
    script.write_text(PHASE)
    settings = small_patches(image_reduction="random", text_reduction="random", samples_seen=64)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two")
    pretrain(settings, *data, None, one)
    words = [settings.model_dump_json(), *map(str, data), str(two)]
    subprocess.run([*torchrun, script, *words], check=True, capture_output=True)
    losses = [
        [json.loads(row)["loss"] for row in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (one, two)
    ]
    whole = small_patches(text_reduction="random", samples_seen=64)
    facts = pretrain(whole, *data, None, folder(tmp_path / "whole"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert facts["metrics"]["loss"] != pytest.approx(losses[0][-1], rel=1e-3)


TWO = """
import json, torch
from torch.nn.functional import normalize
from clipgraft import dist
from clipgraft.data.loader import Batch
from clipgraft.data.memory import SampleMemory
from clipgraft.gradcache import backward_in_parts
from clipgraft.objectives import Features, expert_loss, memory_of, objective_of
from clipgraft.loss_settings import LossSettings
from clipgraft.recipes import OptimSettings

LOSSES = [
    {"kind": "siglip"}, {"kind": "gcl"},
    {"kind": "rgcl", "lr_tau": 0.01, "lr_tau_schedule": "const", "rho": 0.5},
    {"kind": "rgcl_g", "rho": 0.5}, {"kind": "rgcl_g", "gamma": {"schedule": "scent"}},
]

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = torch.nn.Linear(6, 4)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.3))
        self.logit_bias = torch.nn.Parameter(torch.tensor(-1.0))

    def forward(self, x, y):
        sides = [normalize(self.tower(side), dim=1) for side in (x, y)]
        return (*sides, self.logit_scale.exp() + 0 * self.logit_bias, self.logit_bias)

torch.manual_seed(0)
x, y = torch.randn(2, 8, 8, 6).unbind()
with dist.world() as world:
    b = 8 // world.size
    own = slice(world.rank * b, (world.rank + 1) * b)

    def start(tau):
        torch.manual_seed(0)
        model = Model()
        for scalar in (model.logit_scale, model.logit_bias):
            scalar.requires_grad_(tau == "learned")
        ddp = torch.nn.parallel.DistributedDataParallel(model) if world.size > 1 else model
        return model, ddp

    def report(loss, table=None):
        grads = [p.grad.flatten().tolist() for p in model.parameters() if p.requires_grad]
        total = dist.mean(loss.detach())
        if world.is_first:
            table = [] if table is None else table.nan_to_num(-1.0).tolist()
            print(json.dumps([total.item(), sum(grads, []), table]), flush=True)
        model.zero_grad()

    model, ddp = start("learned")
    for groups in (None, torch.tensor([0, 0, 1, 1, 1, 0, 2, 1])):
        features = Features(*ddp(x[0, own], y[0, own]))
        loss = expert_loss(world, features, 0.1, groups)[0]
        loss.backward()
        report(loss)
    for raw in LOSSES:
        settings = LossSettings(**raw)
        model, ddp = start(settings.tau)
        memory = memory_of(settings, 20, 0.1)
        objective = objective_of(world, settings, OptimSettings(lr=1.0), memory, 3)
        for step in range(3):
            rows = (torch.arange(8) * 3 + step // 2) % 20
            batch = Batch(torch.empty(b), torch.empty(b), rows[own], rows[own])
            encode = lambda m, part: m(x[step, own].chunk(2)[part], y[step, own].chunk(2)[part])
            loss, _ = backward_in_parts(
                ddp, 2, encode, lambda *f: objective(Features(*f), [], batch, float(step))
            )
            if memory is not None:
                memory.settle()
            report(loss, None if memory is None else memory.state())
"""


def test_two_processes_have_the_loss_gradient_and_memory_of_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    results = []
    for command in ([sys.executable], torchrun):
        done = subprocess.run([*command, script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append([json.loads(line) for line in done.stdout.splitlines() if line[0] == "["])
    assert len(results[0]) == 2 + 5 * 3
    assert results[0][0][:2] != results[0][1][:2]
    for one, two in zip(*results, strict=True):
        assert two[0] == pytest.approx(one[0], rel=1e-5)
        for its, ours in zip(two[1:], one[1:], strict=True):
            torch.testing.assert_close(torch.tensor(its), torch.tensor(ours), rtol=1e-4, atol=2e-6)


def test_activations_computed_again_change_the_work_and_no_weight(data, tmp_path):
    """Once for each block is what `no_grad` keeps, once more is the backward pass."""
    counts, weights = [], []
    for again in (False, True):
        ran = []
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, _, ran=ran: ran.append(type(module).__name__)
        )
        settings = phase(samples_seen=32, grad_checkpointing=again)
        pretrain(settings, *data, None, folder(tmp_path / f"{again}"))
        hook.remove()
        counts.append(sum(name.endswith("Block") for name in ran))
        weights.append(read_weights(tmp_path / f"{again}"))
    assert counts[1] == 2 * counts[0] > 0
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
