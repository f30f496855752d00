"""What models cost, added up along the manifests of what they were made from.

So an expert pays for its base, and a MoE, a soup and an ensemble for all of their experts, each job once. FLOPs are
counted by arithmetic (`cost.sample_flops`): of training, and of the embeddings that clusters are made from. k-means,
centroids for routers and evaluation are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipgraft import cost
from clipgraft.config import ConfigError, validate
from clipgraft.provenance import MANIFEST, read_manifest
from clipgraft.settings import ExpertJob, RouterJob

_MODEL_STAGES = """
    pretrain embed cluster finetune_expert assemble finetune_router soup
""".split()
Manifests = dict[Path, dict[str, Any]]


@dataclass(frozen=True)
class Cost:
    """What a model took.

    Attributes:
        samples_seen: in all training that led to it, from the first phase on.
        minutes: of all jobs it was made by, data preparation left out.
        samples_after: of `samples_seen`, those after the base.
        flops_after: FLOPs of all that led from the base to it; None if they cannot be counted.
        flops_per_pair: FLOPs of encoding a picture and a caption; None if they cannot be counted.
    """

    samples_seen: int
    minutes: float
    samples_after: int = 0
    flops_after: float | None = None
    flops_per_pair: float | None = None


def cost_of(folders: Sequence[Path], base: Sequence[Path]) -> Cost:
    """Cost of one model, or of several side by side.

    Args:
        folders: of the models.
        base: of the base.
    """
    made_of, before = _made_of(folders), _made_of(base)
    after = {folder: manifest for folder, manifest in made_of.items() if folder not in before}
    return Cost(
        samples_seen=_samples(made_of),
        minutes=sum(manifest.get("seconds") or 0.0 for manifest in made_of.values()) / 60,
        samples_after=_samples(after),
        flops_after=_sum(_job_flops(folder, manifest) for folder, manifest in after.items()),
        flops_per_pair=_sum(_pair_flops(folder) for folder in folders),
    )


def ancestors(folder: Path) -> Manifests:
    """Manifests of a job and of all it was made from, by folder."""
    return dict(_ancestors(folder.resolve(), set()))


def _ancestors(folder: Path, seen: set[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    if folder in seen:
        return
    seen.add(folder)
    manifest = read_manifest(folder)
    yield folder, manifest
    for name in manifest.get("inputs", {}):
        yield from _ancestors(input_folder(folder, manifest, name), seen)


def input_folder(folder: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """Folder of an input of a job."""
    path = (folder / manifest["inputs"][name]["manifest"]).resolve()
    return path.parent if path.name == MANIFEST else path


def _made_of(folders: Sequence[Path]) -> Manifests:
    found: Manifests = {}
    for folder in folders:
        found |= ancestors(folder)
    return {folder: m for folder, m in found.items() if m["stage"] in _MODEL_STAGES}


def _samples(manifests: Manifests) -> int:
    return sum(manifest.get("samples_seen") or 0 for manifest in manifests.values())


def _sum(parts: Iterator[float]) -> float | None:
    try:
        return sum(parts)
    except ConfigError:  # of an architecture whose products are not counted
        return None


def _pair_flops(folder: Path) -> float:
    """Of a forward pass at the sizes that the model is evaluated at."""
    spec = _spec(folder)
    return cost.sample_flops(spec["config"], *_tokens(spec["config"]), moe=spec["moe"])


def _job_flops(folder: Path, manifest: Mapping[str, Any]) -> float:
    """Of a job after the base; training sees the tokens that it recorded."""
    stage = manifest["stage"]
    if stage == "embed":
        return _embedding_flops(folder, manifest)
    if stage not in ("finetune_expert", "finetune_router"):
        return 0.0
    spec, tokens = _spec(folder), (manifest["image_tokens"], manifest["text_tokens"])
    flops = cost.sample_flops(
        spec["config"], *tokens, trained=trained_by(manifest), moe=spec["moe"]
    )
    return float(manifest["samples_seen"] * flops)


def trained_by(manifest: Mapping[str, Any]) -> cost.Trained:
    """What a job has trained, by its settings."""
    if manifest["stage"] == "finetune_router":
        return cost.Trained(validate(RouterJob, manifest["settings"]).train)
    settings = validate(ExpertJob, manifest["settings"])
    return cost.Trained(
        settings.weights,
        () if "image" in settings.lock else settings.image_layers,
        () if "text" in settings.lock else settings.text_layers,
        num_texts=2 if settings.short_captions else 1,
    )


def _embedding_flops(folder: Path, manifest: Mapping[str, Any]) -> float:
    """Of the forward passes of all pictures, and of the first or all of their captions."""
    spec = _spec(input_folder(folder, manifest, "model"))
    index = read_manifest(input_folder(folder, manifest, "index"))
    num, num_texts = index["num_samples"], index["num_captions"]
    each = 1 if manifest["settings"]["captions"] == "first" else num_texts / num
    trained = cost.Trained(num_texts=each)
    return float(
        num * cost.sample_flops(spec["config"], *_tokens(spec["config"]), trained, spec["moe"])
    )


def _tokens(config: Mapping[str, Any]) -> tuple[int, int]:
    vision = {**cost.VISION, **config["vision_cfg"]}
    return 1 + (vision["image_size"] // vision["patch_size"]) ** 2, config["text_cfg"][
        "context_length"
    ]


def _spec(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "model.json").read_text()))
