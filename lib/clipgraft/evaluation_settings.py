"""Settings of evaluation, and of the pages that show it.

Part of `settings`, in a file of its own like `recipes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from clipgraft.reductions import BlockPatches, ImageReduction, RandomPatches, Resize
from clipgraft.sources import Name, Settings

Labels = Annotated[list[str], Field(min_length=1)]


class ZeroShotSettings(Settings):
    """Zero-shot classification of one label of a data set."""

    label: str = Field("class", description="Name of the label; `.cls` of tars is `class`.")
    templates: list[str] = Field(
        default_factory=list, description="Prompts with {c}; empty: those of the built-in data set."
    )


class RetrievalSettings(Settings):
    """Image to text and text to image: which captions take part, and what is right."""

    protocol: Literal["all", "five_captions"] = Field(
        "all",
        description="all: every caption, which is right for all images that have it; five_captions: the first five of each "
        "image, right for that image alone, as numbers on Karpathy's splits and CLIP_benchmark's are counted.",
    )
    captions: list[Name] = Field(
        default_factory=list,
        description="Kinds of captions, e.g. [long] for long captions alone; empty: all kinds.",
    )


class NeighbourSettings(Settings):
    """Classification by the nearest images (k-NN)."""

    labels: Labels
    num_neighbours: PositiveInt = Field(20, description="How many vote (k).")


class RobustnessSettings(Settings):
    """The same measures with fewer tokens than the model was made for, of images or of texts."""

    image: list[ImageReduction] = Field(
        default_factory=list,
        description="Which patches stay, as `image_reduction` of a phase has it: [{kind: random, keep: 0.5}, grid].",
    )
    text: list[Annotated[int, Field(ge=3)]] = Field(
        default_factory=list,
        description="Tokens to which captions and prompts are cut, start and end counted.",
    )

    @model_validator(mode="after")
    def _reduces(self) -> RobustnessSettings:
        if not self.image and not self.text:
            raise ValueError("nothing is reduced. Hint: image: [grid], or text: [8]")
        for each in self.image:
            is_whole = isinstance(each, RandomPatches | BlockPatches) and each.keep == 1
            if isinstance(each, Resize) or is_whole:
                raise ValueError(
                    f"image: {each.kind} drops no patch. Hint: {{kind: random, keep: 0.5}}"
                )
        _check_once("image", [name_of(each) for each in self.image])
        _check_once("text", [str(each) for each in self.text])
        return self


def name_of(reduction: ImageReduction) -> str:
    """What sets an image reduction apart, in a word or two: `random 0.5`, `grid fixed`."""
    details = [str(value) for key, value in reduction if key != "kind"]
    return " ".join([reduction.kind, *details])


def _switch(raw: Any) -> Any:
    """`true` is all defaults, `false` is nothing."""
    return ({} if raw else None) if isinstance(raw, bool) else raw


def _labels_alone(raw: Any) -> Any:
    return {"labels": raw} if isinstance(raw, list) else raw


Retrieval = Annotated[
    RetrievalSettings | None,
    BeforeValidator(_switch, json_schema_input_type=bool | RetrievalSettings | None),
]
Neighbours = Annotated[
    NeighbourSettings | None,
    BeforeValidator(_labels_alone, json_schema_input_type=Labels | NeighbourSettings | None),
]


class TaskSettings(Settings):
    """One evaluation data set and what is measured on it."""

    data: str = Field(description="A name under `download`.")
    retrieval: Retrieval = Field(
        None,
        description="Image to text and text to image, recall at 1, 5, 10; true: of all captions.",
    )
    zero_shot: list[ZeroShotSettings] = Field(default_factory=list)
    probe: list[str] = Field(
        default_factory=list,
        description="Labels that a linear classifier shall read off the image embeddings, of every model and of one with "
        "random weights; and which experts have to do with them.",
    )
    knn: Neighbours = Field(
        None,
        description="Labels that the nearest images shall tell, of every model and of one with random weights: [class], or "
        "{labels: [class], num_neighbours: 20}.",
    )
    given: list[Labels] = Field(
        default_factory=list,
        description="Retrieval among candidates that agree on labels, e.g. [[colour], [colour, shape]].",
    )
    robustness: RobustnessSettings | None = Field(
        None, description="Retrieval and zero-shot classification once more with fewer tokens."
    )

    @property
    def labels_of(self) -> Iterator[tuple[str, str]]:
        """Each label that is read, after the key that names it."""
        wanted = [("probe", self.probe), *(("given", labels) for labels in self.given)]
        wanted.append(("knn", self.knn.labels if self.knn else []))
        return ((key, label) for key, labels in wanted for label in labels)

    @model_validator(mode="after")
    def _measures(self) -> TaskSettings:
        if not (self.retrieval or self.zero_shot or self.probe or self.knn):
            raise ValueError(
                "nothing to measure: set `retrieval: true`, or list labels under `zero_shot`, `probe` or `knn`"
            )
        if self.given and not self.retrieval:
            raise ValueError(f"given = {self.given} is a kind of retrieval. Hint: retrieval: true")
        if self.robustness and not (self.retrieval or self.zero_shot):
            raise ValueError(
                "robustness repeats retrieval and zero_shot, and neither is set. Hint: retrieval: true"
            )
        _check_once("zero_shot", [each.label for each in self.zero_shot])
        _check_once("probe", self.probe)
        _check_once("knn", self.knn.labels if self.knn else [])
        _check_once("retrieval.captions", self.retrieval.captions if self.retrieval else [])
        _check_once("given", ["+".join(sorted(labels)) for labels in self.given])
        for number, labels in enumerate(self.given):
            _check_once(f"given.{number}", labels)
        return self


def _check_once(key: str, names: list[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{key} names {twice[0]} twice. Hint: once is enough")


class WatchSettings(Settings):
    """A quick evaluation every so often while a model trains: before the first step, after the last, and in between."""

    task: Name = Field(
        description="A name under evaluate.tasks: its data, its retrieval and its zero_shot labels."
    )
    every: PositiveInt = Field(description="Samples seen from one look to the next.")
    num_samples: PositiveInt = Field(
        1000, description="Of the data, evenly spread over it; all where there are fewer."
    )
    best: bool = Field(
        False,
        description="Keep the weights that did best (mean R@1; without retrieval, mean accuracy) as the model folder "
        "`best/` beside the last ones. Part of the version, unlike the rest of `watch`.",
    )


class WatchJob(WatchSettings):
    """What a training is handed: the same, and what the task measures."""

    retrieval: Retrieval
    zero_shot: list[ZeroShotSettings]


class EvalsetSettings(Settings):
    """A folder of evaluation sets as DataComp's `download_evalsets.py` fills it; it may lack some."""

    folder: str = Field(description="Holds wds_<task>_test/, hf_cache/ and the like.")
    tasks: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="Keys such as vtab/dtd or imagenet1k; null: all whose data are there."
    )


class EvaluateSettings(Settings):
    """Every model on the way is measured on every task."""

    tasks: dict[Name, TaskSettings] = Field(default_factory=dict)
    evalset: EvalsetSettings | None = Field(
        None, description="DataComp's tasks, one job per model and task (workflow/docs/evalset.md)."
    )

    @model_validator(mode="after")
    def _any(self) -> EvaluateSettings:
        if self.evalset is None and "tasks" not in self.model_fields_set:
            raise ValueError(
                "neither tasks nor evalset is given. Hint: `tasks: {}` to evaluate nothing"
            )
        return self


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
