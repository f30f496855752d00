"""The settings of an architecture. Part of `settings`, in a file of its own like `sources`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from clipgraft.reductions import TEXT_MASKS, text_mask_of
from clipgraft.sources import Fraction, Settings
from clipgraft.spelling import hint

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

COUNTS = """
    vision_cfg.layers vision_cfg.width vision_cfg.head_width vision_cfg.patch_size embed_dim
    text_cfg.layers text_cfg.width text_cfg.heads
""".split()

_WEIGHTS = (".bin", ".ckpt", ".npz", ".pt", ".pth", ".safetensors")  # how checkpoints end


def is_file_name(pretrained: str) -> bool:
    """Whether public weights are named by a file on this machine, and not by a tag or as of a hub."""
    return ":" not in pretrained and ("/" in pretrained or pretrained.endswith(_WEIGHTS))


class PreprocessSettings(Settings):
    """How a model wants its images; what is not given is as for the weights it starts from, or OpenAI's CLIP."""

    mean: tuple[Fraction, Fraction, Fraction] | None = None
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None
    resize_mode: Literal["shortest", "squash"] | None = Field(
        None,
        description="shortest: resize the short side, take the middle; squash: resize to a square.",
    )


class ModelSettings(Settings):
    """An architecture of open_clip's transformers: by name, or spelled out as its own model config."""

    name: str | None = Field(
        None, description="One of presets/models, or an open_clip model name, e.g. ViT-B-16."
    )
    config: dict[str, Any] | None = Field(
        None, description="embed_dim, vision_cfg, text_cfg as in open_clip's model JSONs."
    )
    pretrained: str | None = Field(
        None, description="open_clip tag (needs `name`) or local checkpoint to start from."
    )
    preprocess: PreprocessSettings = PreprocessSettings()

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
        if "init_logit_scale" in config:
            raise ValueError(
                f"config.init_logit_scale = {config['init_logit_scale']} has no effect: training starts at the `temperature` "
                "of its phase, or at that of its weights. Hint: remove it, and temperature: exp(-init_logit_scale)"
            )
        known = {"": MODEL_KEYS, "vision_cfg": VISION_KEYS, "text_cfg": TEXT_KEYS}
        for section, keys in known.items():
            part = config.get(section, {}) if section else config
            where = f"config.{section}" if section else "config"
            if not isinstance(part, dict):
                raise ValueError(f"{where} must be a mapping, got {part!r}")
            for key in part:
                if key not in keys and not (section == "text_cfg" and key in TEXT_MASKS):
                    raise ValueError(f"unknown key `{key}` in model.{where}{hint(str(key), keys)}")
        text_mask_of(config)
        return self

    @model_validator(mode="after")
    def _numbers(self) -> ModelSettings:
        if self.config is None:
            return self
        for path in COUNTS:
            section, _, key = path.rpartition(".")
            number = (self.config[section] if section else self.config).get(key, 1)
            if path == "vision_cfg.layers" and isinstance(number, list):
                return self  # a ResNet, which is told elsewhere
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"config.{path} = {number!r} must be a whole number above 0")
        vision, text = self.config["vision_cfg"], self.config["text_cfg"]
        width, head_width = vision.get("width", 768), vision.get("head_width", 64)  # as open_clip
        if width < head_width or width % (width // head_width):
            raise ValueError(
                f"config.vision_cfg: width = {width} does not divide into heads of head_width = {head_width}. "
                f"Hint: width: {max(1, width // head_width) * head_width}"
            )
        width, heads = text.get("width", 512), text.get("heads", 8)
        if width % heads:
            raise ValueError(
                f"config.text_cfg: width = {width} does not divide by heads = {heads}. "
                f"Hint: width: {max(1, width // heads) * heads}"
            )
        return self
