"""Reading a run: from the folders of its jobs to plain data.

Only what is there is read; a run without a short phase, without labels or without a task simply
lacks those parts. What a model cost is added up along the manifests of what it was made from, so
that an expert pays for its base and a MoE for all of its experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipgraft.data.samples import Samples
from clipgraft.provenance import MANIFEST, read_manifest

MODEL_STAGES = ("pretrain", "embed", "cluster", "finetune_expert", "assemble", "finetune_router")

# Okabe and Ito's colours, which differ for all kinds of colour vision. A model has one everywhere.
_ROLE_COLOURS = {"base": "#333333", "upcycled": "#CC79A7", "moe": "#D55E00"}
_PHASE_COLOURS = ("#999999", "#BBBBBB", "#777777")
_EXPERT_COLOURS = ("#56B4E9", "#0072B2", "#009E73", "#5D4E9E", "#00788A", "#7FA32B", "#3B6EA5")
_CONTROL_COLOURS = ("#E69F00", "#A6761D", "#F0C24B")


@dataclass
class Model:
    """One model of the run.

    Attributes:
        key: as in job names: `base`, `expert_1`, `moe`.
        colour: the same in all figures.
        samples_seen: in training, all told, from the first phase on.
        minutes: of all jobs it was made by, data preparation left out.
        results: task to the content of `result.json`.
        examples: task to the content of `examples.json`.
    """

    key: str
    colour: str
    samples_seen: int
    minutes: float
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """For people."""
        return self.key.replace("_", " ")


@dataclass
class Run:
    """The jobs of a run: folder and manifest by name, inputs before users."""

    folders: dict[str, Path]
    manifests: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, inputs: Mapping[str, Path]) -> Run:
        """Read all manifests.

        Raises:
            ConfigError: if one is missing or broken.
        """
        folders = {name: folder for name, folder in inputs.items() if name != "report"}
        return cls(folders, {name: read_manifest(folder) for name, folder in folders.items()})

    def of_stage(self, stage: str) -> dict[str, Path]:
        """Folders of a stage by the rest of the job's name (`short` of `pretrain/short`)."""
        return {
            name.partition("/")[2]: folder
            for name, folder in self.folders.items()
            if name.partition("/")[0] == stage
        }

    def manifest(self, stage: str, key: str = "") -> dict[str, Any]:
        """Manifest of a job."""
        return self.manifests[f"{stage}/{key}" if key else stage]

    @property
    def seconds(self) -> float:
        """Of all jobs; one that stands for two names counts once."""
        by_folder = {
            self.folders[name].resolve(): manifest.get("seconds") or 0.0
            for name, manifest in self.manifests.items()
        }
        return sum(by_folder.values())

    def models(self) -> list[Model]:
        """All evaluated models, in pipeline order."""
        models: dict[str, Model] = {}
        phases = list(self.of_stage("pretrain"))
        for name, folder in self.of_stage("evaluate").items():
            key, _, task = name.partition("/")
            if key not in models:
                source = self.manifest("evaluate", name)["inputs"]["model"]["manifest"]
                samples_seen, minutes = cost((folder / source).parent)
                models[key] = Model(key, "", samples_seen, minutes)
            models[key].results[task] = read_json(folder / "result.json")
            if (folder / "examples.json").exists():
                models[key].examples[task] = read_json(folder / "examples.json")
        ordered = sorted(models.values(), key=lambda model: _place(model.key, phases))
        _colour(ordered, phases)
        return ordered

    def samples(self, data: str) -> Samples:
        """The samples of a data set."""
        return Samples.open(self.folders[f"index/{data}"])


def cost(folder: Path) -> tuple[int, float]:
    """Samples seen and minutes spent on a model and on all it was made from."""
    manifests = ancestors(folder)
    of_models = [m for m in manifests.values() if m["stage"] in MODEL_STAGES]
    samples_seen = sum(m.get("samples_seen") or 0 for m in of_models)
    return samples_seen, sum(m.get("seconds") or 0.0 for m in of_models) / 60


def ancestors(folder: Path) -> dict[Path, dict[str, Any]]:
    """Manifests of a job and of all it was made from, by folder."""
    return dict(_ancestors(folder.resolve(), set()))


def _ancestors(folder: Path, seen: set[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    if folder in seen:
        return
    seen.add(folder)
    manifest = read_manifest(folder)
    yield folder, manifest
    for about in manifest.get("inputs", {}).values():
        path = folder / about["manifest"]
        yield from _ancestors(path.resolve().parent if path.name == MANIFEST else path, seen)


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object."""
    return dict(json.loads(path.read_text()))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl`; none if the stage did not train."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def _place(key: str, phases: list[str]) -> tuple[int, int]:
    if key in phases:
        return 0, phases.index(key)
    if key.startswith("expert_"):
        return 2, int(key.removeprefix("expert_"))
    return {"base": 1, "upcycled": 4, "moe": 5}.get(key, 3), 0


def _colour(models: list[Model], phases: list[str]) -> None:
    palettes = {
        "phase": iter(_PHASE_COLOURS * 9),
        "expert": iter(_EXPERT_COLOURS * 9),
        "control": iter(_CONTROL_COLOURS * 9),
    }
    for model in models:
        kind = "control"
        if model.key in phases:
            kind = "phase"
        elif model.key.startswith("expert_"):
            kind = "expert"
        model.colour = _ROLE_COLOURS.get(model.key) or next(palettes[kind])
