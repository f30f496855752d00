"""Training from references: what they are shown, what is locked, and that nothing depends on how a batch is cut."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_train import PHASE, folder, make_data, phase, saving_until

from clipgraft import devices, training_state
from clipgraft.checkpoint import load_model, read_weights, save_model
from clipgraft.config import ConfigError
from clipgraft.data.loader import Loader
from clipgraft.data.samples import Samples
from clipgraft.data.tokens import Tokens
from clipgraft.data.vocabulary import Encoder, clip_merges, is_same_vocabulary
from clipgraft.loss_settings import ReferenceSettings
from clipgraft.models.build import build, describe
from clipgraft.pretrain import pretrain
from clipgraft.references import OnlineReference
from clipgraft.training_data import Data, ordinary_batches
from clipgraft.training_state import TrainingState

CPU = torch.device("cpu")
SCALE = 6.0
V3 = {"kind": "rgcl_g", "rho": 0.5, "margins": "reference", "weight": 0.5}
STABLE = {"lr": 1e-2, "eps": 1e-2}  # with a small eps, Adam takes whole steps for rounding


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLIPGRAFT_PRECISION", "fp32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def references(data, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders: `near` has the vocabulary, dimension and side of the model, `far` has none of them."""
    root, tokens = tmp_path_factory.mktemp("references"), Tokens.open(data[0])
    Encoder(clip_merges()).write(root / "merges.txt.gz")
    far = {"dim": 24, "side": 24, "length": 20, "vocab_size": 49408}
    return {
        "near": made(root / "near", tokens.tokenizer, vocab_size=tokens.vocab_size),
        "far": made(root / "far", root / "merges.txt.gz", **far),
    }


def made(path: Path, tokenizer: Path, *, vocab_size: int, dim=16, side=16, length=12) -> Path:
    """A model folder of random weights."""
    config = {
        "embed_dim": dim,
        "quick_gelu": True,
        "custom_text": True,
        "vision_cfg": {"image_size": side, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": length, "vocab_size": vocab_size, "width": 32, "heads": 2, "layers": 2},
    }  # fmt: skip
    torch.manual_seed(dim)
    spec = describe(config)
    spec["preprocess"] |= {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.3, 0.4]}
    save_model(folder(path), build(config, temperature=1 / SCALE), spec, tokenizer)
    return path


def learning(references: dict[str, Path], *names: str, **changes: object):
    """A phase that learns from references."""
    raw = {
        "samples_seen": 64,
        "temperature": 0.1,
        "optim": STABLE,
        "references": [{"model": str(references[name])} for name in names],
        "distillation": {"feature": 0.5, "affinity": 1.0},
    }
    return phase(**{**raw, **changes})


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- what a reference is shown ------------------------------------------------------------------------------


def first_batch(data, **changes: object):
    opened, settings = Data.open(*data), phase(**changes)
    loader = Loader(
        opened.shards,
        opened.tokens,
        ordinary_batches(opened, settings, 0),
        image_size=16,
        text_length=4,
        crop_scale=(0.5, 1.0),
        seed=0,
        num_steps=1,
    )
    return opened, next(iter(loader))


@pytest.mark.parametrize("name", ["near", "far"])
def test_a_reference_sees_the_crop_at_its_own_side_and_the_drawn_caption_in_its_own_tokens(
    data, references, name
):
    opened, batch = first_batch(data)
    reference = OnlineReference(ReferenceSettings(model=str(references[name])), opened, CPU)
    ours = reference.features(batch.images_BCHW, batch)
    loaded = load_model(references[name])
    side = loaded.spec["preprocess"]["size"]
    pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in batch.images_BCHW]
    pixels = np.stack(
        [np.asarray(each.resize((side, side), Image.Resampling.BICUBIC)) for each in pictures]
    )
    images = (pixels / 255 - [0.3, 0.4, 0.5]) / [0.2, 0.3, 0.4]
    captions = [text for texts in Samples.open(data[0]).all_captions() for text in texts]
    assert len(captions) == 2 * len(opened.shards)
    texts = [captions[number] for number in batch.captions_B]
    merges = open_clip.SimpleTokenizer(bpe_path=str(loaded.tokenizer))
    tokens = merges(texts, loaded.spec["config"]["text_cfg"]["context_length"])
    with torch.no_grad():
        model = loaded.model.eval()
        image = F.normalize(
            model.encode_image(torch.tensor(images).permute(0, 3, 1, 2).float()), dim=1
        )
        text = F.normalize(model.encode_text(tokens), dim=1)
    torch.testing.assert_close(ours.text_BD, text, rtol=1e-5, atol=1e-6)
    if side == 16:
        torch.testing.assert_close(ours.image_BD, image, rtol=1e-5, atol=1e-6)
    else:  # PIL rounds to bytes
        assert (ours.image_BD * image).sum(1).min() > 0.9999
    assert ours.scale.item() == pytest.approx(SCALE, rel=1e-6)
    assert not ours.image_BD.requires_grad and reference.dim == image.shape[1]


