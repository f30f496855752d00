"""Every preset trains: its phases, on a small model of its family, with a few samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock

from clipgraft import encoding, plan
from clipgraft.architectures import architecture
from clipgraft.checkpoint import load_model
from clipgraft.cost import image_tokens
from clipgraft.data.download import download
from clipgraft.data.index import build_index
from clipgraft.data.shards import write_shards
from clipgraft.model_settings import ModelSettings
from clipgraft.pretrain import pretrain
from clipgraft.recipes import PhaseSettings
from clipgraft.settings import IndexJob, PretrainJob, ShardJob
from clipgraft.sources import ShapesSource

ROOT = Path(__file__).resolve().parent.parent
PRESETS = [
    path
    for family in ("clipa", "fastclip")
    for path in sorted((ROOT / "presets").glob(f"{family}_*.yaml"))
]


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few pictures, once for each vocabulary that presets ask for."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "download").mkdir()
    source = ShapesSource(kind="shapes", num_samples=24, image_size=32)
    download(source, folder / "download", threads=1)
    for vocabulary in ("full", "wordpiece"):
        (folder / vocabulary).mkdir()
        settings = IndexJob(tokenize=True, vocabulary=vocabulary)
        build_index(settings, folder / "download", folder / vocabulary, threads=1)
    return {vocabulary: folder / vocabulary for vocabulary in ("full", "wordpiece")}


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """A model of the family, one narrow block in each tower."""
    small = {"width": 32, "layers": 1, "mlp_ratio": 2.0}
    config["vision_cfg"] |= {**small, "head_width": 16}
    config["text_cfg"] |= {**small, "heads": 2}
    config["text_cfg"].pop("vocab_size")
    return {**config, "embed_dim": 16}


def few_samples(
    phase: PhaseSettings, config: dict[str, Any], model: ModelSettings, **changes: Any
) -> PretrainJob:
    few = {"samples_seen": 8, "batch_size": 4, "seed": 0, **changes}
    few["optim"] = {**phase.optim.model_dump(), "warmup_steps": 1, "warmup_samples": None}
    few["model"] = {"config": config, "preprocess": model.preprocess.model_dump()}
    return PretrainJob(**{**phase.model_dump(), **few})


@pytest.fixture
def lengths() -> Iterator[set[int]]:
    """Lengths of the sequences that reach a block."""
    seen: set[int] = set()

    def look(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, ResidualAttentionBlock):
            seen.add(arguments[0].shape[1])

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    yield seen
    hook.remove()


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_trains_on_as_many_tokens_as_it_says(
    path, indexes, lengths, tmp_path, monkeypatch
):
    monkeypatch.setenv("CLIPGRAFT_PRECISION", "fp32")
    monkeypatch.setattr(encoding, "trimmed", lambda _, text_BL: text_BL)  # of the longest caption
    monkeypatch.setattr(encoding, "tell_padding", lambda *_: None)  # padding is computed
    ((model, phases),) = plan.read([path]).values()
    config = shrunk(architecture(model))
    index = indexes["wordpiece" if path.stem.startswith("clipa_v2") else "full"]
    init = None
    for phase in phases:
        shard, out = tmp_path / f"shard_{phase.name}", tmp_path / phase.name
        shard.mkdir(), out.mkdir()
        write_shards(ShardJob(image_size=phase.image_size), index, shard, threads=1)
        job = few_samples(phase, config, model)
        lengths.clear()
        facts = pretrain(job, index, shard, init, out)
        assert lengths == {image_tokens(config, phase), phase.text_length}
        assert math.isfinite(facts["metrics"]["loss"])
        init = out
    loaded = load_model(init)
    side = phases[-1].image_size // config["vision_cfg"]["patch_size"]
    assert loaded.model.visual.positional_embedding.shape == (side**2 + 1, 32)
    assert loaded.spec["preprocess"]["size"] == phases[-1].image_size


@pytest.mark.parametrize("preset", ["dfn1m_reference", "drrho_dfn192m"])
def test_every_run_of_a_preset_with_references_trains(preset, indexes, tmp_path, monkeypatch):
    """With a small model of our own in place of the public reference, of the same patches."""
    monkeypatch.setenv("CLIPGRAFT_PRECISION", "fp32")
    runs, index, shard = (
        plan.read([ROOT / f"presets/{preset}.yaml"]),
        indexes["full"],
        tmp_path / "shard",
    )
    shard.mkdir(), (tmp_path / "reference").mkdir()
    write_shards(ShardJob(image_size=224), index, shard, threads=1)
    _, (plain,) = runs["fastclip"]
    theirs = shrunk(architecture(ModelSettings(name="ViT-B-32")))
    job = few_samples(plain, theirs, ModelSettings(name="ViT-B-32"), temperature=0.02)
    pretrain(job, index, shard, None, tmp_path / "reference")
    tau = load_model(tmp_path / "reference").model.logit_scale.exp().item() ** -1
    for run, (model, (phase,)) in runs.items():
        out = tmp_path / run
        out.mkdir()
        references = [{"model": str(tmp_path / "reference")} for _ in phase.references]
        job = few_samples(phase, shrunk(architecture(model)), model, references=references)
        facts = pretrain(job, index, shard, None, out)
        assert math.isfinite(facts["metrics"]["loss"])
        row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        assert ("feature" in row) == (phase.distillation.feature > 0)
        if phase.loss.tau == "locked":
            assert row["tau"] == pytest.approx(tau, rel=1e-6)
        if phase.loss.tau == "constant":
            assert row["tau"] == pytest.approx(0.01)
