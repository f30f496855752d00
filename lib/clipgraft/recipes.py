"""Recipes: the settings of a training, which pretraining, experts and routers share.

Part of `settings`, in a file of its own like `sources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from clipgraft.evaluation_settings import WatchSettings
from clipgraft.loss_settings import (
    DistillationSettings,
    LossSettings,
    ReferenceSettings,
    changed,
)
from clipgraft.reductions import (
    RESIZE,
    TEXT_MASKS,
    TRUNCATE,
    ImageReduction,
    TextReduction,
)
from clipgraft.schedule import num_steps, num_warmup_steps, peak_lr
from clipgraft.sources import Fraction, Name, Settings

BelowOne = Annotated[float, Field(ge=0, lt=1)]
HueShift = Annotated[float, Field(ge=0, le=0.5)]
Tau = Annotated[float, Field(ge=0.005, le=1)]


class OptimSettings(Settings):
    """The optimizer, with linear warm-up and cosine decay."""

    name: Literal["adamw", "lamb", "lion", "sgd"] = Field(
        "adamw",
        description="Each wants a learning rate of its own: lion's is a few times smaller than adamw's, lamb's and "
        "sgd's are larger.",
    )
    lr: PositiveFloat | None = Field(
        None, description="Peak learning rate; either this or `lr_per_256`."
    )
    lr_per_256: PositiveFloat | None = Field(
        None, description="Peak learning rate for a batch of 256; grows with the batch (CLIPA)."
    )
    lr_min: NonNegativeFloat = 0.0
    warmup: Fraction | None = Field(
        None,
        description="Share of the steps with a rising learning rate; 0.05 unless a warm-up is given.",
    )
    warmup_steps: NonNegativeInt | None = Field(None, description="The same in steps.")
    warmup_samples: NonNegativeInt | None = Field(
        None, description="The same in samples; the last step of it is a whole one."
    )
    weight_decay: NonNegativeFloat = 0.2
    beta1: BelowOne = Field(0.9, description="Of adamw, lamb and lion.")
    beta2: BelowOne = Field(0.98, description="Of adamw, lamb and lion.")
    eps: PositiveFloat = Field(1e-6, description="Of adamw and lamb.")
    momentum: BelowOne = Field(0.9, description="Of sgd.")
    max_grad_norm: PositiveFloat | None = Field(None, description="Clip gradients to this norm.")

    @model_validator(mode="after")
    def _one_of_each(self) -> OptimSettings:
        rates = self._given("lr", "lr_per_256")
        warmups = self._given("warmup", "warmup_steps", "warmup_samples")
        removed = "Hint: an overlay removes a setting with null, e.g. `lr: null`"
        if len(rates) != 1:
            got = " and ".join(rates) or "neither"
            raise ValueError(f"give either `lr` or `lr_per_256`, got {got}. {removed}")
        if len(warmups) > 1:
            raise ValueError(f"give one warm-up, got {' and '.join(warmups)}. {removed}")
        return self

    @model_validator(mode="after")
    def _no_effect(self) -> OptimSettings:
        """What is changed must matter."""
        of_name = {
            "beta1": ("adamw", "lamb", "lion"),
            "beta2": ("adamw", "lamb", "lion"),
            "eps": ("adamw", "lamb"),
            "momentum": ("sgd",),
        }
        for key, names in of_name.items():
            if key in changed(self) and self.name not in names:
                raise ValueError(
                    f"{key} = {getattr(self, key)} has no effect on name: {self.name}. Hint: remove it (null in an "
                    f"overlay), or name: {names[0]}"
                )
        if self.name == "lamb" and not self.weight_decay:
            raise ValueError(
                "weight_decay = 0 with name: lamb: only what decays has a trust ratio, so this is Adam. "
                "Hint: name: adamw"
            )
        return self

    def _given(self, *names: str) -> list[str]:
        values = {name: getattr(self, name) for name in names}
        return [f"{name} = {value}" for name, value in values.items() if value is not None]


class AugmentationSettings(Settings):
    """How a visit of a sample changes its picture."""

    crop_scale: tuple[Fraction, Fraction] = Field(
        (0.9, 1.0), description="Random resized crop: range of the area kept. [1, 1] turns it off."
    )
    flip_prob: Fraction = Field(0.0, description="Mirror images left to right.")
    color_jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, HueShift] = Field(
        (0.0, 0.0, 0.0, 0.0), description="Range of brightness, contrast, saturation, hue."
    )
    color_jitter_prob: Fraction = Field(1.0, description="Share of images that are jittered.")
    gray_scale_prob: Fraction = Field(0.0, description="Share of images that lose their colours.")

    @model_validator(mode="after")
    def _crop(self) -> AugmentationSettings:
        low, high = self.crop_scale
        if not 0 < low <= high:
            raise ValueError(f"crop_scale = [{low}, {high}] must be above 0 and rising")
        return self


class TrainSettings(AugmentationSettings):
    """What every training stage has."""

    samples_seen: NonNegativeInt = Field(description="Training length; repeats of a sample count.")
    batch_size: Annotated[int, Field(ge=2)] = Field(description="Global: over all devices.")
    accumulate: PositiveInt = Field(
        1,
        description="Parts of a batch that go through the model one after the other: less memory, more time, the "
        "same result.",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="Of several processes: each has the whole model, or (fsdp) a share of weights, gradients and "
        "optimizer, for models that do not fit. The same result but for rounding; part of no version.",
    )
    grad_checkpointing: bool = Field(
        False,
        description="Keep no activations inside of blocks and compute them again: less memory, a third more time, the "
        "same result; part of no version.",
    )
    precision: Literal["bf16", "fp32"] | None = Field(
        None,
        description="What products are computed in (bf16: autocast; weights, sums and losses stay float32). Null, part "
        "of no version: bf16 where the hardware multiplies it.",
    )
    compile: bool = Field(
        False,
        description="Compile the blocks of both towers (torch.compile; needs a C++ compiler): minutes at the start. The "
        "same result but for rounding; part of no version. Padding of texts is computed then. Off by default: slower on "
        "CPUs, not measured on GPUs.",
    )
    cuda_graphs: bool = Field(
        False,
        description="Of compiled blocks: replay their kernels as CUDA graphs, for models whose kernels are short. Part "
        "of no version. Off by default: not measured on GPUs, no effect elsewhere.",
    )
    optim: OptimSettings
    captions: dict[Name, NonNegativeFloat] = Field(
        default_factory=dict,
        description="How often a visit draws each kind of caption, e.g. {caption: 1, recaption: 4}; "
        "empty: all captions of a sample alike.",
    )
    text_reduction: TextReduction = Field(
        TRUNCATE,
        description="Which tokens of a caption that is too long are kept (CLIPA): truncate, random, block, syntax or "
        "frequency, or a mapping of `kind` and options. Unless given, phases do what model.config asks for.",
    )
    source_weights: dict[Name, NonNegativeFloat] = Field(
        default_factory=dict,
        description="Visits per epoch of the samples of each source of a `mixed` data set; 1 unless given.",
    )
    shuffle_block: PositiveInt | None = Field(
        None,
        description="Shuffle blocks of so many neighbours, and within a few blocks, instead of all samples: "
        "reads a slow disk in order.",
    )
    watch: WatchSettings | None = Field(
        None,
        description="Look how the model does while it trains. Changes no weights, and but for `best` no version.",
    )

    @model_validator(mode="before")
    @classmethod
    def _text_masks(cls, raw: Any) -> Any:
        """Read the names that CLIPA and open_clip have for `text_reduction`."""
        if not isinstance(raw, Mapping):
            return raw
        given = [key for key in ("text_reduction", *TEXT_MASKS) if key in raw]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are the same setting. Hint: keep {given[0]}")
        return {"text_reduction" if key in given else key: value for key, value in raw.items()}

    @model_validator(mode="after")
    def _parts(self) -> TrainSettings:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size = {self.batch_size} does not divide into accumulate = {self.accumulate} parts"
            )
        return self

    @model_validator(mode="after")
    def _graphs(self) -> TrainSettings:
        if self.cuda_graphs and not self.compile:
            raise ValueError("cuda_graphs has no effect without compile: true")
        others = {
            f"accumulate = {self.accumulate}": self.accumulate > 1,
            "grad_checkpointing": self.grad_checkpointing,
            "parallel = fsdp": self.parallel == "fsdp",
        }
        for what, is_on in others.items():
            if self.cuda_graphs and is_on:
                raise ValueError(
                    f"cuda_graphs with {what}: a graph overwrites what it gave before, which is needed still, and wants "
                    "weights where they were. Hint: cuda_graphs: false"
                )
        return self

    @model_validator(mode="after")
    def _watch(self) -> TrainSettings:
        if self.watch is not None and not self.samples_seen:
            raise ValueError("watch has no effect: samples_seen = 0. Hint: watch: null")
        if self.watch is not None and self.watch.every < self.batch_size:
            raise ValueError(
                f"watch.every = {self.watch.every:,} is less than a batch: batch_size = {self.batch_size:,}, and nothing "
                "changes within one. Hint: hundreds of batches"
            )
        return self

    @model_validator(mode="after")
    def _warmup(self) -> TrainSettings:
        if num_warmup_steps(self) > num_steps(self):
            raise ValueError(
                f"optim: a warm-up of {num_warmup_steps(self):,} steps is longer than training: samples_seen = "
                f"{self.samples_seen:,} in batches of {self.batch_size:,} are {num_steps(self):,} steps. "
                "Hint: a shorter warm-up, or `warmup` as a share of the steps"
            )
        return self

    @model_validator(mode="after")
    def _decay(self) -> TrainSettings:
        peak, lr_min = peak_lr(self), self.optim.lr_min
        if lr_min > peak * (1 + 1e-9):  # equal but for rounding
            of = f" (lr_per_256 in batches of {self.batch_size:,})" if self.optim.lr_per_256 else ""
            raise ValueError(
                f"optim: lr_min = {lr_min:g} is above the peak learning rate, {peak:g}{of}: the decay would rise. "
                "Hint: a smaller lr_min"
            )
        return self


class PhaseSettings(TrainSettings):
    """One phase of pretraining. Position tables are carried over from the phase before."""

    name: Name
    image_size: PositiveInt
    text_length: Annotated[int, Field(ge=3)] = Field(
        description="Tokens, with start and end token."
    )
    image_reduction: ImageReduction = Field(
        RESIZE,
        description="Which patches are kept in training (CLIPA): resize (all), random, grid or block, or a mapping of "
        "`kind` and options.",
    )
    temperature: Tau = Field(
        0.07,
        description="Tau at the start of training from random weights, and of every phase in which it is constant or of each "
        "sample; a learned one comes with weights, where there are any.",
    )
    loss: LossSettings = LossSettings()
    references: list[ReferenceSettings] = Field(
        default_factory=list,
        description="Models to learn from; `reference: {...}` is one.",
    )
    distillation: DistillationSettings = DistillationSettings()
    lock: list[Literal["image", "text"]] = Field(
        default_factory=list, description="The tower that stays as the initial weights bring it."
    )
    init_from: Literal["reference"] | None = Field(
        None, description="First phase: start from the weights of the first reference."
    )
    pos_embed: Literal["learned", "sincos_frozen", "sincos_init"] | None = Field(
        None,
        description="Image positions: learned, sines and cosines that stay, or those as the start of learning; "
        "null: as the model's pos_embed_type says.",
    )
    sincos_form: Literal["mae", "moco"] = Field(
        "mae", description="Frequencies of sines and cosines: MAE's (open_clip) or MoCo v3's (JAX)."
    )
    pos_resize: Literal["interpolate", "recompute"] = Field(
        "interpolate",
        description="Image positions of the phase before, or of public weights: interpolated to the new grid "
        "(CLIPA v1), or computed afresh (v2; sines and cosines only).",
    )
    text_pos_resize: Literal["linear", "stretch", "pad", "none"] = Field(
        "linear",
        description="Text positions at another length: interpolated; stretched behind the first `text_pos_keep` "
        "(Long-CLIP); kept with what is missing drawn anew; or all drawn anew.",
    )
    text_pos_keep: NonNegativeInt = Field(20, description="Positions that `stretch` leaves alone.")

    @model_validator(mode="before")
    @classmethod
    def _one_reference(cls, raw: Any) -> Any:
        """Read `reference` as a list of one; null is not given."""
        if not isinstance(raw, Mapping):
            return raw
        one, several = raw.get("reference"), raw.get("references")
        others = {key: raw[key] for key in raw if key not in ("reference", "references")}
        if one is not None and several:
            raise ValueError(
                "reference and references are the same setting. Hint: an overlay removes one with null"
            )
        several = several if one is None else [one]
        return others if several is None else {**others, "references": several}

    @property
    def compares_with_references(self) -> bool:
        """Whether a step needs the references' features."""
        return self.loss.margins == "reference" or self.distillation.is_on

    @model_validator(mode="after")
    def _references(self) -> PhaseSettings:
        users = {
            "loss.margins: reference": self.loss.margins == "reference",
            "distillation": self.distillation.is_on,
            "init_from: reference": self.init_from is not None,
        }
        used = [name for name, is_used in users.items() if is_used]
        if used and not self.references:
            raise ValueError(
                f"{used[0]} needs a reference. Hint: reference: {{model: ViT-B-32, pretrained: openai}}"
            )
        if self.references and not used:
            raise ValueError(
                "references are given, but nothing uses them. Hint: distillation: {feature: 0.5}, loss.margins: "
                "reference or init_from: reference"
            )
        scaled = [each for each in self.references if each.scale is not None]
        if scaled and not self.distillation.affinity:
            raise ValueError(
                f"references: scale = {scaled[0].scale} has no effect without distillation.affinity"
            )
        if not self.loss.weight and not self.distillation.is_on:
            raise ValueError(
                "loss.weight = 0 without distillation: there is nothing to learn. Hint: distillation: {feature: 1.0}"
            )
        return self

    @model_validator(mode="after")
    def _locks(self) -> PhaseSettings:
        if len(self.lock) > 1:
            raise ValueError(
                f"lock = [{', '.join(self.lock)}]: nothing is left to train. Hint: lock one tower"
            )
        if self.loss.tau == "locked" and "temperature" in changed(self):
            raise ValueError(
                f"temperature = {self.temperature} has no effect on loss.temperature: locked. Hint: constant"
            )
        return self

    @model_validator(mode="after")
    def _stretch(self) -> PhaseSettings:
        if "text_pos_keep" in changed(self) and self.text_pos_resize != "stretch":
            raise ValueError(
                f"text_pos_keep = {self.text_pos_keep} has no effect on text_pos_resize: {self.text_pos_resize}. "
                "Hint: text_pos_resize: stretch"
            )
        return self
