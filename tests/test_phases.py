"""CLIPA-v2's model family from captions to results, at toy size. Oracle: plain open_clip on the saved folder."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipgraft.checkpoint import load_model, read_weights
from clipgraft.config import ConfigError
from clipgraft.data.download import download
from clipgraft.data.index import build_index
from clipgraft.data.samples import Samples
from clipgraft.data.shapes import draw_sample
from clipgraft.data.shards import write_shards
from clipgraft.embed import embed
from clipgraft.evaluation.evaluate import evaluate
from clipgraft.evaluation_settings import TaskSettings
from clipgraft.graft import assemble
from clipgraft.models.positions import sincos_table
from clipgraft.pretrain import pretrain
from clipgraft.router import finetune_router
from clipgraft.settings import (
    AssembleJob,
    EmbedSettings,
    IndexJob,
    PretrainJob,
    RouterJob,
    ShardJob,
)
from clipgraft.sources import TarSource

NUM, ROWS = 24, 400
POSITIONS = "visual.positional_embedding"
V2 = {
    "embed_dim": 16,
    "vision_cfg": {
        "patch_size": 14,
        "width": 32,
        "layers": 1,
        "head_width": 16,
        "no_ln_pre": True,
        "pool_type": "avg",
        "final_ln_after_pool": True,
        "pos_embed_type": "sin_cos_2d",
        "act_kwargs": {"approximate": "tanh"},
    },
    "text_cfg": {
        "vocab_size": ROWS,
        "hf_tokenizer_name": "bert-base-uncased",
        "tokenizer_kwargs": {"strip_sep_token": True},
        "width": 32,
        "heads": 2,
        "layers": 1,
        "pool_type": "last",
        "no_causal_mask": True,
        "act_kwargs": {"approximate": "tanh"},
    },
}
PREPROCESS = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bilinear",
    "resize_mode": "squash",
}


def folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Index and shards of pictures that are no squares, with captions in WordPiece."""
    root = tmp_path_factory.mktemp("data")
    with tarfile.open(root / "x.tar", "w") as tar:
        for i in range(NUM):
            sample = draw_sample(0, "train", i, image_size=64, num_captions=2)
            image = io.BytesIO()
            sample.image.resize((64, 40 + i)).save(image, "PNG")
            captions = json.dumps({"captions": sample.captions}).encode()
            for name, content in ((f"{i:04d}.png", image.getvalue()), (f"{i:04d}.json", captions)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for name in ("download", "index", "shard"):
        folder(root / name)
    download(TarSource(kind="tars", tars=str(root / "x.tar")), root / "download", threads=1)
    settings = IndexJob(tokenize=True, vocabulary="wordpiece", near_duplicates=None)
    build_index(settings, root / "download", root / "index", threads=1)
    write_shards(ShardJob(image_size=42, oversize=1.0), root / "index", root / "shard", threads=1)
    return root / "index", root / "shard"


def phase(name: str, image_size: int, text_length: int, **changes: object) -> PretrainJob:
    raw = {
        "name": name,
        "image_size": image_size,
        "text_length": text_length,
        "samples_seen": 48,
        "batch_size": 8,
        "optim": {"lr_per_256": 0.1, "warmup_samples": 16},
        "text_reduction": "syntax",
        "pos_resize": "recompute",
        "sincos_form": "moco",
        "seed": 0,
        "model": {"config": V2, "preprocess": PREPROCESS},
    }
    return PretrainJob(**raw | changes)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the short and the full phase."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPGRAFT_PRECISION", "fp32")
        root = tmp_path_factory.mktemp("trained")
        short, full = folder(root / "short"), folder(root / "full")
        pretrain(phase("short", 28, 8), *data, None, short)
        pretrain(phase("full", 42, 16), *data, short, full)
    return short, full


