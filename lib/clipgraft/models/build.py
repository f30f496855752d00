"""open_clip models: their config and their weights.

Three decisions shape it. Models are always open_clip's `CustomTextCLIP`, made to take texts of any length up to
their context, with open_clip's parameter names, so that dense models open in open_clip unchanged. A config is a plain
dict in open_clip's form, complete (sizes and activation spelled out), so it can be stored beside the weights. And
whether a model uses QuickGELU is decided by the weights, not by the name it is called by: OpenAI's weights under
the name `ViT-B-32` would otherwise run with another activation than they were trained with, without a word.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clipgraft.architectures import architecture
from clipgraft.config import ConfigError
from clipgraft.lean import open_clip, with_timm
from clipgraft.misfits import tower_misfit
from clipgraft.model_settings import ModelSettings
from clipgraft.models.positions import LINEAR, TextResize, resize_positions
from clipgraft.models.weights import (
    fit_state,
    pretrained_file,
    pretrained_tag,
    read_state,
    wanted_preprocess,
)
from clipgraft.reductions import TEXT_MASKS

log = logging.getLogger(__name__)

_MLP = re.compile(r"(visual|text)\.transformer\.resblocks\.(\d+)\.mlp\.")
_TRIM_TO = (
    8  # tokens; libraries keep a kernel, and compiled graphs a copy, for every length they meet
)

Layers = Literal["all"] | Sequence[int]


def model_config(
    settings: ModelSettings, vocab_size: int, image_size: int, text_length: int
) -> dict[str, Any]:
    """A complete open_clip model config.

    Args:
        settings: architecture by name, or spelled out.
        vocab_size: ids of the tokenizer (`token_rows`).
        image_size: side of the image in pixels.
        text_length: tokens, with start and end token.

    Returns:
        `embed_dim`, `vision_cfg`, `text_cfg`, `quick_gelu` and what else the architecture sets.

    Raises:
        ConfigError: if there is no such architecture, or if open_clip could not build it.
    """
    config = architecture_of(settings)
    check_towers(config)
    tag = pretrained_tag(settings)
    if tag:
        _check_vocabulary(settings, config, vocab_size)
        adopt_activation(settings, config, tag)
    rows = token_rows(config["text_cfg"], vocab_size)
    config["custom_text"] = True  # so that open_clip, too, reads the parameter names we write
    config["quick_gelu"] = bool(config.get("quick_gelu", False))
    config["text_cfg"]["vocab_size"] = rows
    if config["text_cfg"].get("pool_type") == "eos" and not config["text_cfg"].get(
        "hf_tokenizer_name"
    ):
        config["text_cfg"]["eos_id"] = rows - 1  # the last one of byte pairs
    forget_text_masks(config["text_cfg"])
    return _with_sizes(config, image_size, text_length)


def token_rows(text_cfg: Mapping[str, Any], vocab_size: int) -> int:
    """Rows of the token table.

    The tokenizer decides, whatever the architecture says; those that read WordPiece keep the spare rows they have.

    Raises:
        ConfigError: if those have too few.
    """
    if not text_cfg.get("hf_tokenizer_name"):
        return vocab_size
    rows = int(text_cfg.get("vocab_size", vocab_size))
    if rows < vocab_size:
        raise ConfigError(
            f"model: text_cfg.vocab_size = {rows:,}, but the vocabulary of the data has {vocab_size:,} pieces. "
            "Hint: leave it out, or give the `index.wordpiece` that the model was made for"
        )
    return rows


def describe(config: dict[str, Any], settings: ModelSettings | None = None) -> dict[str, Any]:
    """What `model.json` says of a dense model: `config`, `preprocess` and the like.

    Args:
        config: as `model_config` returns it.
        settings: say how images are prepared, or else the weights that they name do
            (`wanted_preprocess`); without both they are prepared as for OpenAI's CLIP.
    """
    preprocess = {
        "size": config["vision_cfg"]["image_size"],
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    if settings:
        preprocess |= wanted_preprocess(settings)
        preprocess |= settings.preprocess.model_dump(exclude_none=True)
    preprocess |= {key: list(preprocess[key]) for key in ("mean", "std")}
    return {
        "format": 1,
        "kind": "dense",
        "config": config,
        "preprocess": preprocess,
        "moe": None,
        "base": None,
        "samples_seen": 0,
    }


def build(
    config: dict[str, Any],
    image_size: int | None = None,
    text_length: int | None = None,
    temperature: float | None = None,
) -> open_clip.CustomTextCLIP:
    """A model with random weights, drawn from torch's global generator (seeded by the caller).

    Args:
        config: as `model_config` returns it.
        image_size: another side of the image than the config's.
        text_length: another text length than the config's.
        temperature: initial tau; `logit_scale` = log(1 / tau).

    Raises:
        ConfigError: with open_clip's words, if it cannot build the model.
    """
    config = _with_sizes(config, image_size, text_length)
    config.pop("custom_text", None)
    if config["vision_cfg"].get("timm_model_name"):
        with_timm()
    if temperature is not None:
        config["init_logit_scale"] = math.log(1 / temperature)
    try:
        model = open_clip.CustomTextCLIP(**config)
    except (TypeError, ValueError, AssertionError, ZeroDivisionError, RuntimeError) as error:
        raise ConfigError(
            f"model: open_clip cannot build it: {type(error).__name__}: {error}. Hint: width must be "
            "a multiple of the heads (vision: width / head_width heads, head_width 64 unless set)"
        ) from None
    model.text.transformer.register_forward_pre_hook(_cut_mask, with_kwargs=True)
    return model


def pretrained_state(
    settings: ModelSettings, config: dict[str, Any], text_positions: TextResize = LINEAR
) -> dict[str, Tensor]:
    """The weights of `settings.pretrained`, made to fit the model that `config` describes.

    Args:
        settings: `pretrained` is an open_clip tag (downloaded) or a checkpoint on this machine.
        config: from `model_config` of the same settings; position tables are resized to its lengths.
        text_positions: how (`resize_positions`).

    Raises:
        ConfigError: if there are no such weights, or if they are of another architecture.
    """
    path = pretrained_file(settings)
    state = read_state(path, "model.pretrained")
    with torch.device("meta"):
        model = build(config)
    state = fit_state(state, model, f"model.pretrained: {path}", config.get("init_logit_bias"))
    resize_positions(state, model, text_positions)
    log.info("pretrained weights from %s", path)
    return state


def normalize(images_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes of images as float32 model input, on the device that the bytes are on."""
    where = images_BCHW.device, torch.get_default_dtype()
    # Whole planes: decoded pictures have their channels last, which takes this three times as long, and the stem too.
    images_BCHW = images_BCHW.to(where[1], memory_format=torch.contiguous_format)
    return (images_BCHW - _of_channels(tuple(mean), *where)).div_(_of_channels(tuple(std), *where))


