"""Training: the loop, its resume, and that processes do not change the result."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from clipgraft import dist, train
from clipgraft.checkpoint import TrainingState, load_model, read_weights
from clipgraft.config import ConfigError
from clipgraft.data.download import download
from clipgraft.data.index import build_index
from clipgraft.data.shapes import draw_sample
from clipgraft.data.shards import write_shards
from clipgraft.embed import embed
from clipgraft.models.positions import resize_positions, sincos_table
from clipgraft.pretrain import pretrain
from clipgraft.settings import EmbedSettings, IndexJob, PretrainJob, ShardJob
from clipgraft.sources import TarSource

NUM = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Index and shards of a few pictures with two captions each, from a tar."""
    folder = tmp_path_factory.mktemp("data")
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


def phase(**changes: object) -> PretrainJob:
    raw = {
        "name": "short",
        "image_size": 16,
        "text_length": 12,
        "samples_seen": 160,
        "batch_size": 16,
        "optim": {"lr": 1e-3},
        "crop_scale": (0.8, 1.0),
        "seed": 0,
        "model": {
            "config": {
                "embed_dim": 16,
                "vision_cfg": {"patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
                "text_cfg": {"width": 32, "heads": 2, "layers": 1},
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


def test_a_stopped_run_goes_on_and_ends_with_the_same_bits(data, tmp_path, monkeypatch):
    whole = folder(tmp_path / "whole")
    pretrain(phase(), *data, None, whole)
    resume, out = tmp_path / "resume", folder(tmp_path / "out")
    asked = {"count": 0}

    def stop_at_the_third_step(flag: bool, device: torch.device) -> bool:
        asked["count"] += 1
        return asked["count"] == 5  # asked twice a step: whether to stop, whether to save

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(dist, "any_true", stop_at_the_third_step)
        state = TrainingState(resume, "tag")
        pretrain(phase(), *data, None, out, state=state)
    state.close()
    assert left.value.code == 75
    assert not (out / "model.safetensors").exists()
    state = TrainingState(resume, "tag")
    assert state.load()["step"] == 3
    pretrain(phase(), *data, None, out, state=state)
    state.close()
    expected, got = read_weights(whole), read_weights(out)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


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


def test_a_loss_that_is_not_finite_stops_and_names_the_steps(data, tmp_path, monkeypatch):
    def broken(*_: object, **__: object) -> torch.Tensor:
        return torch.tensor(float("nan"), requires_grad=True)

    monkeypatch.setattr(train, "contrastive_loss", broken)
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
        Tokenizer(loaded.tokenizer).encode_batch(samples.captions(7), text_length=12)
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
    with caplog.at_level("INFO", logger="clipgraft.train"):
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
    answers = iter([False, False, True, *[False] * 20])  # asked twice a step: stop after the second
    state = TrainingState(tmp_path / "resume", "tag")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(dist, "any_true", lambda *_: next(answers))
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
from clipgraft.train import pair_loss
torch.manual_seed(0)
x, y = torch.randn(8, 6), torch.randn(8, 6)
model = torch.nn.Linear(6, 4)
with dist.world() as world:
    ddp = torch.nn.parallel.DistributedDataParallel(model) if world.size > 1 else model
    b = 8 // world.size
    rows = slice(world.rank * b, (world.rank + 1) * b)
    for groups in (None, torch.tensor([0, 0, 1, 1, 1, 0, 2, 1])):
        features = normalize(ddp(torch.cat([x[rows], y[rows]])), dim=1)
        parts = features[:b], features[b:], torch.tensor(14.0)
        loss = pair_loss(world, *parts, label_smoothing=0.1, group_G=groups)
        model.zero_grad()
        loss.backward()
        total = dist.mean(loss.detach())
        if world.is_first:
            print(json.dumps([total.item(), model.weight.grad.tolist()]))
"""


def test_two_processes_have_the_loss_and_gradient_of_one_plain_and_grouped(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    results = []
    for command in ([sys.executable], torchrun):
        done = subprocess.run([*command, script], capture_output=True, text=True, check=True)
        results.append([json.loads(line) for line in done.stdout.splitlines()[-2:]])
    assert results[0][0] != results[0][1]
    for (loss_1, grad_1), (loss_2, grad_2) in zip(*results, strict=True):
        assert loss_2 == pytest.approx(loss_1, rel=1e-6)
        torch.testing.assert_close(torch.tensor(grad_2), torch.tensor(grad_1), rtol=1e-5, atol=1e-6)
