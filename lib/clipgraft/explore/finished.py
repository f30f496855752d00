"""What a finished run has to try: models, data sets, stored embeddings and classes, read from its lock and manifests.

Nothing is planned and no config is read: a run is what its lock says, whatever has been edited since.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipgraft.compare import LOCK
from clipgraft.config import ConfigError
from clipgraft.provenance import check_outputs, read_manifest
from clipgraft.report.costs import input_folder
from clipgraft.spelling import hint

INDEX = "index/"


@dataclass(frozen=True)
class Classes:
    """What a picture may be: names, and prompts with `{c}` where a name goes."""

    names: list[str]
    templates: list[str]


@dataclass(frozen=True)
class FinishedRun:
    """A run all of whose jobs are there.

    Attributes:
        name: of the run.
        models: key as in the report to model folders: one, of an ensemble several.
        indexes: name of a data set to its index.
        embedded: folders of a model and of an index to the stored embeddings of the one by the other.
        classes: label to its classes, as evaluated; where data sets differ in them, the second is `label (data set)`.
    """

    name: str
    models: dict[str, list[Path]] = field(default_factory=dict)
    indexes: dict[str, Path] = field(default_factory=dict)
    embedded: dict[tuple[Path, Path], Path] = field(default_factory=dict)
    classes: dict[str, Classes] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str | None, results: Path) -> FinishedRun:
        """Read the lock of a run and what it leads to.

        Args:
            name: of the run; None: the only one.
            results: the store.

        Raises:
            ConfigError: if there is no such run, it is not finished, or has no model or no data to look at.
        """
        name = _only_run(results) if name is None else name
        run = cls(name)
        lock = _lock_of(name, results)
        for job, folder in lock.items():
            run._add(job, (results / folder).resolve())
        if not run.models:  # nothing was evaluated
            run.models.update(
                {key: [(results / of).resolve()] for key, of in _trained(lock).items()}
            )
        for what, found in (("model", run.models), ("data set", run.indexes)):
            if not found:
                raise ConfigError(
                    f"run {name!r} has no {what} to try (of a sweep, its points have). "
                    f"Runs: {', '.join(finished_runs(results))}"
                )
        return run

    def model_folders(self, key: str) -> list[Path]:
        """Folders of a model, whole.

        Raises:
            ConfigError: if the run has no such model, or a file of it is missing.
        """
        if key not in self.models:
            raise ConfigError(f"run {self.name!r} has no model {key!r}{hint(key, self.models)}")
        for folder in self.models[key]:
            check_outputs(folder, read_manifest(folder))
        return self.models[key]

    def index(self, data: str) -> Path:
        """The index of a data set, whole.

        Raises:
            ConfigError: if the run has no such data set, or a file of it is missing.
        """
        if data not in self.indexes:
            raise ConfigError(
                f"run {self.name!r} has no data set {data!r}{hint(data, self.indexes)}"
            )
        check_outputs(self.indexes[data], read_manifest(self.indexes[data]))
        return self.indexes[data]

    def stored(self, key: str, data: str) -> Path | None:
        """Embeddings of a data set by a model, if a stage has stored them and they are whole."""
        folders = self.models[key]
        folder = self.embedded.get((folders[0], self.indexes[data])) if len(folders) == 1 else None
        if folder is not None:
            check_outputs(folder, read_manifest(folder))
        return folder

    def _add(self, job: str, folder: Path) -> None:
        if job.startswith(INDEX):
            self.indexes[job.removeprefix(INDEX)] = folder
        elif job.startswith("evaluate/"):
            self._add_evaluated(job.split("/")[1], folder)
        elif job.startswith("embed/"):
            manifest = read_manifest(folder)
            if "model" in manifest["inputs"]:  # not those of a reference
                of = (input_folder(folder, manifest, slot) for slot in ("model", "index"))
                self.embedded[tuple(of)] = folder  # type: ignore[index]

    def _add_evaluated(self, key: str, folder: Path) -> None:
        """A model and the classes it was measured on."""
        manifest = read_manifest(folder)
        settings = manifest["settings"]
        if settings.get("untrained") is not None:
            return  # random weights: a number to compare with, nothing to look at
        self.models[key] = list(_models_of(folder, manifest))
        for label, of in (_result_of(folder).get("zero_shot") or {}).items():
            if "templates" in of:
                classes = Classes(of["classes"], of["templates"])
                if self.classes.setdefault(label, classes) != classes:
                    where = settings.get("data") or settings["evalset"]
                    self.classes[f"{label} ({where})"] = classes


def finished_runs(results: Path) -> list[str]:
    """Names of all runs that have a lock."""
    return sorted(path.parent.name for path in (results / "runs").glob(f"*/{LOCK}"))


def _trained(lock: Mapping[str, str]) -> dict[str, str]:
    """Folders of what a run has trained, by the names that evaluation gives; the final one last."""
    models: dict[str, str] = {}
    phases = [job for job in lock if job.startswith("pretrain/")]
    for job, folder in lock.items():
        stage, _, name = job.partition("/")
        if stage == "pretrain":
            models["base" if job == phases[-1] else name] = folder
        elif stage == "finetune_expert":
            models[f"expert_{name}" if name.isdigit() else name] = folder
        elif stage in ("soup", "finetune_router"):  # of baselines the last stage stands
            models[name] = folder
        elif job == "assemble/moe":
            models["upcycled"] = folder
    last = models.pop("moe", None)
    return models if last is None else {**models, "moe": last}


def _only_run(results: Path) -> str:
    known = finished_runs(results)
    if not known:
        raise ConfigError(
            f"{results / 'runs'} has no finished run. Hint: make demo, or snakemake --cores all"
        )
    if len(known) > 1:
        raise ConfigError(
            f"{results / 'runs'} has {len(known)} finished runs: {', '.join(known)}. "
            f"Hint: name one, e.g. make explore RUN={known[0]}"
        )
    return known[0]


def _lock_of(name: str, results: Path) -> dict[str, str]:
    path = results / "runs" / name / LOCK
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        known = ", ".join(finished_runs(results)) or "none"
        raise ConfigError(
            f"run {name!r} is not finished, or there is no such run: {path} does not exist. Finished: {known}. "
            f"Hint: snakemake --cores all {path}"
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{path} is no lock of a run: {error}. Hint: delete it and run snakemake again"
        ) from None


def _models_of(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
    """What an evaluation has measured: one model, or several side by side."""
    for slot in manifest["inputs"]:
        if slot.split("_")[0] == "model":
            yield input_folder(folder, manifest, slot)


def _result_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))
