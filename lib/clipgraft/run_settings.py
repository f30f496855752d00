"""All settings of one run: `config.yaml` with the run's overlay, section by section.

Sections carry the names of the stages. Everything is science, it changes results, and so is hashed into versions; the
exceptions are `resources` (devices, threads, memory, time) and `slurm`, which never are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from clipgraft.baseline_settings import BaselineSettings, with_kinds
from clipgraft.crosschecks import check
from clipgraft.evaluation_settings import (
    EvaluateSettings,
    ReportSettings,
    ScalingSettings,
    WatchJob,
    WatchSettings,
)
from clipgraft.model_settings import ModelSettings
from clipgraft.moe_settings import ClusterSettings, ExpertSettings, MoeSettings, RouterSettings
from clipgraft.recipes import PhaseSettings, TrainSettings
from clipgraft.reductions import TEXT_MASKS, text_mask_of
from clipgraft.resource_settings import ResourceSettings, SlurmSettings
from clipgraft.settings import EmbedSettings, IndexSettings, ShardSettings, Stage
from clipgraft.sources import Name, Settings, Source


def _named(raw: Any) -> Any:
    """Things by name, without those that are `null`."""
    return {k: v for k, v in raw.items() if v is not None} if isinstance(raw, Mapping) else raw


class RunSettings(Settings):
    """All settings of one run: the shared ones with the run's overlay applied."""

    seed: NonNegativeInt = 0
    download: dict[Name, Source]
    index: IndexSettings = IndexSettings()
    shard: ShardSettings = ShardSettings()
    model: ModelSettings
    pretrain: Annotated[list[PhaseSettings], Field(min_length=1)]
    embed: EmbedSettings = EmbedSettings()
    cluster: ClusterSettings = ClusterSettings()
    finetune_expert: ExpertSettings | None = None
    moe: MoeSettings | None = Field(
        MoeSettings(),
        description="null: the run stops at the base; what is set for experts and routers is then not used.",
    )
    finetune_router: RouterSettings | None = None
    baselines: dict[Name, BaselineSettings] = Field(
        default_factory=dict,
        description="What the mixture of experts is held against, by name; null removes one that an overlay inherits.",
    )
    evaluate: EvaluateSettings
    report: ReportSettings = ReportSettings()
    scaling: ScalingSettings = ScalingSettings()
    resources: dict[Stage, ResourceSettings] = Field(default_factory=dict)
    slurm: SlurmSettings = SlurmSettings()

    @field_validator("baselines", mode="before")
    @classmethod
    def _kinds(cls, raw: Any) -> Any:
        return with_kinds(raw)

    @model_validator(mode="before")
    @classmethod
    def _taken_back(cls, raw: Any) -> Any:
        """`null` takes back what an overlay inherits: a data set, a task, as it does a section or a setting."""
        if not isinstance(raw, Mapping):
            return raw
        kept = {
            key: _named(value) if key in ("download", "resources") else value
            for key, value in raw.items()
        }
        evaluate = kept.get("evaluate")
        if isinstance(evaluate, Mapping) and "tasks" in evaluate:
            kept["evaluate"] = {**evaluate, "tasks": _named(evaluate["tasks"])}
        return kept

    @model_validator(mode="before")
    @classmethod
    def _mask_of_model(cls, raw: Any) -> Any:
        """A model config that names a text reduction names it for all phases that do not."""
        model, phases = (raw.get(key) for key in ("model", "pretrain"))
        config = model.get("config") if isinstance(model, Mapping) else None
        mask = text_mask_of(config) if isinstance(config, Mapping) else None
        if mask is None or not isinstance(phases, list):
            return raw
        keys = {"text_reduction", *TEXT_MASKS}
        masked = [
            {**phase, "text_reduction": mask}
            if isinstance(phase, Mapping) and not keys & phase.keys()
            else phase
            for phase in phases
        ]
        return {**raw, "pretrain": masked}

    @model_validator(mode="after")
    def _crosscheck(self) -> RunSettings:
        check(self)
        return self

    @property
    def tuned(self) -> dict[str, TrainSettings]:
        """The sections of the trainings that follow the base, by name; none without experts."""
        sections: dict[str, TrainSettings | None] = {
            "finetune_expert": self.finetune_expert,
            "finetune_router": self.finetune_router,
        }
        return {name: section for name, section in sections.items() if section and self.moe}

    @property
    def trainings(self) -> dict[str, TrainSettings]:
        """The sections of all trainings, by where they stand."""
        phases = {f"pretrain.{phase.name}": phase for phase in self.pretrain}
        return {**phases, **self.tuned}

    @property
    def scaling_task(self) -> str:
        """The task that the scaling page is about."""
        tasks = self.evaluate.tasks
        with_retrieval = (name for name, task in tasks.items() if task.retrieval)
        measured = (name for name, task in tasks.items() if task.retrieval or task.zero_shot)
        first = next(with_retrieval, None) or next(measured, None) or next(iter(tasks))
        return self.scaling.task or first

    def watched(self, watch: WatchSettings | None) -> WatchJob | None:
        """What a training is handed of its watch."""
        if watch is None:
            return None
        task = self.evaluate.tasks[watch.task]
        return WatchJob(**dict(watch), retrieval=task.retrieval, zero_shot=task.zero_shot)

    def resources_of(self, stage: str) -> ResourceSettings:
        """The wish of a stage, or the default."""
        wishes = {str(name): wish for name, wish in self.resources.items()}
        return wishes.get(stage, ResourceSettings())
