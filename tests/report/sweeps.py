"""A sweep as its runs would leave it, with results that follow a law given by the test."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from clipgraft.config import load_config, sweep_points
from clipgraft.planning import SWEEP, plan_runs
from clipgraft.versions import PlannedJob

# size -> (width, depth); parameters are written as 12 d w^2
SIZES = {"tiny": (32, 2), "small": (64, 4), "large": (128, 6)}
Score = Callable[[Mapping[str, Any], bool], float]


def config(sweep: Mapping[str, Any], phases: int = 2) -> dict[str, Any]:
    """A config with these axes: 40 px at most, patches of 8, 16 text tokens at most."""
    train = {"samples_seen": 4000, "batch_size": 16, "optim": {"lr": 1e-3}}
    short = {"name": "short", "image_size": 40, "text_length": 16, **train}
    full = {"name": "full", "image_size": 40, "text_length": 16, **train, "samples_seen": 1000}
    return {
        "download": {
            "train": {"kind": "shapes", "num_samples": 96},
            "renders": {"kind": "shapes", "split": "renders", "num_samples": 24},
        },
        "model": {"config": model("tiny")},
        "pretrain": [short, full][:phases],
        "moe": None,
        "evaluate": {"tasks": {"renders": {"data": "renders", "retrieval": True}}},
        "sweep": sweep,
    }


def model(size: str) -> dict[str, Any]:
    """The config of a model."""
    width, depth = SIZES[size]
    vision = {"patch_size": 8, "width": width, "layers": depth, "head_width": 16}
    text = {"width": width, "heads": 2, "layers": depth}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}


def size_axis(*names: str) -> dict[str, Any]:
    """An axis of model sizes."""
    return {name: {"model": {"config": model(name)}} for name in names}


def image_axis(*sides: int) -> dict[str, Any]:
    """An axis of image sizes of the short phase."""
    return {f"i{side}": {"pretrain": {"short": {"image_size": side}}} for side in sides}


def text_axis(*lengths: int) -> dict[str, Any]:
    """An axis of text lengths of the short phase."""
    return {f"t{length}": {"pretrain": {"short": {"text_length": length}}} for length in lengths}


def seed_axis(num: int) -> dict[str, Any]:
    """An axis of seeds."""
    return {f"s{seed}": {"seed": seed} for seed in range(num)}


def write_sweep(
    results: Path, raw: Mapping[str, Any], score: Score
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Write phases and results of every run; returns the settings and inputs of the `scaling` job.

    Args:
        results: the store, to be made.
        raw: a config with a sweep.
        score: of a run's first phase (its settings) after it (False) or after the last phase (True): 0 .. 1.
    """
    [scaling] = plan_runs(load_config(raw), sweep_points(raw))[SWEEP]
    for job in scaling.inputs.values():
        folder = results / job.folder
        for needed in _chain(job):
            _write_manifest(results, needed)
        if job.stage == "pretrain":
            _write_model(folder, job.settings["model"]["config"])
        else:
            trained = job.inputs["model"]
            first = trained.inputs.get("init", trained).settings
            _write_result(folder, score(first, "/evaluate/base/" in f"/{job.name}"))
    # Snakemake hands settings over as JSON with sorted keys.
    settings = json.loads(json.dumps(scaling.settings, sort_keys=True))
    return settings, {name: results / job.folder for name, job in scaling.inputs.items()}


def _chain(job: PlannedJob) -> list[PlannedJob]:
    return [each for of in job.inputs.values() for each in _chain(of)] + [job]


def _write_manifest(results: Path, job: PlannedJob) -> None:
    folder = results / job.folder
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {
        name: {
            "manifest": os.path.relpath(results / of.folder / "manifest.json", folder),
            "id": f"{of.version}-id",
        }
        for name, of in job.inputs.items()
    }
    seconds = 60.0
    if job.stage == "pretrain":
        width = job.settings["model"]["config"]["vision_cfg"]["width"]
        seconds = job.settings["samples_seen"] * job.settings["image_size"] ** 2 * width**1.5 / 1e7
    manifest = {
        "stage": job.stage,
        "name": job.name,
        "id": f"{job.version}-id",
        "settings": job.settings,
        "inputs": inputs,
        "outputs": {},
        "git": "0123456789ab",
        "packages": {"python": "3.11.2"},
        "hardware": {"processor": "Example CPU", "cores": 2, "devices": []},
        "seconds": seconds,
        "train_seconds": seconds,
        "samples_seen": job.settings.get("samples_seen"),
        "num_samples": 96,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _write_model(folder: Path, architecture: Mapping[str, Any]) -> None:
    vision = architecture["vision_cfg"]
    num = 12 * vision["layers"] * vision["width"] ** 2
    save_file({"weight": np.zeros((num // 4, 4), np.float16)}, folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps({"config": architecture}))


def _write_result(folder: Path, score: float) -> None:
    way = {"R@1": score, "R@5": min(1.0, 2 * score)}
    ways = ("image_to_text", "text_to_image")
    chance = {f"{name}_{key}": 0.01 for name in ways for key in way}
    retrieval = {"num_images": 100, "num_texts": 100, "chance": chance, "mean_R@1": score}
    retrieval |= {name: way for name in ways}
    (folder / "result.json").write_text(json.dumps({"retrieval": retrieval, "zero_shot": {}}))
