"""What each job is handed: the section of its stage, and what it needs from others; and the sections of the data stages.

A job sees no other settings, so that a change of one stage's section makes no other stage run again. Unknown keys are
errors (`config` words them). `run_settings` has all sections of a run together.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from clipgraft.evaluation_settings import (
    ReportSettings,
    ScalingSettings,
    TaskSettings,
    WatchJob,
)
from clipgraft.model_settings import ModelSettings
from clipgraft.moe_settings import (
    BatchOrder,
    ClusterSettings,
    MlpSettings,
    MoeSettings,
    RouterSettings,
)
from clipgraft.recipes import AugmentationSettings, PhaseSettings
from clipgraft.sources import (
    Name,
    OneSource,
    Settings,
)


class IndexSettings(Settings):
    """Which samples are accepted, and how captions become tokens."""

    min_side: PositiveInt = Field(16, description="Reject images with a shorter side, in pixels.")
    max_aspect_ratio: PositiveFloat = 5.0
    max_megapixels: PositiveFloat = Field(
        100.0, le=200, description="Reject larger images before decoding."
    )
    vocabulary: Literal["corpus", "full", "wordpiece"] = Field(
        "corpus",
        description="corpus: keep only the merges of CLIP's BPE that the training captions use, so small "
        "models need no 49,408 row token table; full: CLIP's own vocabulary (for public weights); "
        "wordpiece: BERT's words and pieces, without an end token (CLIPA-v2).",
    )
    wordpiece: str | None = Field(
        None,
        description="A BERT vocab.txt for `vocabulary: wordpiece`; null: one is made from the training captions.",
    )
    tagger: Literal["textblob", "nltk"] = Field(
        "textblob",
        description="Word classes of captions; textblob brings its model along, nltk needs NLTK_DATA.",
    )
    drop_duplicates: bool = Field(
        True, description="Training set: reject images whose pixels are those of an earlier sample."
    )
    near_duplicates: Annotated[int, Field(ge=0, le=16)] | None = Field(
        None,
        description="Training set: reject images whose perceptual hash (pHash) differs in at most so many of 64 "
        "bits from an earlier one's; 4 finds copies of another size or quality.",
    )
    not_in: list[Name] = Field(
        default_factory=list,
        description="Training set: reject images that are in these data sets (names under download).",
    )

    @model_validator(mode="after")
    def _wordpiece(self) -> IndexSettings:
        if self.wordpiece is not None and self.vocabulary != "wordpiece":
            raise ValueError(
                f"wordpiece = {self.wordpiece!r}, but vocabulary is {self.vocabulary}. "
                "Hint: vocabulary: wordpiece"
            )
        return self


class ShardSettings(Settings):
    """How images are stored for training."""

    oversize: Annotated[float, Field(ge=1)] | None = Field(
        None,
        description="Short side of the stored image over the training size. Unless given, 1.05 where crops keep 90 % of "
        "the area and more (crop_scale), 1.58 where they keep 40 %: so that none is enlarged.",
    )
    quality: Annotated[int, Field(ge=1, le=100)] = Field(95, description="JPEG quality.")
    format: Literal["jpeg", "raw"] = Field(
        "jpeg", description="raw: uint8 pixels, squares; up to 96 px it is no larger, and faster."
    )
    samples_per_tar: PositiveInt = 10_000


class EmbedSettings(Settings):
    """How the training set is embedded before clustering."""

    captions: Literal["first", "mean"] = Field(
        "mean", description="Text embedding of a sample with several captions."
    )


Stage = Literal[
    "download",
    "index",
    "shard",
    "pretrain",
    "embed",
    "cluster",
    "finetune_expert",
    "assemble",
    "finetune_router",
    "soup",
    "evaluate",
    "report",
    "scaling",
]
STAGES: tuple[str, ...] = get_args(Stage)


# --- what a job is handed: its section, and what it needs from others ---------------------------------------


class DownloadJob(Settings):
    """Settings of one `download` job."""

    source: OneSource


class IndexJob(IndexSettings):
    """Settings of one `index` job."""

    tokenize: bool = Field(description="Write token ids; only the training set needs them.")


class ShardJob(ShardSettings):
    """Settings of one `shard` job."""

    image_size: PositiveInt = Field(description="Training size of the phase that reads the shards.")
    oversize: Annotated[float, Field(ge=1)] = 1.58


class ReferenceJob(Settings):
    """Settings of an `embed` job of a reference; an expert's is handed EmbedSettings."""

    model: str
    pretrained: str | None = None
    image_size: PositiveInt
    crops: PositiveInt = 1
    augmentation: AugmentationSettings | None = Field(
        None,
        description="What several crops are drawn with; null: the one is the picture as in evaluation.",
    )
    seed: NonNegativeInt = Field(0, description="Of the crops.")


class PretrainJob(PhaseSettings):
    """Settings of one `pretrain` job: a phase, and the architecture."""

    model: ModelSettings
    seed: NonNegativeInt
    watch: WatchJob | None = None


class ClusterJob(ClusterSettings):
    """Settings of one `cluster` job: those of its round."""

    image_clusters: PositiveInt | None = None
    text_clusters: PositiveInt | None = None
    joint_clusters: PositiveInt | None = None
    seed: NonNegativeInt


class ExpertJob(MlpSettings):
    """Settings of one `finetune_expert` job, experts and baselines alike."""

    batches: Literal["homogeneous", "ordinary"]
    weights: Literal["mlps", "all"] = Field(
        "mlps", description="all: but the temperature, and positions that are sines and cosines."
    )
    batch_order: BatchOrder = "shuffled"
    seed: NonNegativeInt
    watch: WatchJob | None = None


class AssembleJob(MoeSettings):
    """Settings of one `assemble` job."""

    copies: bool = Field(
        False,
        description="Of one model `num_experts` copies (sparse upcycling), not of several one each.",
    )
    noise: NonNegativeFloat = Field(
        0.0,
        description="Of copies: normal noise on the MLPs of all experts but the first, in standard deviations of each "
        "tensor.",
    )
    seed: NonNegativeInt

    @model_validator(mode="after")
    def _noise(self) -> AssembleJob:
        if self.noise and not self.copies:
            raise ValueError(
                f"noise = {self.noise} has no effect without copies. Hint: remove it, or copies: true"
            )
        return self


class RouterJob(RouterSettings):
    """Settings of one `finetune_router` job."""

    seed: NonNegativeInt
    watch: WatchJob | None = None


class SoupJob(Settings):
    """Settings of one `soup` job: none, the experts say it all."""


class EvaluateJob(TaskSettings):
    """Settings of one `evaluate` job."""

    task: str
    untrained: NonNegativeInt | None = Field(
        None, description="Seed of random weights, which take the place of those of the model."
    )


class EvalsetJob(Settings):
    """Settings of one `evaluate` job on a data set of an evaluation folder."""

    folder: str
    evalset: str = Field(description="Key of the task, e.g. vtab/dtd.")


class ReportJob(ReportSettings):
    """Settings of one `report` job."""

    run: str
    seed: NonNegativeInt = Field(description="Of the run, which those of its jobs are made from.")


class SweepRun(Settings):
    """One run of a sweep, and where it stands: axis to the name of its point."""

    run: str
    point: dict[str, str]


class ScalingJob(ScalingSettings):
    """Settings of one `scaling` job."""

    task: Name
    runs: list[SweepRun] = Field(description="In the order of the axes, which says what is first.")
    seed: NonNegativeInt
