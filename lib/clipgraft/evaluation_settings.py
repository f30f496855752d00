"""Settings of evaluation, and of the pages that show it.

Part of `settings`, in a file of its own like `recipes`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from clipgraft.sources import Name, Settings


class ZeroShotSettings(Settings):
    """Zero-shot classification of one label of a data set."""

    label: str = Field("class", description="Name of the label; `.cls` of tars is `class`.")
    templates: list[str] = Field(
        default_factory=list, description="Prompts with {c}; empty: those of the built-in data set."
    )


class TaskSettings(Settings):
    """One evaluation data set and what is measured on it."""

    data: str = Field(description="A name under `download`.")
    retrieval: bool = Field(
        False, description="Image to text and text to image, recall at 1, 5, 10."
    )
    zero_shot: list[ZeroShotSettings] = Field(default_factory=list)
    probe: list[str] = Field(
        default_factory=list,
        description="Labels that a linear classifier shall read off the image embeddings, of every model and of one with "
        "random weights; and which experts have to do with them.",
    )
    given: list[Annotated[list[str], Field(min_length=1)]] = Field(
        default_factory=list,
        description="Retrieval among candidates that agree on labels, e.g. [[colour], [colour, shape]].",
    )

    @model_validator(mode="after")
    def _measures(self) -> TaskSettings:
        if not self.retrieval and not self.zero_shot and not self.probe:
            raise ValueError(
                "nothing to measure: set `retrieval: true`, or list labels under `zero_shot` or `probe`"
            )
        if self.given and not self.retrieval:
            raise ValueError(f"given = {self.given} is a kind of retrieval. Hint: retrieval: true")
        once = {"probe": self.probe, "given": ["+".join(sorted(labels)) for labels in self.given]}
        once |= {f"given.{number}": labels for number, labels in enumerate(self.given)}
        for key, names in once.items():
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise ValueError(f"{key} names {twice[0]} twice. Hint: once is enough")
        return self


class EvaluateSettings(Settings):
    """Every model on the way is measured on every task."""

    tasks: dict[Name, TaskSettings]


class ReportSettings(Settings):
    """The page at the end."""

    title: str = "clipgraft"
    num_pictures: NonNegativeInt = Field(32, description="Pictures on a sample sheet.")


class ScalingSettings(Settings):
    """The page of a sweep: what shorter sequences cost, by the size of the model."""

    title: str = "The inverse scaling law"
    task: Name | None = Field(
        None, description="A task of `evaluate`; null: the first with retrieval, else the first."
    )
    label: str | None = Field(
        None,
        description="Zero-shot accuracy of this label is the metric; null: mean R@1, or the first label where the "
        "task has no retrieval.",
    )
    num_resamples: PositiveInt = Field(
        2000, description="Of the bootstrap behind the intervals of the slopes."
    )
