"""The settings: one pydantic model of `config.yaml`, section by section, and of what each job is handed.

Three decisions shape it. Sections carry the names of the stages, and a stage's job is handed its own section
only. Everything here is science: it changes results, so it is hashed into versions; the exceptions are
`resources` (devices, threads, memory, time) and `slurm`, which never are. Unknown keys are errors (`config` words them).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from clipgraft.baseline_settings import BaselineSettings, with_kinds
from clipgraft.evaluation_settings import (
    EvaluateSettings,
    ReportSettings,
    RobustnessSettings,
    ScalingSettings,
    TaskSettings,
    WatchJob,
    WatchSettings,
)
from clipgraft.moe_settings import (
    BatchOrder,
    ClusterSettings,
    ExpertSettings,
    MlpSettings,
    MoeSettings,
    RouterSettings,
)
from clipgraft.recipes import (
    AugmentationSettings,
    ModelSettings,
    PhaseSettings,
    TrainSettings,
    hint,
    position_kind,
    position_misfit,
    start_misfit,
    stretch_misfit,
    vocabulary_misfit,
)
from clipgraft.reductions import TEXT_MASKS, num_kept, text_mask_of
from clipgraft.resource_settings import ResourceSettings, SlurmSettings
from clipgraft.sources import (
    Attribute,
    MixedSource,
    Name,
    OneSource,
    Settings,
    ShapesSource,
    Source,
    TarSource,
)

S = TypeVar("S", bound=BaseModel)


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
        if "train" not in self.download:
            raise ValueError(
                f"download has no `train` (it has {', '.join(self.download)}). Hint: name the training set `train`"
            )
        for name in self.index.not_in:
            if name not in self.download or name == "train":
                others = [other for other in self.download if other != "train"]
                raise ValueError(
                    f"index.not_in: {name!r} is no evaluation set under download{hint(name, others)}"
                )
        names = [phase.name for phase in self.pretrain]
        if len(set(names)) < len(names):
            raise ValueError(f"pretrain: phase names must differ, got {names}")
        for name, task in self.evaluate.tasks.items():
            if task.data not in self.download:
                raise ValueError(
                    f"evaluate.tasks.{name}.data = {task.data!r} is not under download "
                    f"({', '.join(self.download)}){hint(task.data, self.download)}"
                )
        for stage, wish in self.resources.items():
            wish.check(stage)
        self._check_sections()
        self._check_names()
        self._check_tasks()
        self._check_scaling()
        self._check_patches()
        self._check_vocabulary()
        self._check_crops()
        self._check_positions()
        self._check_starts()
        self._check_layers()
        self._check_rounds()
        self._check_batches()
        self._check_source_weights()
        self._check_watches()
        self._check_parallel()
        return self

    @property
    def tuned(self) -> dict[str, TrainSettings]:
        """The sections of the trainings that follow the base, by name; none without experts."""
        sections: dict[str, TrainSettings | None] = {
            "finetune_expert": self.finetune_expert,
            "finetune_router": self.finetune_router,
        }
        return {name: section for name, section in sections.items() if section and self.moe}

    def _check_sections(self) -> None:
        for name in ("finetune_expert", "finetune_router"):
            if self.moe and name not in self.tuned:
                raise ValueError(
                    f"missing key `{name}`. Hint: with `moe: null` the run stops at the base"
                )

    def _check_names(self) -> None:
        """Phases, baselines and the models of every run are evaluated side by side, by name."""
        experts = [f"expert_{k}" for k in range(self.moe.num_experts if self.moe else 0)]
        phases = [phase.name for phase in self.pretrain[:-1]]
        names = ["base", "untrained", *experts, "upcycled", "moe", *phases, *self.baselines]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"{', '.join(twice)}: a phase or baseline has the name of another model"
            )

    def _check_tasks(self) -> None:
        if self.evaluate.evalset is not None and "evalset" in self.evaluate.tasks:
            raise ValueError(
                "evaluate.tasks.evalset: the results of evaluate.evalset have this name. Hint: another name"
            )
        for name, task in self.evaluate.tasks.items():
            source = self.download[task.data]
            for key, label in task.labels_of:
                if isinstance(source, ShapesSource) and label not in get_args(Attribute):
                    raise ValueError(
                        f"evaluate.tasks.{name}.{key}: label {label!r} is none of shapes"
                        f"{hint(label, get_args(Attribute))}"
                    )
            for measure in task.zero_shot:
                where = f"evaluate.tasks.{name}.zero_shot: label {measure.label!r}"
                if isinstance(source, ShapesSource) and measure.label not in get_args(Attribute):
                    raise ValueError(
                        f"{where} is none of shapes{hint(measure.label, get_args(Attribute))}"
                    )
                if (
                    isinstance(source, TarSource)
                    and measure.label == "class"
                    and not source.classes
                ):
                    raise ValueError(
                        f"{where} needs names. Hint: download.{task.data}.classes: a file with one per line"
                    )
                for template in measure.templates:
                    if "{c}" not in template:
                        raise ValueError(f"{where}: template {template!r} has no {{c}}")
            if task.robustness is not None:
                self._check_robustness(f"evaluate.tasks.{name}.robustness", task.robustness)

    def _check_robustness(self, where: str, robustness: RobustnessSettings) -> None:
        length = self.pretrain[-1].text_length
        if max(robustness.text, default=0) >= length:
            raise ValueError(
                f"{where}.text = {robustness.text}: texts of the base have {length} tokens "
                f"(pretrain.{self.pretrain[-1].name}.text_length). Hint: fewer"
            )
        patch = ((self.model.config or {}).get("vision_cfg") or {}).get("patch_size")
        for phase in self.pretrain:
            if not isinstance(patch, int):
                return
            for reduction in robustness.image:
                try:
                    num_kept(reduction, phase.image_size // patch, phase.image_size // patch)
                except ValueError as error:
                    raise ValueError(f"{where}, of pretrain.{phase.name}: {error}") from None

    @property
    def scaling_task(self) -> str:
        """The task that the scaling page is about."""
        tasks = self.evaluate.tasks
        with_retrieval = (name for name, task in tasks.items() if task.retrieval)
        measured = (name for name, task in tasks.items() if task.retrieval or task.zero_shot)
        first = next(with_retrieval, None) or next(measured, None) or next(iter(tasks))
        return self.scaling.task or first

    def _check_scaling(self) -> None:
        if not self.evaluate.tasks:
            return
        tasks, name, label = self.evaluate.tasks, self.scaling.task, self.scaling.label
        if name is not None and name not in tasks:
            raise ValueError(
                f"scaling.task = {name!r} is no task of evaluate.tasks{hint(name, tasks)}"
            )
        labels = [measure.label for measure in tasks[self.scaling_task].zero_shot]
        if label is not None and label not in labels:
            raise ValueError(
                f"scaling.label = {label!r} is no zero_shot label of evaluate.tasks.{self.scaling_task}"
                f"{hint(label, labels)}"
            )

    def _check_layers(self) -> None:
        if self.moe is None or self.finetune_expert is None:
            return
        config = self.model.config or {}
        for tower, key in (("vision", "image_layers"), ("text", "text_layers")):
            depth = (config.get(f"{tower}_cfg") or {}).get("layers")
            for section in ("moe", "finetune_expert"):
                layers = getattr(getattr(self, section), key)
                if layers != "all" and isinstance(depth, int) and max(layers, default=0) >= depth:
                    raise ValueError(
                        f"{section}.{key} = {layers}: the {tower} tower has {depth} layers. "
                        f"Hint: 0 to {depth - 1}, or all"
                    )
            self._check_grafted(key, depth)

    def _check_grafted(self, key: str, depth: object) -> None:
        """Blocks that no expert has trained would hold copies, for good if routers alone are trained."""
        assert self.moe is not None and self.finetune_expert is not None
        if self.finetune_router and self.finetune_router.train != "routers":
            return
        tower, grafted = key.removesuffix("_layers"), getattr(self.moe, key)
        is_locked = tower in self.finetune_expert.lock
        trained = [] if is_locked else getattr(self.finetune_expert, key)
        if isinstance(depth, int) and grafted == "all":
            grafted = list(range(depth))
        if trained == "all" or (grafted != "all" and set(grafted) <= set(trained)):
            return
        where = f"lock = [{tower}]" if is_locked else f"{key} = {trained}"
        raise ValueError(
            f"moe.{key} = {getattr(self.moe, key)}, but finetune_expert.{where}: in other blocks the experts would be "
            f"copies of one MLP. Hint: moe: {{{key}: {trained}}}"
        )

    def _check_rounds(self) -> None:
        if self.moe is None:
            return
        num_rounds = self.moe.num_experts - 1
        for side, given in self.cluster.given.items():
            if isinstance(given, list) and len(given) != num_rounds:
                raise ValueError(
                    f"cluster.{side}_clusters = {given} is for {len(given)} rounds, but moe.num_experts = "
                    f"{self.moe.num_experts} makes {num_rounds}. Hint: one number for each round, or one for all"
                )

    def _check_patches(self) -> None:
        vision: dict[str, Any] = (self.model.config or {}).get("vision_cfg") or {}
        patch = vision.get("patch_size")
        for phase in self.pretrain:
            if not isinstance(patch, int):
                return
            if phase.image_size % patch:
                lower = phase.image_size // patch * patch
                raise ValueError(
                    f"pretrain.{phase.name}.image_size = {phase.image_size} is not divisible by the patch size "
                    f"{patch} of model.config.vision_cfg. Hint: {lower or patch} or {lower + patch}"
                )
            side = phase.image_size // patch
            try:
                num_kept(phase.image_reduction, side, side)
            except ValueError as error:
                raise ValueError(f"pretrain.{phase.name}.{error}") from None

    def _check_vocabulary(self) -> None:
        if self.model.config is not None:  # of named architectures, training knows
            misfit = vocabulary_misfit(self.model.config["text_cfg"], self.index.vocabulary)
            if misfit:
                raise ValueError(f"model.config.{misfit}")

    def _check_crops(self) -> None:
        for phase in self.pretrain:
            several = [each.crops for each in phase.references if each.crops > 1]
            if len(set(several)) > 1:
                raise ValueError(
                    f"pretrain.{phase.name}.references: crops = {' and '.join(map(str, several))}, but a visit shows "
                    "one crop to all of them. Hint: the same number, or 1 for the picture as in evaluation"
                )

    def _check_positions(self) -> None:
        if self.model.config is None:  # of named architectures, training knows
            return
        was_frozen = self.model.config["vision_cfg"].get("pos_embed_type") == "sin_cos_2d"
        for number, phase in enumerate(self.pretrain):
            misfit = position_misfit(phase, was_frozen, is_carried=number > 0)
            if misfit:
                raise ValueError(misfit)
            was_frozen = position_kind(phase, was_frozen) == "sincos_frozen"

    def _check_starts(self) -> None:
        for number, phase in enumerate(self.pretrain):
            is_carried, has_pretrained = number > 0, self.model.pretrained is not None
            misfit = start_misfit(phase, is_carried, has_pretrained)
            if misfit:
                raise ValueError(misfit)
            if is_carried and phase.text_pos_resize == "stretch":
                before = self.pretrain[number - 1].text_length
                misfit = stretch_misfit(phase.text_pos_keep, before)
                if misfit:
                    raise ValueError(f"pretrain.{phase.name}.{misfit}")

    def _check_batches(self) -> None:
        train = self.download["train"]
        if not isinstance(train, ShapesSource):
            return  # the number of samples is known after `index`; training checks it there
        sections: dict[str, TrainSettings] = {
            f"pretrain.{phase.name}": phase for phase in self.pretrain
        }
        sections |= self.tuned
        for where, section in sections.items():
            if section.batch_size > train.num_samples:
                raise ValueError(
                    f"{where}.batch_size = {section.batch_size} is larger than the data: download.train.num_samples "
                    f"= {train.num_samples}. Hint: a smaller batch, or more samples"
                )

    def _check_source_weights(self) -> None:
        train = self.download["train"]
        names = list(train.sources) if isinstance(train, MixedSource) else []
        sections = [(f"pretrain.{phase.name}", phase.source_weights) for phase in self.pretrain]
        sections += [(name, section.source_weights) for name, section in self.tuned.items()]
        for where, weights in sections:
            for name in weights:
                if name not in names:
                    raise ValueError(
                        f"{where}.source_weights: {name!r} is no source of download.train"
                        + (hint(name, names) if names else ", which is not of the kind `mixed`")
                    )

    def _check_watches(self) -> None:
        sections: dict[str, TrainSettings] = {
            f"pretrain.{phase.name}": phase for phase in self.pretrain
        }
        for where, watch in ((w, section.watch) for w, section in (sections | self.tuned).items()):
            if watch is None:
                continue
            task = self.evaluate.tasks.get(watch.task)
            if task is None:
                raise ValueError(
                    f"{where}.watch.task = {watch.task!r} is no task of evaluate.tasks"
                    f"{hint(watch.task, self.evaluate.tasks)}"
                )
            if not task.retrieval and not task.zero_shot:
                raise ValueError(
                    f"{where}.watch.task = {watch.task!r} has neither retrieval nor zero_shot, the quick measures. "
                    f"Hint: evaluate.tasks.{watch.task}.retrieval: true, or another task"
                )

    def _check_parallel(self) -> None:
        trainings = [(f"pretrain.{phase.name}", "pretrain", phase) for phase in self.pretrain]
        for where, stage, section in trainings + [
            (name, name, each) for name, each in self.tuned.items()
        ]:
            wish = self.resources_of(stage)
            if section.parallel == "fsdp" and wish.gpu < 2 and wish.nodes < 2:
                raise ValueError(
                    f"{where}.parallel = fsdp has no effect on one device: resources.{stage} wishes for gpu: {wish.gpu}, "
                    f"nodes: {wish.nodes}. Hint: more devices, or parallel: ddp"
                )

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


class SweepRun(Settings):
    """One run of a sweep, and where it stands: axis to the name of its point."""

    run: str
    point: dict[str, str]


class ScalingJob(ScalingSettings):
    """Settings of one `scaling` job."""

    task: Name
    runs: list[SweepRun] = Field(description="In the order of the axes, which says what is first.")
    seed: NonNegativeInt
