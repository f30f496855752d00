"""A finished run with random weights: real indexes, models and evaluations, and embeddings that no model has made."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from clipgraft.checkpoint import load_model, save_model
from clipgraft.data.index import build_index
from clipgraft.data.shapes import ATTRIBUTES, draw_sample
from clipgraft.evaluation.evaluate import evaluate
from clipgraft.evaluation_settings import TaskSettings
from clipgraft.models.build import build, describe
from clipgraft.models.moe import upcycle
from clipgraft.provenance import content_id, describe_outputs
from clipgraft.runs import link_run
from clipgraft.settings import IndexJob

SIZE, LENGTH, DIM = 32, 16, 16
CONFIG = {
    "embed_dim": DIM,
    "quick_gelu": False,
    "custom_text": True,
    "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": LENGTH, "width": 32, "heads": 2, "layers": 2},
}
NUM = {"train": 40, "renders": 24}
TASK = {"data": "renders", "retrieval": True, "zero_shot": [{"label": "colour"}]}


def make_run(results: Path, name: str = "tiny") -> Path:
    """Write a run into a store; returns the store."""
    jobs: dict[str, str] = {}

    def add(job: str, folder: Path, settings: Mapping[str, Any], **inputs: Path) -> Path:
        stage = job.split("/")[0]
        outputs = describe_outputs(folder)
        about = {
            slot: {"manifest": os.path.relpath(of / "manifest.json", folder), "id": "x"}
            for slot, of in inputs.items()
        }
        manifest = {"stage": stage, "name": job, "settings": settings, "inputs": about}
        manifest |= {"id": content_id(stage, settings, outputs), "outputs": outputs}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        jobs[job] = str(folder.relative_to(results))
        return folder

    index = {
        data: add(f"index/{data}", _index(results, data, number), {})
        for number, data in enumerate(NUM)
    }
    tokens = index["train"] / "tokens"
    base = add("pretrain/full", _base(_new(results, "pretrain", 0), tokens), {})
    stored = _new(results, "embed", 0)
    for side in ("image", "text"):
        np.save(stored / f"{side}.npy", planted(side).astype(np.float16))
    add("embed/0", stored, {}, model=base, index=index["train"])
    moe = add("finetune_router/moe", _moe(_new(results, "finetune_router", 0), base, tokens), {})
    expert = _expert(_new(results, "finetune_expert", 0), base, tokens)
    expert = add("finetune_expert/1", expert, {}, init=base)
    models = {"base": base, "expert_1": expert, "moe": moe, "untrained": base}
    for number, (key, model) in enumerate(models.items()):
        out = _new(results, "evaluate", number)
        untrained = 3 if key == "untrained" else None
        task = TaskSettings.model_validate(TASK)
        evaluate(task, model, index["renders"], out, task_name="renders", untrained=untrained)
        settings = {**TASK, "task": "renders", "untrained": untrained}
        add(f"evaluate/{key}/renders", out, settings, model=model, index=index["renders"])
    link_run(name, jobs, results)
    return results


def planted(side: str) -> np.ndarray:
    """Unit vectors that stand for what the base has embedded, one per training sample."""
    rng = np.random.default_rng(len(side))
    points = rng.normal(size=(NUM["train"], DIM))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def _new(results: Path, stage: str, number: int) -> Path:
    folder = results / stage / f"{number:08x}"
    folder.mkdir(parents=True)
    return folder


def _index(results: Path, data: str, number: int) -> Path:
    download, out = _new(results, "download", number), _new(results, "index", number)
    with tarfile.open(download / "0.tar", "w") as tar:
        for i in range(NUM[data]):
            sample = draw_sample(0, data, i, image_size=SIZE, num_captions=2)
            image = io.BytesIO()
            sample.image.save(image, "PNG")
            _add(tar, f"{i:03d}.png", image.getvalue())
            about = {"captions": sample.captions, **sample.attributes}
            _add(tar, f"{i:03d}.json", json.dumps(about).encode())
    rows = [
        {"key": f"{i:03d}", "file": "0.tar", "status": "ok", "message": ""}
        for i in range(NUM[data])
    ]
    pq.write_table(pa.Table.from_pylist(rows), download / "outcomes.parquet")
    classes = {name: list(values) for name, values in ATTRIBUTES.items()}
    (download / "classes.json").write_text(json.dumps(classes))
    build_index(IndexJob(min_side=8, tokenize=data == "train"), download, out, threads=1)
    return out


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _base(folder: Path, tokens: Path) -> Path:
    vocab_size = json.loads((tokens / "tokens.json").read_text())["vocab_size"]
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "vocab_size": vocab_size}}
    torch.manual_seed(0)
    model = build(config)
    for tensor in model.parameters():  # as built, all pictures look much the same to it
        if tensor.ndim > 1:
            torch.nn.init.normal_(tensor, std=0.2)
    save_model(folder, model, describe(config), tokens / "merges.txt.gz")
    return folder


def _expert(folder: Path, base: Path, tokens: Path) -> Path:
    """What it changed alone; the rest is its base's."""
    loaded = load_model(base)
    changed = _changed(loaded.model, torch.Generator().manual_seed(2))
    loaded.model.load_state_dict(changed, strict=False)
    merges = tokens / "merges.txt.gz"
    save_model(folder, loaded.model, loaded.spec, merges, only=changed, base=base)
    return folder


def _changed(model: torch.nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Other MLPs, as of an expert."""
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
        if "mlp" in name
    }


def _moe(folder: Path, base: Path, tokens: Path) -> Path:
    loaded, generator = load_model(base), torch.Generator().manual_seed(1)
    states = [_changed(loaded.model, generator) for _ in range(3)]
    layers = {"image_layers": "all", "text_layers": [1]}
    moe = upcycle(loaded.model, states, top_k=2, generator=generator, **layers)
    save_model(folder, loaded.model, {**loaded.spec, "moe": moe}, tokens / "merges.txt.gz")
    return folder
