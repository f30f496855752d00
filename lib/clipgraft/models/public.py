"""Public models as they are: any architecture of open_clip with two towers, to look at and not to train.

Towers of timm and ResNets are welcome here, for no expert is grafted into them. Sizes and lengths are those that the
weights were trained with, whatever the architecture of that name says; so is the activation, where a tag says which.
Image towers that are given another size get there by their own library's resampling of the position table.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clipgraft.config import ConfigError
from clipgraft.lean import open_clip
from clipgraft.misfits import reads_our_tokens
from clipgraft.model_settings import ModelSettings
from clipgraft.models.build import (
    adopt_activation,
    architecture_of,
    build,
    describe,
    forget_text_masks,
)
from clipgraft.models.positions import IMAGE, TEXT, resize_positions
from clipgraft.models.weights import (
    KERNEL,
    fit_state,
    pretrained_file,
    pretrained_tag,
    read_state,
)

log = logging.getLogger(__name__)

Encode = Callable[[Sequence[str]], Tensor]
_BERT = "google-bert/bert-base-uncased"


def load_public(
    name: str, pretrained: str, image_size: int | None = None
) -> tuple[nn.Module, dict[str, Any], Path | Encode]:
    """A public model, what `model.json` would say of it, and its tokenizer.

    Args:
        name: of an architecture, open_clip's or of `presets/models`.
        pretrained: open_clip tag, or a checkpoint on this machine.
        image_size: another side of the image than its own.

    Returns:
        The model on the CPU, its spec, and the file of its tokenizer; where no file of the kinds we read describes it,
        open_clip's tokenizer, which turns texts into int64 [B, L].

    Raises:
        ConfigError: if there is no such model, if it does not fit its weights, or if a package is missing.
    """
    settings = ModelSettings(name=name, pretrained=pretrained)
    config = _config(settings)
    tokenizer = _tokenizer(config["text_cfg"])
    path = pretrained_file(settings)
    state = read_state(path, "pretrained")
    _adopt_sizes(config, state)
    model = build(config)
    model.load_state_dict(fit_state(state, model, str(path)))
    if image_size is not None and image_size != config["vision_cfg"]["image_size"]:
        model = _resized(model, config, image_size)
    log.info("%s with weights from %s", name, path)
    return model, describe(config, settings), tokenizer


def _config(settings: ModelSettings) -> dict[str, Any]:
    config = architecture_of(settings)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if text.get("hf_model_name") or config.get("multimodal_cfg"):
        what = "a Hugging Face text tower" if text.get("hf_model_name") else "a captioner (CoCa)"
        raise ConfigError(
            f"{settings.name} has {what}, which is not supported. Hint: any other architecture of open_clip, "
            "timm image towers and SigLIP's included"
        )
    if pretrained_tag(settings):
        adopt_activation(settings, config, pretrained_tag(settings))
    if vision.get("timm_model_name"):
        vision["timm_model_pretrained"] = False  # its weights are in the checkpoint
    forget_text_masks(text)
    text.setdefault("context_length", open_clip.CLIPTextCfg.context_length)
    text.setdefault("vocab_size", open_clip.CLIPTextCfg.vocab_size)
    vision.setdefault("image_size", open_clip.CLIPVisionCfg.image_size)
    return config | {"custom_text": True, "quick_gelu": bool(config.get("quick_gelu", False))}


def _tokenizer(text: Mapping[str, Any]) -> Path | Encode:
    """Found first, because without texts a reference is of no use, and weights are large."""
    name = text.get("hf_tokenizer_name")
    if not name:
        return Path(open_clip.tokenizer.default_bpe())
    is_bert = reads_our_tokens(text)
    if not is_bert and importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            f"its texts are read by the Hugging Face tokenizer {name}, which needs the package `transformers`, and that "
            "is not installed. Hint: pip install transformers, or a model that reads CLIP's byte pairs"
        )
    try:
        return _bert_pieces() if is_bert else _hugging_face(text)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"its tokenizer {name} cannot be had: {str(error)[:200]}. Hint: on a machine without network, fill the "
            "cache of the Hugging Face hub beforehand"
        ) from None


def _bert_pieces() -> Path:
    return Path(open_clip.pretrained.download_pretrained_from_hf(_BERT, "vocab.txt"))


def _hugging_face(text: Mapping[str, Any]) -> Encode:
    return open_clip.tokenizer.HFTokenizer(
        text["hf_tokenizer_name"],
        context_length=text["context_length"],
        tokenizer_mode=text.get("tokenizer_mode"),
        **(text.get("tokenizer_kwargs") or {}),
    )


def _adopt_sizes(config: dict[str, Any], state: Mapping[str, Tensor]) -> None:
    """Set the image size and the text length that the weights were trained with, in place."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    has = {"image_size": vision["image_size"], "context_length": text["context_length"]}
    if TEXT in state:
        text["context_length"] = len(state[TEXT])
    if IMAGE in state and KERNEL in state:
        grid = math.isqrt(len(state[IMAGE]) - 1)
        vision["image_size"] = grid * state[KERNEL].shape[-1]
    now = {"image_size": vision["image_size"], "context_length": text["context_length"]}
    if now != has:
        log.info("its weights were trained with %s, not with %s", now, has)


def _resized(model: nn.Module, config: dict[str, Any], image_size: int) -> nn.Module:
    vision = config["vision_cfg"]
    if isinstance(vision.get("layers"), list | tuple):
        raise ConfigError(
            f"image_size = {image_size}: a ResNet reads images of {vision['image_size']} pixels alone. Hint: null"
        )
    vision["image_size"] = image_size
    if vision.get("timm_model_name"):
        try:
            model.visual.set_input_size(image_size)
        except (AssertionError, ValueError, TypeError) as error:
            raise ConfigError(f"image_size = {image_size}: timm cannot: {error}") from None
        return model
    state = model.state_dict()
    model = build(config)
    resize_positions(state, model)
    model.load_state_dict(state)
    return model