@pytest.fixture
def in_open_clip(trained, tmp_path):
    """The full model, opened in plain open_clip with its transform."""
    spec = json.loads((trained[1] / "model.json").read_text())
    about = {"model_cfg": spec["config"], "preprocess_cfg": spec["preprocess"]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    os.link(trained[1] / "model.safetensors", tmp_path / "open_clip_model.safetensors")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    return model.eval(), transform


def ids_of(texts: list[str], index: Path, text_length: int) -> torch.Tensor:
    """[CLS], words, zeros: the built-in captions are plain words, each of which is one piece."""
    pieces = (index / "tokens" / "vocab.txt").read_text().split("\n")
    number_of = {piece: number for number, piece in enumerate(pieces)}
    rows = []
    for text in texts:
        words = text.lower().replace(",", " , ").replace(".", " . ").replace("-", " - ").split()
        ids = [number_of["[CLS]"], *(number_of[word] for word in words)][:text_length]
        rows.append(ids + [0] * (text_length - len(ids)))
    return torch.tensor(rows)


def test_two_phases_end_with_what_each_was_given(trained):
    before, after = read_weights(trained[0]), read_weights(trained[1])
    assert torch.equal(before[POSITIONS], sincos_table(32, 2, "moco"))
    assert torch.equal(after[POSITIONS], sincos_table(32, 3, "moco"))
    assert before["text.positional_embedding"].shape == (8, 32)
    assert after["text.positional_embedding"].shape == (16, 32)
    assert after["text.token_embedding.weight"].shape == (ROWS, 32)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # The class token is read by the other positions; open_clip's average leaves its own feature out.
    assert {"visual.conv1.weight", "visual.proj", "text.text_projection"} <= changed
    spec = load_model(trained[1]).spec
    assert (spec["samples_seen"], spec["preprocess"]["size"]) == (96, 42)
    assert spec["preprocess"]["resize_mode"] == "squash"
    assert spec["config"]["vision_cfg"]["pos_embed_type"] == "sin_cos_2d"


def test_the_learning_rate_follows_the_rules_of_the_phase(trained):
    rows = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    peak = 0.1 * 8 / 256
    assert rows[0]["lr"] == pytest.approx(peak / 2)  # two steps of warm-up
    assert max(row["lr"] for row in rows) <= peak
    assert rows[-1]["step"] == 6


def test_open_clip_has_the_same_features(trained, data, in_open_clip):
    theirs, _ = in_open_clip
    ours = load_model(trained[1]).model.eval()
    images = torch.randn(3, 3, 42, 42)
    text = ids_of(Samples.open(data[0]).captions(0), data[0], 16)
    assert torch.equal(ours.encode_image(images), theirs.encode_image(images))
    assert torch.equal(ours.encode_text(text), theirs.encode_text(text))


def test_evaluation_is_that_of_open_clip_on_its_own_pictures(trained, data, in_open_clip, tmp_path):
    task = TaskSettings(data="train", retrieval=True)
    out = folder(tmp_path / "out")
    evaluate(task, trained[1], data[0], out, task_name="train")
    theirs, transform = in_open_clip
    samples = Samples.open(data[0])
    pictures = [Image.open(io.BytesIO(samples.image_bytes(row))) for row in range(NUM)]
    with torch.no_grad():
        pixels = torch.stack([transform(picture.convert("RGB")) for picture in pictures])
        image_ND = F.normalize(theirs.encode_image(pixels), dim=1)
        for query in json.loads((out / "examples.json").read_text())["image_to_text"]:
            texts = ids_of([answer["text"] for answer in query["top"]], data[0], 16)
            scores = F.normalize(theirs.encode_text(texts), dim=1) @ image_ND[query["row"]]
            expected = [answer["score"] for answer in query["top"]]
            assert scores.tolist() == pytest.approx(expected, abs=2e-4)


def test_embeddings_are_those_of_whole_pictures_and_plain_words(
    trained, data, in_open_clip, tmp_path
):
    out = folder(tmp_path / "out")
    embed(EmbedSettings(captions="first"), trained[1], *data, out)
    image_ND, text_ND = (np.load(out / f"{side}.npy").astype(float) for side in ("image", "text"))
    theirs, transform = in_open_clip
    samples = Samples.open(data[0])
    first = [samples.captions(row)[0] for row in range(NUM)]
    pictures = [Image.open(io.BytesIO(samples.image_bytes(row))) for row in range(NUM)]
    with torch.no_grad():
        text = F.normalize(theirs.encode_text(ids_of(first, data[0], 16)), dim=1)
        pixels = torch.stack([transform(picture.convert("RGB")) for picture in pictures])
        images = F.normalize(theirs.encode_image(pixels), dim=1)
    np.testing.assert_allclose(text_ND, text, atol=2e-3)
    # The shards are JPEGs and resized as in training, so nearly the same; each is nearest to its own.
    cosine_NN = image_ND @ images.numpy().T
    assert cosine_NN.diagonal().min() > 0.98
    assert (cosine_NN.argmax(axis=1) == np.arange(NUM)).mean() > 0.8


def test_experts_are_grafted_and_routed(trained, data, tmp_path):
    upcycled, routed = folder(tmp_path / "upcycled"), folder(tmp_path / "routed")
    assemble(AssembleJob(num_experts=2, top_k=1, seed=0), [trained[1]] * 2, upcycled)
    settings = {"samples_seen": 16, "batch_size": 8, "optim": {"lr": 1e-2}, "seed": 0}
    finetune_router(RouterJob(**settings), upcycled, *data, routed)
    out = folder(tmp_path / "out")
    facts = evaluate(
        TaskSettings(data="train", retrieval=True), routed, data[0], out, task_name="train"
    )
    dense = folder(tmp_path / "dense")
    assert facts == evaluate(
        TaskSettings(data="train", retrieval=True), trained[1], data[0], dense, task_name="train"
    )


def test_towers_and_captions_that_do_not_fit_are_refused_before_training(data, tmp_path):
    out = folder(tmp_path / "out")
    causal = {**V2, "text_cfg": {"width": 32, "heads": 2, "layers": 1}}
    with pytest.raises(ConfigError, match=r"pool_type = argmax .* none. Hint: .*pool_type: last"):
        pretrain(phase("short", 28, 8, model={"config": causal}), *data, None, out)
    small = {**V2, "text_cfg": {**V2["text_cfg"], "vocab_size": 90}}
    with pytest.raises(ConfigError, match=r"vocab_size = 90, but .* has \d+ pieces"):
        pretrain(phase("short", 28, 8, model={"config": small}), *data, None, out)