def test_the_drawn_captions_are_of_the_samples_and_not_always_the_first(data):
    _, batch = first_batch(data)
    assert torch.equal(batch.captions_B // 2, batch.rows_B)
    assert set((batch.captions_B % 2).tolist()) == {0, 1}


def test_image_size_and_scale_of_a_reference_can_be_set(data, references):
    opened, batch = first_batch(data)
    settings = ReferenceSettings(model=str(references["near"]), image_size=32, scale=3.0)
    ours = OnlineReference(settings, opened, CPU).features(batch.images_BCHW, batch)
    model = load_model(references["near"], image_size=32).model.eval()
    assert ours.scale.item() == 3.0
    larger = F.interpolate(batch.images_BCHW.float(), (32, 32), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.3, 0.4, 0.5], [0.2, 0.3, 0.4]))
    image = F.normalize(model.encode_image((larger.clamp(0, 255) / 255 - mean) / std), dim=1)
    torch.testing.assert_close(ours.image_BD, image, rtol=1e-4, atol=1e-5)


def test_vocabularies_are_the_same_if_their_merges_are(data, tmp_path):
    merges, ours = open_clip.tokenizer.default_bpe(), tmp_path / "merges.txt.gz"
    Encoder(clip_merges()).write(ours)
    assert Path(merges).read_bytes() != ours.read_bytes()
    assert is_same_vocabulary(Path(merges), ours)
    assert not is_same_vocabulary(ours, Tokens.open(data[0]).tokenizer)


# --- training -----------------------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum_of_what_is_logged(data, references, tmp_path):
    weights = {"feature": 0.5, "affinity": 2.0, "interactive": 0.25}
    settings = learning(references, "near", "near", loss=V3, distillation=weights)
    pretrain(settings, *data, None, folder(tmp_path / "out"))
    for row in rows_of(tmp_path / "out"):
        total = sum(weight * row[name] for name, weight in {"pair": 0.5, **weights}.items())
        assert row["loss"] == pytest.approx(total, rel=1e-5)
        assert row["infonce"] == pytest.approx(math.log(16), rel=0.5)


def test_features_come_close_to_those_of_a_reference_of_another_dimension(
    data, references, tmp_path
):
    settings = learning(
        references, "far", samples_seen=960, optim={"lr": 3e-3}, distillation={"feature": 1.0}
    )
    pretrain(settings, *data, None, folder(tmp_path / "out"))
    rows = rows_of(tmp_path / "out")
    assert rows[0]["feature"] > 3 > 1 > rows[-1]["feature"]
    assert "projections.0.image" not in read_weights(tmp_path / "out")


@pytest.mark.parametrize("loss", [{"kind": "contrastive"}, V3], ids=["contrastive", "drrho"])
def test_a_batch_in_parts_trains_like_the_whole_batch_with_every_term(
    data, references, tmp_path, loss
):
    weights = []
    every = {"feature": 0.5, "affinity": 1.0, "interactive": 1.0}
    few = {"feature": 0.5, "affinity": 1.0}
    for names, terms in ((("near", "far"), few), (("near", "near"), every)):
        for accumulate in (1, 4):
            out = folder(tmp_path / f"{names[1]}{accumulate}")
            changes = {"loss": loss, "distillation": terms, "accumulate": accumulate}
            changes |= {"flip_prob": 0.5, "color_jitter": (0.4, 0.4, 0.4, 0.1)}
            pretrain(learning(references, *names, **changes), *data, None, out)
            weights.append(read_weights(out))
        whole, parts = weights[-2:]
        for key in whole:
            torch.testing.assert_close(parts[key], whole[key], rtol=1e-5, atol=2e-6)
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


