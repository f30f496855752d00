"""Recipes: the settings of a model and of its training, which pretraining, experts and routers share.

Part of `settings`, in a file of its own like `sources`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from clipgraft.sources import Fraction, Name, Settings

BelowOne = Annotated[float, Field(ge=0, lt=1)]
HueShift = Annotated[float, Field(ge=0, le=0.5)]
Tau = Annotated[float, Field(ge=0.01, le=1)]


# Keys of open_clip's model configs (tests/test_config.py holds them against open_clip's own).
MODEL_KEYS = """
    cast_dtype custom_text embed_dim init_logit_bias init_logit_scale
    nonscalar_logit_scale output_dict quick_gelu text_cfg vision_cfg
""".split()
VISION_KEYS = """
    act_kwargs attentional_pool attn_pooler_heads attn_pooler_queries block_type
    final_ln_after_pool head_width image_size layers ls_init_value mlp_ratio no_ln_pre
    norm_kwargs output_tokens patch_dropout patch_size pool_type pos_embed_type qk_norm
    scale_attn scale_attn_inner scale_fc scale_heads scaled_cosine_attn timm_drop
    timm_drop_path timm_model_name timm_model_pretrained timm_pool timm_proj
    timm_proj_bias width
""".split()
TEXT_KEYS = """
    act_kwargs block_type context_length embed_cls eos_id final_ln_after_pool heads
    hf_model_name hf_model_pretrained hf_pooler_type hf_proj_type hf_tokenizer_name
    layers ls_init_value mlp_ratio no_causal_mask norm_kwargs output_tokens pad_id
    pool_type proj_bias proj_type qk_norm scale_attn scale_attn_inner scale_fc
    scale_heads scaled_cosine_attn tokenizer_kwargs tokenizer_mode vocab_size width
""".split()


class ModelSettings(Settings):
    """An open_clip architecture: by name, or spelled out as open_clip's own model config."""

    name: str | None = Field(None, description="An open_clip model name, e.g. ViT-B-16.")
    config: dict[str, Any] | None = Field(
        None, description="embed_dim, vision_cfg, text_cfg as in open_clip's model JSONs."
    )
    pretrained: str | None = Field(
        None, description="open_clip tag or local checkpoint to start from; needs `name`."
    )

    @model_validator(mode="after")
    def _one_of(self) -> ModelSettings:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either `name` or `config`, not both and not neither")
        config = self.config or {}
        missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
        if self.config is not None and missing:
            raise ValueError(
                f"config lacks {', '.join(missing)}. Hint: it has the form of open_clip's model JSONs"
            )
        known = {"": MODEL_KEYS, "vision_cfg": VISION_KEYS, "text_cfg": TEXT_KEYS}
        for section, keys in known.items():
            part = config.get(section, {}) if section else config
            where = f"config.{section}" if section else "config"
            if not isinstance(part, dict):
                raise ValueError(f"{where} must be a mapping, got {part!r}")
            for key in part:
                if key not in keys:
                    raise ValueError(f"unknown key `{key}` in model.{where}{hint(str(key), keys)}")
        return self


class OptimSettings(Settings):
    """AdamW with linear warm-up and cosine decay."""

    lr: PositiveFloat = Field(description="Peak learning rate.")
    lr_min: NonNegativeFloat = 0.0
    warmup: Fraction = Field(0.05, description="Share of the steps with a rising learning rate.")
    weight_decay: NonNegativeFloat = 0.2
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.98
    eps: PositiveFloat = 1e-6
    max_grad_norm: PositiveFloat | None = Field(None, description="Clip gradients to this norm.")


class TrainSettings(Settings):
    """What every training stage has."""

    samples_seen: NonNegativeInt = Field(description="Training length; repeats of a sample count.")
    batch_size: Annotated[int, Field(ge=2)] = Field(description="Global: over all devices.")
    optim: OptimSettings
    crop_scale: tuple[Fraction, Fraction] = Field(
        (0.9, 1.0), description="Random resized crop: range of the area kept. [1, 1] turns it off."
    )
    flip_prob: Fraction = Field(0.0, description="Mirror images left to right.")
    color_jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, HueShift] = Field(
        (0.0, 0.0, 0.0, 0.0), description="Range of brightness, contrast, saturation, hue."
    )
    color_jitter_prob: Fraction = Field(1.0, description="Share of images that are jittered.")
    gray_scale_prob: Fraction = Field(0.0, description="Share of images that lose their colours.")
    captions: dict[Name, NonNegativeFloat] = Field(
        default_factory=dict,
        description="How often a visit draws each kind of caption, e.g. {caption: 1, recaption: 4}; "
        "empty: all captions of a sample alike.",
    )
    text_reduction: Literal["truncate", "random", "block", "syntax"] = Field(
        "truncate", description="Which tokens of a caption that is too long are kept (CLIPA)."
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

    @model_validator(mode="after")
    def _crop(self) -> TrainSettings:
        low, high = self.crop_scale
        if not 0 < low <= high:
            raise ValueError(f"crop_scale = [{low}, {high}] must be above 0 and rising")
        return self


class PhaseSettings(TrainSettings):
    """One phase of pretraining. Position tables are interpolated from the phase before."""

    name: Name
    image_size: PositiveInt
    text_length: Annotated[int, Field(ge=3)] = Field(
        description="Tokens, with start and end token."
    )
    temperature: Tau = Field(0.07, description="Initial tau of the first phase.")


def hint(word: str, known: Iterable[str]) -> str:
    """What a misspelt word may have meant, or what there is."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (
        f"; did you mean `{close[0]}`?"
        if close
        else (f". Known: {', '.join(known)}" if known else "")
    )