@cache
def _of_channels(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """In units of a byte; copied to a device once, so that no step waits for it."""
    with torch.inference_mode(False):  # what is kept may meet gradients later
        return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1) * 255


def mlp_parameters(
    model: nn.Module, image_layers: Layers = "all", text_layers: Layers = "all"
) -> dict[str, nn.Parameter]:
    """The parameters of the MLPs of chosen blocks of both towers, by name.

    Args:
        model: dense.
        image_layers: blocks of the image tower.
        text_layers: blocks of the text tower.

    Raises:
        ConfigError: if a tower has no such block.
    """
    wanted = {
        tower: layer_numbers(layers, len(getattr(model, tower).transformer.resblocks), tower)
        for tower, layers in (("visual", image_layers), ("text", text_layers))
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if (part := _MLP.match(name)) and int(part[2]) in wanted[part[1]]
    }


def layer_numbers(layers: Layers, num_layers: int, tower: str) -> list[int]:
    """Blocks of a tower that are meant, in order.

    Raises:
        ConfigError: if the tower has no such block.
    """
    if layers == "all":
        return list(range(num_layers))
    numbers = sorted(set(layers))
    if any(not 0 <= number < num_layers for number in numbers):
        side = "image" if tower == "visual" else tower
        raise ConfigError(
            f"{side}_layers = {numbers}: the {side} tower has {num_layers} blocks. Hint: 0 to {num_layers - 1}, or all"
        )
    return numbers


