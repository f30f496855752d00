"""Settings of experts: clustering, fine-tuning per pseudo label, the graft, and the training of routers.

Part of `settings`, in a file of its own like `recipes`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from clipgraft.loss_settings import changed
from clipgraft.recipes import TrainSettings
from clipgraft.sources import Fraction, Name, Settings

FIRST_SENTENCE = "first_sentence"

Blocks = Literal["all"] | list[NonNegativeInt]

BatchOrder = Literal["shuffled", "round_robin"]
ClusterBy = Literal["image_x_text", "image", "text", "joint"]
PerRound = PositiveInt | Annotated[list[PositiveInt], Field(min_length=1)]


class ClusterSettings(Settings):
    """Spherical k-means of image and text embeddings; the clusters of a sample are its label of a round."""

    by: ClusterBy = Field(
        "image_x_text",
        description="image_x_text: both apart, a label is a pair of clusters (CLIP-MoE); image (MCL) or text alone; "
        "joint: the unit vectors of both side by side.",
    )
    image_clusters: PerRound | None = Field(
        None, description="A number, or a list with one for each round; null: 3."
    )
    text_clusters: PerRound | None = Field(None, description="null: 3.")
    joint_clusters: PerRound | None = Field(None, description="null: 9.")
    num_iterations: PositiveInt = Field(50, description="Passes over the points, at most.")
    num_tries: PositiveInt = Field(3, description="Runs of k-means; the best inertia is kept.")
    min_size: PositiveInt = Field(
        1,
        description="Samples: smaller clusters are merged into the one with the nearest centroid. Empty ones always are.",
    )
    max_points: PositiveInt | None = Field(
        None,
        description="Find the centroids on so many random samples; null: on all. All samples are assigned.",
    )

    @property
    def given(self) -> dict[str, int | list[int]]:
        """Numbers of clusters of the sides that are clustered, in the order of the digits."""
        sides = ["image", "text"] if self.by == "image_x_text" else [self.by]
        default = {"image": 3, "text": 3, "joint": 9}
        return {side: getattr(self, f"{side}_clusters") or default[side] for side in sides}

    def of_round(self, number: int) -> dict[str, int]:
        """Numbers of clusters of a round, by setting; the first round is 1."""
        return {
            f"{side}_clusters": k[number - 1] if isinstance(k, list) else k
            for side, k in self.given.items()
        }

    @model_validator(mode="after")
    def _no_effect(self) -> ClusterSettings:
        for side in ("image", "text", "joint"):
            num = getattr(self, f"{side}_clusters")
            if num is not None and side not in self.given:
                raise ValueError(
                    f"{side}_clusters = {num} has no effect on by: {self.by}. Hint: an overlay removes a setting with "
                    f"null, `{side}_clusters: null`"
                )
        return self

    @model_validator(mode="after")
    def _numbers(self) -> ClusterSettings:
        for side, given in self.given.items():
            numbers = given if isinstance(given, list) else [given]
            if min(numbers) < 2:
                raise ValueError(
                    f"{side}_clusters = {given}: one cluster tells nothing apart. Hint: at least 2, or `by` without {side}"
                )
            if self.max_points is not None and self.max_points < max(numbers):
                raise ValueError(
                    f"max_points = {self.max_points} is less than {side}_clusters = {given}. "
                    "Hint: hundreds for each cluster, or null"
                )
        return self


class ShortCaptionSettings(Settings):
    """A second text of each sample, with a loss of its own (CLIP-MoE's option, after Long-CLIP)."""

    weight: PositiveFloat = Field(1.0, description="Of its loss, beside that of the drawn caption.")
    kind: Name = Field(
        "first_sentence",
        description="The kind that it is drawn from; first_sentence: how the drawn caption begins.",
    )


class MlpSettings(TrainSettings):
    """Fine-tuning of the MLPs alone, temperature fixed: of experts, and of what they are held against."""

    label_smoothing: Fraction = 0.1
    image_layers: Blocks = Field("all", description="Blocks whose MLPs are trained.")
    text_layers: Blocks = "all"
    lock: list[Literal["image", "text"]] = Field(
        default_factory=list,
        description="The tower that stays as it is, e.g. [text] for bad captions.",
    )
    short_captions: ShortCaptionSettings | None = Field(
        None, description="Learn from a short caption of each sample, too."
    )
    stop_ratio: PositiveFloat | None = Field(
        0.98,
        description="A round has nothing to learn if its loss within clusters ends above this share of that of guessing "
        "(the log of the number of candidates); null: go on all the same.",
    )

    @model_validator(mode="after")
    def _locked(self) -> MlpSettings:
        if len(set(self.lock)) > 1:
            raise ValueError("lock = [image, text]: nothing is left to train. Hint: lock one tower")
        for tower, layers in (("image", self.image_layers), ("text", self.text_layers)):
            if tower in self.lock and layers != "all":
                raise ValueError(
                    f"{tower}_layers = {layers} has no effect with lock: [{tower}]. Hint: remove one of them"
                )
            if not layers:
                raise ValueError(f"{tower}_layers = [] trains none of them. Hint: lock: [{tower}]")
        return self


class ExpertSettings(MlpSettings):
    """Fine-tuning on homogeneous batches (MCL)."""

    init: Literal["base", "previous"] = Field(
        "base", description="Each expert starts from expert 0, or from the expert before it."
    )
    batch_order: BatchOrder = Field(
        "shuffled",
        description="Homogeneous batches in random order, all samples used; round_robin: label by label as published, "
        "where what does not fill a batch is lost and large labels come last.",
    )

    @model_validator(mode="after")
    def _round_robin(self) -> ExpertSettings:
        """The published sampler shows each sample once at most, and shuffles all of a label."""
        for key in ("source_weights", "shuffle_block"):
            if self.batch_order == "round_robin" and getattr(self, key):
                raise ValueError(
                    f"{key} = {getattr(self, key)} does not go with batch_order: round_robin. Hint: batch_order: shuffled"
                )
        return self


class MoeSettings(Settings):
    """How experts are grafted into one model (Diversified Multiplet Upcycling)."""

    num_experts: Annotated[int, Field(ge=2)] = 4
    top_k: PositiveInt = Field(
        2, description="Experts per token. With 1 the gate is constant: routers learn balance only."
    )
    image_layers: Literal["all"] | list[NonNegativeInt] = Field(
        "all", description="Blocks with experts."
    )
    text_layers: Literal["all"] | list[NonNegativeInt] = "all"
    router_init: Literal["random", "zero", "centroids"] = Field(
        "random",
        description="random: uniform within 1 / sqrt(width), as published; zero: all experts tie, and every token takes "
        "the same until the first step; centroids: clusters of what comes into each MLP of the base.",
    )
    router_samples: PositiveInt = Field(
        4096, description="Of centroids: training samples whose tokens are clustered."
    )
    router_scale: PositiveFloat = Field(
        0.6,
        description="Of centroids: how far the logits of a token lie apart, as a standard deviation; with random it is "
        "about 0.6.",
    )

    @model_validator(mode="after")
    def _has_effect(self) -> MoeSettings:
        if self.image_layers == [] and self.text_layers == []:
            raise ValueError(
                "image_layers and text_layers are empty: no block has experts. Hint: `all` in one, or moe: null"
            )
        for key in sorted(changed(self) & {"router_samples", "router_scale"}):
            if self.router_init != "centroids":
                raise ValueError(
                    f"{key} = {getattr(self, key)} has no effect on router_init: {self.router_init}. "
                    "Hint: remove it, or router_init: centroids"
                )
        if self.router_init == "centroids" and self.router_samples < self.num_experts:
            raise ValueError(
                f"router_samples = {self.router_samples} is less than num_experts = {self.num_experts}: every expert has a "
                "cluster of their tokens. Hint: thousands"
            )
        return self

    @model_validator(mode="after")
    def _top_k(self) -> MoeSettings:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k = {self.top_k} is more than num_experts = {self.num_experts}. "
                f"Hint: top_k must lie between 1 and {self.num_experts}"
            )
        return self


