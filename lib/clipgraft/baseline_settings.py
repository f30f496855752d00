"""Settings of baselines: what the mixture of experts has to beat at equal cost, one entry each.

Part of `settings`, in a file of its own like `recipes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from clipgraft.loss_settings import changed
from clipgraft.recipes import OptimSettings
from clipgraft.sources import Settings
from clipgraft.spelling import hint

Kind = Literal["mlp", "full", "copies", "two_experts", "soup", "ensemble"]
KINDS: tuple[str, ...] = get_args(Kind)
_TRAINED = ("mlp", "full", "copies", "two_experts")
_USED_BY = {
    "samples_seen": _TRAINED,
    "optim": _TRAINED,
    "noise": ("copies",),
    "lr_experts": ("copies",),
}


class BaselineSettings(Settings):
    """A model made of the same base with the same samples, but in a simpler way; what is not set is as for experts."""

    kind: Kind | None = Field(
        None,
        description="mlp: the base, its MLPs fine-tuned on ordinary batches; full: likewise, all weights but the "
        "temperature; copies: a MoE of copies of the base, routers and experts trained, or all where finetune_router "
        "trains all (sparse upcycling); two_experts: a MoE of the base and of one model as of `mlp`, trained as "
        "finetune_router says; soup: one model with the mean of all experts' weights; ensemble: the embeddings of all "
        "experts side by side. null: the name of the baseline.",
    )
    samples_seen: PositiveInt | None = Field(
        None,
        description="In all its training after the base; null: as many as all experts and the routers see together.",
    )
    optim: OptimSettings | None = Field(
        None, description="null: that of finetune_expert; of copies, that of finetune_router."
    )
    noise: NonNegativeFloat = Field(
        0.0,
        description="Of copies: normal noise on all but the first, in standard deviations of each tensor.",
    )
    lr_experts: PositiveFloat | None = Field(
        None,
        description="Of copies: peak learning rate of the experts; null: that of finetune_router, or else of "
        "finetune_expert.",
    )

    @model_validator(mode="after")
    def _has_effect(self) -> BaselineSettings:
        for name in sorted(changed(self) - {"kind"}):
            if self.kind not in _USED_BY[name]:
                raise ValueError(
                    f"{name} has no effect on kind: {self.kind}. Hint: it is for {', '.join(_USED_BY[name])}"
                )
        return self


def with_kinds(raw: Any) -> Any:
    """Baselines as given, each with its kind; those that an overlay has set to null are left out.

    Raises:
        ValueError: if a name is no kind, and none is given.
    """
    if not isinstance(raw, Mapping):
        return raw
    named = {}
    for name, about in raw.items():
        if isinstance(about, Mapping) and about.get("kind") is None:
            if name not in KINDS:
                raise ValueError(
                    f"baselines.{name}: its name is no kind, and `kind` is not given{hint(str(name), KINDS)}"
                )
            about = {**about, "kind": name}
        if about is not None:
            named[name] = about
    return named
