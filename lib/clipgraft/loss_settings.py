"""Settings of what a phase learns from: the loss over pairs, reference models, distillation.

Part of `recipes`, in a file of its own.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from clipgraft.sources import Settings

Rate = Annotated[float, Field(gt=0, le=1)]


def changed(settings: Settings) -> set[str]:
    """Names of the settings that are not at their default; a job is handed all, so what was given cannot be known."""
    fields = type(settings).model_fields
    return {name for name in fields if getattr(settings, name) != fields[name].default}


class GammaSettings(Settings):
    """Inner rate: how far a visit moves the remembered u of a sample towards what its batch says."""

    schedule: Literal["constant", "cosine", "cosine_steps", "scent"] = Field(
        "cosine",
        description="cosine: from 1 to `min`, epoch by epoch (FastCLIP); cosine_steps: step by step; "
        "constant: `min` after the first epoch; scent: of each sample, sigmoid(log(eps + u) + offset).",
    )
    min: Rate = 0.2
    decay: PositiveFloat | None = Field(
        None, description="Epochs until `min` is reached; by default those of the phase."
    )
    offset: float = Field(10.0, description="Of scent.")

    @model_validator(mode="after")
    def _no_effect(self) -> GammaSettings:
        """What is changed must matter."""
        is_cosine = self.schedule.startswith("cosine")
        matters = {
            "min": self.schedule != "scent",
            "decay": is_cosine,
            "offset": self.schedule == "scent",
        }
        for name, does in matters.items():
            if name in changed(self) and not does:
                raise ValueError(f"gamma.{name} has no effect on schedule: {self.schedule}")
        return self


class LossSettings(Settings):
    """The loss over pairs: minibatch contrastive, sigmoid, or global contrastive (FastCLIP)."""

    kind: Literal["contrastive", "siglip", "gcl", "rgcl", "rgcl_g"] = Field(
        "contrastive",
        description="gcl: FastCLIP v0 (temperature learned) and v1 (constant); rgcl: v2; rgcl_g: v3.",
    )
    weight: NonNegativeFloat = Field(
        1.0, description="Of this loss, beside those of `distillation`."
    )
    rho: NonNegativeFloat = Field(8.0, description="Of rgcl and rgcl_g, in nats.")
    eps: PositiveFloat = Field(1e-14, description="Added to u.")
    margins: Literal["plain", "reference"] = Field(
        "plain",
        description="reference: similarities in excess of the mean of those of the references (DRRho).",
    )
    gamma: GammaSettings = GammaSettings()
    temperature: Literal["constant", "locked", "learned", "per_sample"] | None = Field(
        None,
        description="constant: as the phase says; locked: as the initial weights bring it. By default learned, but "
        "constant for gcl and per_sample for rgcl, which needs that.",
    )
    tau_bounds: tuple[PositiveFloat, PositiveFloat] = (0.01, 1.0)
    lr_tau: PositiveFloat | None = Field(
        None, description="Learning rate of the temperature; by default that of the model."
    )
    lr_tau_schedule: Literal["cosine", "const", "step_thresh"] = Field(
        "cosine",
        description="cosine: as the model's, with warm-up; step_thresh: constant, times `lr_tau_factor` while tau is "
        "at most `lr_tau_threshold`.",
    )
    lr_tau_threshold: PositiveFloat = 0.03
    lr_tau_factor: Rate = 1 / 3
    tau_grad: Literal["exact", "fastclip"] = Field(
        "exact",
        description="fastclip: the pairs count twice, as in the published code; its values of rho need that.",
    )

    @property
    def is_global(self) -> bool:
        """Whether it remembers u."""
        return self.kind in ("gcl", "rgcl", "rgcl_g")

    @property
    def tau(self) -> str:
        """How the temperature is found: as set, or what the kind of loss is published with."""
        return self.temperature or {"gcl": "constant", "rgcl": "per_sample"}.get(
            self.kind, "learned"
        )

    @model_validator(mode="after")
    def _no_effect(self) -> LossSettings:
        """What is changed must matter."""
        of_kind = {
            "rho": ("rgcl", "rgcl_g"),
            "eps": ("gcl", "rgcl", "rgcl_g"),
            "gamma": ("gcl", "rgcl", "rgcl_g"),
            "margins": ("gcl", "rgcl", "rgcl_g"),
            "tau_grad": ("gcl", "rgcl_g"),
        }
        for name, kinds in of_kind.items():
            if name in changed(self) and self.kind not in kinds:
                raise ValueError(
                    f"{name} has no effect on kind: {self.kind}. Hint: remove it (null in an overlay), or kind: {kinds[-1]}"
                )
        if (self.tau == "per_sample") != (self.kind == "rgcl"):
            raise ValueError(
                f"temperature: {self.tau} with kind: {self.kind}: per_sample is for rgcl, and rgcl needs it"
            )
        stepped = {"lr_tau_threshold", "lr_tau_factor"}
        fixed = {"lr_tau", "lr_tau_schedule", "tau_bounds", "tau_grad", *stepped}
        useless = sorted(fixed & changed(self))
        if self.tau in ("constant", "locked") and useless:
            raise ValueError(f"{useless[0]} has no effect: the temperature is {self.tau}")
        useless = sorted(stepped & changed(self))
        if self.lr_tau_schedule != "step_thresh" and useless:
            raise ValueError(
                f"{useless[0]} has no effect on lr_tau_schedule: {self.lr_tau_schedule}. Hint: remove it (null in an "
                "overlay), or lr_tau_schedule: step_thresh"
            )
        return self

    @model_validator(mode="after")
    def _tau(self) -> LossSettings:
        low, high = self.tau_bounds
        if low > high:
            raise ValueError(f"tau_bounds = [{low}, {high}] must not fall")
        if self.kind == "rgcl" and self.lr_tau is None:
            raise ValueError(
                "rgcl needs lr_tau, of the temperatures' own Adam. Hint: lr_tau: 0.0133"
            )
        if self.kind == "rgcl" and self.lr_tau_schedule != "const":
            raise ValueError("rgcl has a constant lr_tau. Hint: lr_tau_schedule: const")
        if self.lr_tau is None and "lr_tau_schedule" in changed(self):
            raise ValueError("lr_tau_schedule needs lr_tau")
        return self


class ReferenceSettings(Settings):
    """A trained model that a phase learns from: its weights stay as they are."""

    model: str = Field(
        description="An open_clip architecture, e.g. ViT-B-32; or, where `pretrained` is null, a model folder of ours."
    )
    pretrained: str | None = Field(
        None, description="open_clip tag, or a checkpoint on this machine."
    )
    image_size: PositiveInt | None = Field(
        None, description="Crops are resized to it; by default the reference's own."
    )
    scale: PositiveFloat | None = Field(
        None, description="1 / tau of its softmax (affinity); by default its own."
    )
    cached: bool = Field(
        False, description="Read embeddings that were computed before instead of running the model."
    )
    crops: PositiveInt = Field(
        1,
        description="Of cached: stored crops of an image. One: as in evaluation, and training crops as it likes; several: "
        "drawn and augmented as the phase says, and training shows these.",
    )

    @property
    def name(self) -> str:
        """For people."""
        return "/".join(filter(None, (self.model, self.pretrained)))

    @model_validator(mode="after")
    def _no_effect(self) -> ReferenceSettings:
        """What is changed must matter."""
        if "crops" in changed(self) and not self.cached:
            raise ValueError("crops has no effect without cached: true")
        return self


class DistillationSettings(Settings):
    """Weights of what is learned from references, beside `loss.weight`; 0 is off. Several references: their mean."""

    feature: NonNegativeFloat = Field(
        0.0,
        description="Squared distance from a reference's features, images plus texts; where dimensions differ, of a "
        "learned linear projection.",
    )
    affinity: NonNegativeFloat = Field(
        0.0,
        description="Cross-entropy of the softmax over the batch, from the mean of the references' softmaxes.",
    )
    affinity_form: Literal["cross_entropy", "kl"] = Field(
        "cross_entropy", description="kl: less the references' entropy; the same gradient."
    )
    interactive: NonNegativeFloat = Field(
        0.0,
        description="Contrastive loss of each side with a reference's other side; needs equal dimensions.",
    )

    @property
    def is_on(self) -> bool:
        """Whether any term has a weight."""
        return bool(self.feature or self.affinity or self.interactive)

    @model_validator(mode="after")
    def _no_effect(self) -> DistillationSettings:
        """What is changed must matter."""
        if "affinity_form" in changed(self) and not self.affinity:
            raise ValueError(f"affinity_form = {self.affinity_form} has no effect: affinity = 0")
        return self