class RouterSettings(TrainSettings):
    """Training of the routers, and of more if unlocked: contrastive plus balance loss."""

    train: Literal["routers", "experts", "all"] = Field(
        "routers",
        description="routers: nothing else, as published; experts: routers and experts, the trunk frozen; all: "
        "everything but the temperature.",
    )
    lr_experts: PositiveFloat | None = Field(
        None,
        description="Peak learning rate of what is unlocked beside the routers; null: that of the routers, optim.lr.",
    )
    balance: Literal["per_layer", "pooled"] = Field(
        "per_layer",
        description="per_layer: each layer shall use its experts evenly (1 if it does); pooled: all layers of a tower "
        "taken together, as published (top_k if even): layers that collapse apart go unseen.",
    )
    balance_weight: NonNegativeFloat = Field(0.01, description="Weight of the balance loss.")
    z_weight: NonNegativeFloat = Field(0.001, description="Weight of the router z-loss.")

    @model_validator(mode="after")
    def _has_effect(self) -> RouterSettings:
        if self.lr_experts is not None and self.train == "routers":
            raise ValueError(
                f"lr_experts = {self.lr_experts} has no effect on train: routers. "
                "Hint: remove it, or train: experts"
            )
        if self.balance == "pooled" and not self.balance_weight:
            raise ValueError(
                "balance = pooled has no effect with balance_weight = 0. Hint: remove it, or give a weight"
            )
        return self
