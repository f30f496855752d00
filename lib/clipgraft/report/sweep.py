"""Reading a sweep: from the folders of its runs to ladders of lengths.

Nothing here knows what an axis is called. What a run is about (size, tokens, strategies, cost) comes from what its
phases were trained with; the axes only say which runs belong together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from clipgraft import cost
from clipgraft.compare import human
from clipgraft.config import ConfigError, validate
from clipgraft.report.costs import Cost
from clipgraft.report.read import Model, Run, read_json
from clipgraft.report.slopes import Cell, Ladder
from clipgraft.report.tables import Column, columns_of
from clipgraft.settings import PretrainJob, ScalingJob, SweepRun
from clipgraft.versions import deciding

Side = Literal["image", "text"]
SIDES: tuple[Side, ...] = ("image", "text")


@dataclass(frozen=True)
class Trial:
    """One run of the sweep.

    Attributes:
        run: name.
        point: axis to the name of its point.
        size: what the model is, as JSON; equal for equal models.
        num_params: of the base.
        tokens: of the first phase, by side.
        strategy: how the first phase shortens sequences, by side.
        recipe: all it was trained with and on that decides on results, seeds left out.
        samples_seen: in all phases.
        macs: of the forward passes, after each phase, all told.
        hours: of training, after each phase, all told.
        scores: metric after each phase, per cent.
    """

    run: str
    point: Mapping[str, str]
    size: str
    num_params: int
    tokens: Mapping[Side, int]
    strategy: Mapping[Side, str]
    recipe: str
    samples_seen: int
    macs: tuple[float, ...]
    hours: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Rung:
    """Trials of one size, strategy and length, which differ in their seed."""

    tokens: int
    trials: tuple[Trial, ...]

    def cell(self, score: Callable[[Trial], float] = lambda trial: trial.scores[-1]) -> Cell:
        """A number of each trial; the metric of the base unless told."""
        return Cell(self.tokens, tuple(score(trial) for trial in self.trials))


@dataclass(frozen=True)
class Line:
    """One size and strategy at every length, the longest first.

    Attributes:
        side: which sequence is shortened.
        size: label.
        strategy: of shortening.
        full: what the others are held against; of another strategy where this one has no full length.
        rungs: by falling length.
    """

    side: Side
    size: str
    strategy: str
    full: Rung
    rungs: tuple[Rung, ...]

    @property
    def ladder(self) -> Ladder:
        """For the fit."""
        shorter = [rung.cell() for rung in self.rungs if rung.tokens < self.full.tokens]
        return Ladder(self.full.trials[0].num_params, (self.full.cell(), *shorter))


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep."""

    trials: tuple[Trial, ...]
    metric: Column

    @classmethod
    def open(cls, run: Run, settings: ScalingJob) -> Sweep:
        """Read every run.

        Args:
            run: its jobs are named `<run of the sweep>/<job>`.
            settings: which task and metric, and the point of each run.
        Raises:
            ConfigError: if a result lacks the metric.
        """
        phases = {each.run: _phases(run, each.run) for each in settings.runs}
        jobs = {name: _evaluations(name, phases[name], settings.task) for name in phases}
        models = [
            Model(job, "", Cost(0, 0.0), {settings.task: _result(run, job)})
            for name in jobs
            for job in jobs[name]
        ]
        metric = _metric(columns_of(models), settings)
        trials = []
        for each in settings.runs:
            scores = tuple(100 * metric.values[job] for job in jobs[each.run])
            trials.append(_trial(run, each, phases[each.run], scores))
        return cls(tuple(trials), metric)

    @property
    def sizes(self) -> dict[str, str]:
        """Label of each size, from small to large: its parameters, and its name where an axis gives one."""
        rising = sorted(self.trials, key=lambda trial: trial.num_params)  # the largest counts
        sizes = sorted({trial.size: trial.num_params for trial in rising}.items(), key=_second)
        labels = {size: human(num) for size, num in sizes}
        for axis in self.trials[0].point:
            pairs = {(trial.size, trial.point[axis]) for trial in self.trials}
            if len(pairs) == len(sizes) == len({name for _, name in pairs}):
                names = dict(pairs)
                return {size: f"{names[size]} ({label})" for size, label in labels.items()}
        return labels

    def lines(self, side: Side) -> list[Line]:
        """What happens as one side is shortened, all else held: by size and strategy; none if it never is.

        The other axes stand at their first point, those of the other side at the longest sequence.
        """
        if len({trial.tokens[side] for trial in self.trials}) < 2:
            return []
        chosen = self.held(side)
        lines = []
        for size, label in self.sizes.items():
            mine = [
                trial for trial in self.trials if trial.size == size and _matches(trial, chosen)
            ]
            strategies = list(dict.fromkeys(trial.strategy[side] for trial in mine))
            ladders = {each: _rungs(mine, side, each) for each in strategies}
            longest = max(rungs[0].tokens for rungs in ladders.values())
            full = next(rungs[0] for rungs in ladders.values() if rungs[0].tokens == longest)
            for strategy, rungs in ladders.items():
                own = rungs[0] if rungs[0].tokens == longest else full
                lines.append(Line(side, label, strategy, own, rungs))
        return [line for line in lines if any(r.tokens < line.full.tokens for r in line.rungs)]

    def held(self, side: Side) -> dict[str, str]:
        """The axes that stand still as one side is shortened, and where: at the other side's longest."""
        other: Side = "text" if side == "image" else "image"
        free: list[Callable[[Trial], Any]] = [
            lambda trial: trial.size,
            lambda trial: trial.tokens[side],
            lambda trial: trial.strategy[side],
        ]
        axes = [
            axis
            for axis in self.trials[0].point
            if not any(self._varies(axis, of) for of in free) and self._varies(axis, _recipe)
        ]
        first = max(self.trials, key=lambda trial: trial.tokens[other])  # of equals the first
        return {axis: first.point[axis] for axis in axes}

    def _varies(self, axis: str, of: Callable[[Trial], Any]) -> bool:
        """Whether something differs between runs that differ on this axis alone."""
        found: dict[str, set[Any]] = {}
        for trial in self.trials:
            others = {name: point for name, point in trial.point.items() if name != axis}
            found.setdefault(json.dumps(others), set()).add(of(trial))
        return any(len(values) > 1 for values in found.values())