def trimmed(model: nn.Module, text_BL: Tensor) -> Tensor:
    """Texts without the columns that hold nothing but padding, where that changes no feature.

    It does not where attention is causal and features are those of the end token, the highest id. Elsewhere, as in
    SigLIP's and CLIPA-v2's towers, padding is seen, and texts are returned as they are. Columns are counted on the
    device of the texts: call it before they go to a GPU, or the GPU is waited for.

    Args:
        model: has the text tower.
        text_BL: token ids, padded at the end.

    Returns:
        As many columns as the longest text has tokens, rounded up to a multiple of 8.
    """
    if not is_padding_unseen(model.text) or not len(text_BL):
        return text_BL
    longest = int(text_BL.argmax(1).max()) + 1
    return text_BL[:, : -(-longest // _TRIM_TO) * _TRIM_TO]


def is_padding_unseen(text: Any) -> bool:
    """Whether no feature of a text tower depends on what follows the end token."""
    return text.attn_mask is not None and text.pool_type == "argmax" and text.cls_emb is None


def architecture_of(settings: ModelSettings) -> dict[str, Any]:
    """The model config of `settings`, as its author wrote it.

    Raises:
        ConfigError: if there is no such architecture.
    """
    if settings.name is not None and ":" in settings.name:  # hf-hub: or local-dir:
        return dict(open_clip.get_model_config(settings.name))
    return architecture(settings)


def adopt_activation(settings: ModelSettings, config: dict[str, Any], tag: dict[str, Any]) -> None:
    """Set QuickGELU as the weights of a tag were trained with, in place."""
    trained_with = bool(tag.get("quick_gelu", False))
    if trained_with != bool(config.get("quick_gelu", False)):
        log.info(
            "%s/%s was trained with %s, unlike the architecture of that name: using it",
            settings.name,
            settings.pretrained,
            "QuickGELU" if trained_with else "GELU",
        )
    config["quick_gelu"] = trained_with


def forget_text_masks(text: dict[str, Any]) -> None:
    """A text reduction is a setting of training: in open_clip it would reduce the prompts of evaluation, too."""
    for part in (text, text.get("tokenizer_kwargs") or {}):
        for key in TEXT_MASKS:
            part.pop(key, None)


def _cut_mask(
    _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let texts be shorter than the context: open_clip 3.3 cuts the positions, but not the mask."""
    length, mask = arguments[0].shape[1], named.get("attn_mask")
    if isinstance(mask, Tensor):
        named = {**named, "attn_mask": mask[..., :length, :length]}
    return arguments, named


def check_towers(config: dict[str, Any]) -> None:
    """Refuse towers and tokenizers that are not open_clip's own.

    Raises:
        ConfigError: names them.
    """
    if misfit := tower_misfit(config):
        raise ConfigError(f"model: {misfit}")


def _with_sizes(
    config: dict[str, Any], image_size: int | None, text_length: int | None
) -> dict[str, Any]:
    config = copy.deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    vision["image_size"] = image_size or vision["image_size"]
    text["context_length"] = text_length or text["context_length"]
    patch = _patch_size(vision)
    side = vision["image_size"]
    if isinstance(side, int) and isinstance(patch, int) and side % patch:
        lower = side // patch * patch
        raise ConfigError(
            f"image_size = {side} is not divisible by the patch size {patch} of the model. "
            f"Hint: {lower or patch} or {lower + patch}"
        )
    return config


def _patch_size(vision: Mapping[str, Any]) -> Any:
    """What the side of an image must be a multiple of."""
    if vision.get("timm_model_name"):
        return 1  # as timm says, when it builds it
    if isinstance(vision.get("layers"), list | tuple):
        return 32  # a ResNet
    return vision.get("patch_size", open_clip.CLIPVisionCfg.patch_size)


def _check_vocabulary(settings: ModelSettings, config: dict[str, Any], vocab_size: int) -> None:
    rows = config["text_cfg"].get("vocab_size", open_clip.CLIPTextCfg.vocab_size)
    if rows != token_rows(config["text_cfg"], vocab_size):
        raise ConfigError(
            f"model.pretrained = {settings.pretrained!r}: its token table has {rows:,} rows, the "
            f"vocabulary of the data has {vocab_size:,}. Hint: `index: {{vocabulary: full}}`"
        )
