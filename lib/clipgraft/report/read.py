"""Reading a run: from the folders of its jobs to plain data.

Only what is there is read; a run without a short phase, without labels or without a task simply
lacks those parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipgraft.baseline_settings import KINDS
from clipgraft.data.samples import Samples
from clipgraft.provenance import read_manifest
from clipgraft.report.costs import Cost, cost_of, input_folder
from clipgraft.report.evalset import EVALSET, together

UNTRAINED = "untrained"  # random weights, evaluated for the probes alone

# Okabe and Ito's colours, which differ for all kinds of colour vision. A model has one everywhere.
_ROLE_COLOURS = {UNTRAINED: "#D0D0D0", "base": "#333333", "upcycled": "#CC79A7", "moe": "#D55E00"}
_PHASE_COLOURS = ("#999999", "#BBBBBB", "#777777")
_EXPERT_COLOURS = ("#56B4E9", "#0072B2", "#009E73", "#5D4E9E", "#00788A", "#7FA32B", "#3B6EA5")
_BASELINE_COLOURS = ("#E69F00", "#A6761D", "#F0C24B", "#B5423C", "#8C8C00", "#F2A3A3", "#6E4B2A")
_ROLE_MARKERS = {UNTRAINED: "X", "base": "s", "upcycled": "^", "moe": "D"}
_BASELINE_MARKERS = "v<>Pph*"


@dataclass
class Model:
    """One model of the run.

    Attributes:
        key: as in job names: `base`, `expert_1`, `moe`.
        colour: the same in all figures.
        cost: of all that led to it.
        results: task to the content of `result.json`; under `evalset` all tasks of the evaluation folder.
        examples: task to the content of `examples.json`.
        marker: the same in all figures; baselines would not be told apart by colours alone.
        failed: task to what a user has to mend, where there is no result.
    """

    key: str
    colour: str
    cost: Cost
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: dict[str, dict[str, Any]] = field(default_factory=dict)
    marker: str = "o"
    failed: dict[str, str] = field(default_factory=dict)

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

    @classmethod
    def joined(cls, runs: Mapping[str, Run]) -> Run:
        """Several runs as one, whose jobs are named `<run>/<job>`."""
        return cls(
            {
                f"{run}/{job}": folder
                for run, of in runs.items()
                for job, folder in of.folders.items()
            },
            {
                f"{run}/{job}": about
                for run, of in runs.items()
                for job, about in of.manifests.items()
            },
        )

    def of_stage(self, stage: str) -> dict[str, Path]:
        """Folders of a stage by the rest of the job's name (`short` of `pretrain/short`)."""
        return {
            name.partition("/")[2]: folder
            for name, folder in self.folders.items()
            if name.partition("/")[0] == stage
        }

    def manifest(self, stage: str, key: str) -> dict[str, Any]:
        """Manifest of a job."""
        return self.manifests[f"{stage}/{key}"]

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
        evaluated = self.of_stage("evaluate")
        folders = {name.partition("/")[0]: self._model_folders(name) for name in evaluated}
        # By its folder: a baseline may have the name of the last phase, which is evaluated as the base.
        phases = [
            phase
            for phase, folder in self.of_stage("pretrain").items()
            if folders.get(phase) == [folder.resolve()]
        ]
        for name, folder in evaluated.items():
            key, _, task = name.partition("/")
            if key not in models:
                spent = cost_of(folders[key], folders["base"])
                if key == UNTRAINED:  # the base's architecture alone
                    spent = Cost(0, 0.0, flops_after=0.0, flops_per_pair=spent.flops_per_pair)
                models[key] = Model(key, "", spent)
            result = read_json(folder / "result.json")
            if task.startswith(f"{EVALSET}/"):  # many small tasks, shown as one
                task_key = task.removeprefix(f"{EVALSET}/")
                models[key].results.setdefault(EVALSET, together())["tasks"][task_key] = result
                continue
            if "failed" in result:
                models[key].failed[task] = result["failed"]
                continue
            models[key].results[task] = result
            if (folder / "examples.json").exists():
                models[key].examples[task] = read_json(folder / "examples.json")
        ordered = sorted(models.values(), key=lambda model: _place(model.key, phases))
        _colour(ordered, phases)
        return ordered

    def _model_folders(self, name: str) -> list[Path]:
        """What an evaluation has measured, several models if they stood side by side."""
        folder, manifest = self.folders[f"evaluate/{name}"], self.manifest("evaluate", name)
        slots = [slot for slot in manifest["inputs"] if slot.split("_")[0] == "model"]
        return [input_folder(folder, manifest, slot) for slot in slots]

    def samples(self, data: str) -> Samples:
        """The samples of a data set."""
        return Samples.open(self.folders[f"index/{data}"])


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object."""
    return dict(json.loads(path.read_text()))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` that tell of training; none if the stage did not train."""
    return [row for row in _read_lines(folder) if "watch" not in row]


def read_looks(folder: Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` that tell how the model did meanwhile; none if training was not watched."""
    return [row for row in _read_lines(folder) if "watch" in row]


def _read_lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def _place(key: str, phases: list[str]) -> tuple[int, int, str]:
    if key == UNTRAINED:
        return -1, 0, ""
    if key in phases:
        return 0, phases.index(key), ""
    if key.startswith("expert_"):
        return 2, int(key.removeprefix("expert_")), ""
    kind = KINDS.index(key) if key in KINDS else len(KINDS)  # baselines
    place = {"base": 1, "upcycled": 4, "moe": 5}.get(key)
    return (3, kind, key) if place is None else (place, 0, "")


def expert_colours(num_experts: int) -> list[str]:
    """Of experts as models of a run, the base first."""
    return [_ROLE_COLOURS["base"], *(_EXPERT_COLOURS * 9)][:num_experts]


def _colour(models: list[Model], phases: list[str]) -> None:
    palettes = {
        "phase": iter(_PHASE_COLOURS * 9),
        "expert": iter(_EXPERT_COLOURS * 9),
        "baseline": iter(_BASELINE_COLOURS * 9),
    }
    markers = iter(_BASELINE_MARKERS * 9)
    for model in models:
        kind = "baseline"
        if model.key in phases:
            kind = "phase"
        elif model.key.startswith("expert_"):
            kind = "expert"
        elif model.key not in _ROLE_MARKERS:
            model.marker = next(markers)
        model.colour = _ROLE_COLOURS.get(model.key) or next(palettes[kind])
        model.marker = _ROLE_MARKERS.get(model.key, model.marker)


def tokens_of(manifest: Mapping[str, Any]) -> int:
    """Of an image and a text together, as a stage has trained with them."""
    return int(manifest["image_tokens"] + manifest["text_tokens"])


def sides_of(about: Mapping[str, Any]) -> list[str]:
    """What a round clustered, by its `clusters.json`, in the order of the columns of `clusters.npy`."""
    return [side for side in ("image", "text", "joint") if side in about]
