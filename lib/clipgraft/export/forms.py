"""What a form of another program can hold of a model.

Each form lists the keys of open_clip's model config that it can express; every other key must be as in open_clip's
defaults. So a key that nobody thought of is an error, never a model that loads and is another one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from clipgraft.config import ConfigError
from clipgraft.lean import open_clip
from clipgraft.models.weights import first_of

ANY = None
_SIZES = dict.fromkeys(("layers", "width", "mlp_ratio"), ANY)
VISION_SIZES = _SIZES | dict.fromkeys(("head_width", "patch_size", "image_size"), ANY)
TEXT_SIZES = _SIZES | dict.fromkeys(("heads", "context_length", "vocab_size"), ANY)
# What only says how to train or how to read texts, or has no effect alone, and changes no features.
_FREE = dict.fromkeys(
    ("pos_embed_type", "patch_dropout", "output_tokens", "pad_id", "tokenizer_kwargs",
     "tokenizer_mode", "hf_tokenizer_name", "hf_model_pretrained", "timm_model_pretrained"), ANY
)  # fmt: skip

Values = Mapping[str, tuple[Any, ...] | None]


class Form(NamedTuple):
    """What a form can hold.

    Attributes:
        name: for messages.
        vision: keys of `vision_cfg` and the values that they may have beside open_clip's default; None: any.
        text: the same of `text_cfg`.
        logit_bias: whether it has one.
        hint: what to do about a model that it cannot hold.
    """

    name: str
    vision: Values
    text: Values
    logit_bias: bool
    hint: str


def spelled_out(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`vision_cfg` and `text_cfg` of a model config, with open_clip's defaults."""
    return (
        dataclasses.asdict(open_clip.CLIPVisionCfg(**config["vision_cfg"])),
        dataclasses.asdict(open_clip.CLIPTextCfg(**config["text_cfg"])),
    )


def check_form(config: Mapping[str, Any], form: Form) -> None:
    """Make sure that a form can hold a model.

    Raises:
        ConfigError: names what it cannot.
    """
    defaults = spelled_out({"vision_cfg": {}, "text_cfg": {}})
    parts = zip(
        ("vision_cfg", "text_cfg"),
        spelled_out(config),
        defaults,
        (form.vision, form.text),
        strict=True,
    )
    wrong = [
        f"{part}.{key} = {value!r}"
        for part, ours, usual, allowed in parts
        for key, value in ours.items()
        if value != usual[key] and not _may_be(value, (_FREE | dict(allowed)).get(key, ()))
    ]
    if config.get("init_logit_bias") is not None and not form.logit_bias:
        wrong.append("a logit bias")
    if wrong:
        raise ConfigError(f"{form.name} cannot hold {first_of(wrong)}. Hint: {form.hint}")


def _may_be(value: Any, allowed: tuple[Any, ...] | None) -> bool:
    return allowed is ANY or value in allowed