def test_a_run_with_a_projection_goes_on_after_a_kill_with_the_same_bits(
    data, references, tmp_path, monkeypatch
):
    settings, whole = learning(references, "far", loss=V3), folder(tmp_path / "whole")
    pretrain(settings, *data, None, whole)
    monkeypatch.setattr(training_state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(TrainingState, "save", saving_until(2, TrainingState.save))
    state, out = TrainingState(tmp_path / "resume", "tag"), folder(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings, *data, None, out, state=state)
    saved = state.load()["trained"]
    assert saved["projections.0.image"].shape == (24, 16)
    pretrain(settings, *data, None, out, state=state)
    state.close()
    assert (whole / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_two_processes_learn_from_references_what_one_does(data, references, tmp_path):
    script = tmp_path / "phase.py"
    script.write_text(PHASE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    settings = learning(references, "near", "far", loss=V3, accumulate=2)
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two")
    pretrain(settings, *data, None, one)
    words = [settings.model_dump_json(), *map(str, data), str(two)]
    subprocess.run([*torchrun, script, *words], check=True, capture_output=True)
    for its, ours in zip(rows_of(one), rows_of(two), strict=True):
        for name in ("loss", "pair", "feature", "affinity", "infonce"):
            assert ours[name] == pytest.approx(its[name], rel=1e-4)
    first, second = read_weights(one), read_weights(two)
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=1e-4, atol=1e-5)


def test_references_in_bfloat16_have_the_terms_of_float32(data, references, tmp_path, monkeypatch):
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(devices, "precision", lambda *_, dtype=dtype: dtype)
        out = folder(tmp_path / str(dtype))
        settings = learning(references, "near", "far", loss=V3, samples_seen=16, accumulate=2)
        pretrain(settings, *data, None, out)
        rows.append(rows_of(out)[0])
    for name in ("pair", "feature", "affinity", "infonce"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=0.02, abs=0.02)
        assert rows[1][name] != rows[0][name]


# --- locks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def before(data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phase before, with a temperature of its own."""
    out = tmp_path_factory.mktemp("before")
    pretrain(phase(samples_seen=32, temperature=0.2), *data, None, out)
    return out


@pytest.mark.parametrize(("tower", "prefix"), [("image", "visual."), ("text", "text.")])
def test_a_locked_tower_stays_as_it_was_and_the_other_one_moves(
    data, before, tmp_path, tower, prefix
):
    for accumulate in (1, 2):
        out = folder(tmp_path / str(accumulate))
        optim = {"lr": 1e-2, "weight_decay": 0.5}
        settings = phase(samples_seen=48, lock=[tower], optim=optim, accumulate=accumulate)
        facts = pretrain(settings, *data, before, out)
        old, new = read_weights(before), read_weights(out)
        for name in old:
            is_locked = name.startswith(prefix)
            assert torch.equal(old[name], new[name]) == is_locked, name
        moved = sum(new[name].numel() for name in new if not name.startswith(prefix))
        assert facts["trained_parameters"] == moved
    assert all(p.requires_grad for p in load_model(out).model.parameters())


def test_a_locked_temperature_is_the_one_before_and_a_constant_one_is_the_phases(
    data, references, before, tmp_path
):
    tau_before = math.exp(-read_weights(before)["logit_scale"].item())
    assert 1e-4 < abs(tau_before - 0.2) < 0.02
    distilled = {
        "references": [{"model": str(references["near"])}],
        "distillation": {"affinity": 1.0},
    }
    for kind in ("contrastive", "gcl", "rgcl_g"):
        loss = {"kind": kind, "temperature": "locked"}
        out = folder(tmp_path / kind)
        pretrain(phase(samples_seen=48, loss=loss, **distilled), *data, before, out)
        assert torch.equal(read_weights(before)["logit_scale"], read_weights(out)["logit_scale"])
        assert rows_of(out)[-1]["tau"] == pytest.approx(tau_before, rel=1e-6)
    out = folder(tmp_path / "constant")
    loss = {"kind": "gcl", "temperature": "constant"}
    pretrain(phase(samples_seen=48, loss=loss, temperature=0.05), *data, before, out)
    assert math.exp(-read_weights(out)["logit_scale"].item()) == pytest.approx(0.05, rel=1e-6)


def test_a_phase_starts_as_its_reference_and_keeps_its_temperature(data, references, tmp_path):
    starts = {"init_from": "reference", "distillation": {}, "text_length": 12}
    same, out = folder(tmp_path / "same"), folder(tmp_path / "out")
    pretrain(learning(references, "near", **starts, samples_seen=0), *data, None, same)
    theirs, ours = read_weights(references["near"]), read_weights(same)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs.keys() | ours.keys())
    spec = load_model(same).spec
    assert spec["config"]["quick_gelu"] and spec["preprocess"]["mean"] == [0.3, 0.4, 0.5]
    assert spec["init_from"]["tau"] == pytest.approx(1 / SCALE, rel=1e-4)
    locked = {"loss": {"temperature": "locked"}, "temperature": 0.07, "lock": ["text"]}
    pretrain(learning(references, "near", **starts, **locked), *data, None, out)
    after = read_weights(out)
    for name in theirs:
        is_locked = name.startswith("text.") or name == "logit_scale"
        assert torch.equal(theirs[name], after[name]) == is_locked, name


# --- mistakes -----------------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_reference_is_said_before_training(data, references, tmp_path):
    out = folder(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"interactive needs equal .* has 24, the model has 16"):
        pretrain(learning(references, "far", distillation={"interactive": 1.0}), *data, None, out)
    missing = learning({"near": tmp_path / "nowhere"}, "near")
    with pytest.raises(
        ConfigError, match=r"reference .*nowhere is no folder. Hint: .*model folder"
    ):
        pretrain(missing, *data, None, out)
    with pytest.raises(ConfigError, match=r"far reads another vocabulary than the data.*full"):
        pretrain(learning(references, "far", init_from="reference"), *data, None, out)
    for change in ({"lock": ["image"]}, {"loss": {"temperature": "locked"}}):
        with pytest.raises(ConfigError, match=r"pretrain.short.*no initial weights to keep"):
            pretrain(phase(**change), *data, None, out)
    assert not list(out.iterdir())