def _recipe(trial: Trial) -> str:
    return trial.recipe


def _second(pair: tuple[str, int]) -> int:
    return pair[1]


def _matches(trial: Trial, point: Mapping[str, str]) -> bool:
    return all(trial.point[axis] == name for axis, name in point.items())


def _rungs(trials: Sequence[Trial], side: Side, strategy: str) -> tuple[Rung, ...]:
    mine = [trial for trial in trials if trial.strategy[side] == strategy]
    lengths = sorted({trial.tokens[side] for trial in mine}, reverse=True)
    return tuple(
        Rung(length, tuple(trial for trial in mine if trial.tokens[side] == length))
        for length in lengths
    )


# --- one run ----------------------------------------------------------------------------------------------


def _phases(run: Run, name: str) -> dict[str, Path]:
    """Folders of the phases of a run, in order."""
    prefix = f"{name}/pretrain/"
    jobs = [job for job in run.folders if job.startswith(prefix)]
    return {job.removeprefix(prefix): run.folders[job] for job in jobs}


def _evaluations(name: str, phases: Mapping[str, Path], task: str) -> list[str]:
    """Jobs that measured each phase; the last phase is the base."""
    return [f"{name}/evaluate/{model}/{task}" for model in (*list(phases)[:-1], "base")]


def _result(run: Run, job: str) -> dict[str, Any]:
    result = read_json(run.folders[job] / "result.json")
    if "failed" in result:
        raise ConfigError(f"{job} has failed, and the law needs it: {result['failed']}")
    return result


def _metric(columns: Sequence[Column], settings: ScalingJob) -> Column:
    key = f"{settings.label}_acc1" if settings.label else "mean_R@1"
    known = {column.key: column for column in columns if column.is_main}
    if settings.label and key not in known:
        raise ConfigError(
            f"scaling.label = {settings.label!r}: task {settings.task} has {', '.join(known)}"
        )
    return known.get(key) or columns[0]


def _trial(
    run: Run, about: SweepRun, phases: Mapping[str, Path], scores: tuple[float, ...]
) -> Trial:
    manifests = [run.manifests[f"{about.run}/pretrain/{phase}"] for phase in phases]
    settings = [validate(PretrainJob, manifest["settings"]) for manifest in manifests]
    configs = [read_json(folder / "model.json")["config"] for folder in phases.values()]
    macs = [cost.training_macs(*each) for each in zip(configs, settings, strict=True)]
    hours = [manifest["train_seconds"] / 3600 for manifest in manifests]
    data = [manifest["inputs"]["index"]["id"] for manifest in manifests]
    return Trial(
        run=about.run,
        point=about.point,
        size=settings[0].model.model_dump_json(),
        num_params=count_parameters(list(phases.values())[-1] / "model.safetensors"),
        tokens={
            "image": cost.image_tokens(configs[0], settings[0]),
            "text": settings[0].text_length,
        },
        strategy={side: _strategy(settings[0], side) for side in SIDES},
        recipe=json.dumps([data, [_deciding(each) for each in settings]]),
        samples_seen=sum(each.samples_seen for each in settings),
        macs=_running(macs),
        hours=_running(hours),
        scores=scores,
    )


def _deciding(phase: PretrainJob) -> dict[str, Any]:
    settings, _ = deciding(phase.model_dump(mode="json", exclude={"seed"}), {})
    return settings


def _running(numbers: Sequence[float]) -> tuple[float, ...]:
    return tuple(sum(numbers[: count + 1]) for count in range(len(numbers)))


def _strategy(phase: PretrainJob, side: Side) -> str:
    """Name of a reduction, with those of its options that are not as usual; how much is kept shows in the tokens."""
    reduction = phase.image_reduction if side == "image" else phase.text_reduction
    options = reduction.model_dump(exclude_defaults=True, exclude={"kind", "keep"})
    return " ".join([reduction.kind, *(f"{key}={value}" for key, value in options.items())])


def count_parameters(weights: Path) -> int:
    """Numbers in a file of weights, of which only the head is read."""
    total = 0
    with safe_open(weights, framework="numpy") as file:
        for name in file.keys():
            total += math.prod(file.get_slice(name).get_shape())
    return total
