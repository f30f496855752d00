"""CLIP-MoE's checkpoints, in and out: their names and shapes, on our models.

They are OpenAI's names, with `mlp.experts.I.c_fc`, `mlp.experts.I.c_proj` and `mlp.gate.weight` in the blocks that have
experts, the last of each tower, and dense MLPs in those before. Their texts have two position tables, as Long-CLIP's:
rows before 20 are taken from one, the others from the other; ours is one table with the same rows (`read_state`). What
else such a model is follows from its shapes, as in OpenAI's own reader: QuickGELU, heads of 64. How many experts a
token goes to does not: the released ones use two. Their dropout in experts is for training and left out.
"""

# Shapes: L positions, D width, E experts

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.config import ConfigError
from clipgraft.lean import open_clip
from clipgraft.models.build import build, describe
from clipgraft.models.moe import insert_experts
from clipgraft.models.positions import IMAGE, TEXT
from clipgraft.models.weights import (
    KERNEL,
    OPENAIS,
    SECOND_TABLE,
    check_fit,
    first_of,
    read_state,
)

_HEAD = 64  # width of an attention head in all of OpenAI's transformers
_TENSORS = ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias")
_BLOCK = re.compile(r"(visual|text)\.transformer\.resblocks\.(\d+)\.")
_THEIRS = re.compile(
    r"(?P<mlp>(?P<tower>visual|text)\.transformer\.resblocks\.(?P<number>\d+)\.mlp)\."
    r"(?:experts\.(?P<expert>\d+)\.(?P<tensor>c_(?:fc|proj)\.(?:weight|bias))|gate\.weight)"
)
_OURS = re.compile(r"(?P<mlp>.+\.mlp)\.(?P<part>c_fc|c_proj)_(?P<kind>weight|bias)")
# What only says how to train or to read texts, and changes no features.
_FREE = {"pos_embed_type", "patch_dropout", "tokenizer_kwargs", "tokenizer_mode"}


def read_released(path: Path, top_k: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    """A model from a checkpoint of CLIP-MoE; also from a dense one of its making, of Long-CLIP or of OpenAI.

    Args:
        path: a state dict, saved with torch.save or as safetensors.
        top_k: experts per token, which no checkpoint says; not used of a dense one.

    Returns:
        The model on the CPU, and what `model.json` says of it.

    Raises:
        ConfigError: if the file cannot be read, or holds no such weights.
    """
    where = str(path)
    state = {
        name: tensor
        for name, tensor in read_state(path, "released").items()
        if name not in OPENAIS and name not in ("mask1", "mask2")  # of their two tables
    }
    config = _config(state, where)
    state, moe = stack_experts(state, top_k, where)
    model = build(config)
    if moe is not None:
        insert_experts(model, **moe)
    check_fit(state, model, where)
    model.load_state_dict(state)
    return model, {**describe(config), "kind": "moe" if moe else "dense", "moe": moe}


def released_state(model: nn.Module, spec: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a model as CLIP-MoE would save them.

    Args:
        model: dense, or with experts in the last blocks of each tower.
        spec: what `model.json` says of it.

    Returns:
        OpenAI's names to tensors on the CPU; both position tables of texts are the model's one.

    Raises:
        ConfigError: if their code could not hold this model, or would take it for another.
    """
    weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    _check_form(weights, spec)
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        ours = _OURS.fullmatch(name)
        if ours is not None:
            for e, part in enumerate(tensor.unbind()):
                state[f"{ours['mlp']}.experts.{e}.{ours['part']}.{ours['kind']}"] = part.clone()
        else:
            state[re.sub(r"\.mlp\.router$", ".mlp.gate.weight", name)] = tensor
    state[f"{TEXT}{SECOND_TABLE}"] = state[TEXT].clone()
    return {name.removeprefix("text."): tensor for name, tensor in state.items()}


def stack_experts(
    state: Mapping[str, Tensor], top_k: int, where: str
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Weights with the experts of a layer as one tensor, and the `moe` entry of their `model.json`.

    Args:
        state: names as in `CustomTextCLIP`, but those of experts.
        top_k: experts per token.
        where: the file, for the message.

    Raises:
        ConfigError: if an expert is not whole, or layers have different numbers of them.
    """
    stacked: dict[str, Tensor] = {}
    found: dict[Any, Any] = {}
    for name, tensor in state.items():
        match = _THEIRS.fullmatch(name)
        if match is None:
            stacked[name] = tensor
        else:
            layer = found.setdefault(match["mlp"], {})
            layer[(match["tensor"] or "gate", int(match["expert"] or 0))] = tensor
    if not found:
        return stacked, None
    num_experts = 1 + max(expert for layer in found.values() for _, expert in layer)
    for mlp, layer in found.items():
        _check_whole(layer, num_experts, f"{where}: {mlp}")
        stacked[f"{mlp}.router"] = layer[("gate", 0)]
        for tensor_name in _TENSORS:
            parts = [layer[(tensor_name, e)] for e in range(num_experts)]
            stacked[f"{mlp}.{tensor_name.replace('.', '_')}"] = torch.stack(parts)
    moe = {"num_experts": num_experts, "top_k": top_k}
    return stacked, moe | {
        f"{'image' if tower == 'visual' else 'text'}_layers": sorted(
            int(mlp.split(".")[3]) for mlp in found if mlp.startswith(tower)
        )
        for tower in ("visual", "text")
    }


def _check_whole(layer: Mapping[tuple[str, int], Tensor], num_experts: int, where: str) -> None:
    wanted = [(name, e) for name in _TENSORS for e in range(num_experts)]
    missing = [
        f"expert {e} lacks {name}" for name, e in sorted(wanted, key=lambda x: x[1])
        if (name, e) not in layer
    ]  # fmt: skip
    missing += [] if ("gate", 0) in layer else ["gate.weight is missing"]
    if missing:
        raise ConfigError(
            f"{where}: of {num_experts} experts, {first_of(missing)}. Hint: a whole checkpoint of CLIP-MoE"
        )


def _config(state: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """What the shapes say, as OpenAI's reader takes them."""
    needed = (KERNEL, IMAGE, TEXT, "text.token_embedding.weight", "text.text_projection")
    missing = [f"{name} is missing" for name in needed if name not in state]
    if missing:
        raise ConfigError(
            f"{where} holds no vision transformer of OpenAI's form: {first_of(missing)}. Hint: a checkpoint of CLIP-MoE, "
            "Long-CLIP or OpenAI"
        )
    patch, width = state[KERNEL].shape[-1], len(state[KERNEL])
    vocab_size, text_width = state["text.token_embedding.weight"].shape
    vision = {
        "image_size": math.isqrt(len(state[IMAGE]) - 1) * patch,
        "patch_size": patch,
        "width": width,
        "head_width": _HEAD,
        "layers": _num_blocks(state, "visual"),
    }
    text = {
        "context_length": len(state[TEXT]),
        "vocab_size": vocab_size,
        "width": text_width,
        "heads": text_width // _HEAD,
        "layers": _num_blocks(state, "text"),
    }
    sizes = {"embed_dim": state["text.text_projection"].shape[1], "quick_gelu": True}
    return {**sizes, "custom_text": True, "vision_cfg": vision, "text_cfg": text}


def _num_blocks(state: Mapping[str, Tensor], tower: str) -> int:
    matches = (_BLOCK.match(name) for name in state)
    return len({match[2] for match in matches if match is not None and match[1] == tower})


def _check_form(weights: Mapping[str, Tensor], spec: Mapping[str, Any]) -> None:
    """What a reader concludes from the shapes must be what the model is."""
    config, moe = spec["config"], spec["moe"]
    theirs = _config(weights, "the model")
    wrong = [] if config["quick_gelu"] else ["quick_gelu is false, theirs is true"]
    if "logit_bias" in weights:
        wrong.append("init_logit_bias is set, theirs have no bias")
    if weights["logit_scale"].ndim:
        wrong.append("nonscalar_logit_scale is true, theirs is false")
    forms = {"vision_cfg": open_clip.CLIPVisionCfg, "text_cfg": open_clip.CLIPTextCfg}
    for tower, form in forms.items():
        ours, other = (dataclasses.asdict(form(**one[tower])) for one in (config, theirs))
        wrong += [
            f"{tower}.{key} is {ours[key]}, theirs is {other[key]}"
            for key in ours
            if ours[key] != other[key] and key not in _FREE
        ]
    if moe is not None:
        num = len(moe["image_layers"])
        wrong += _not_last(moe, "image_layers", theirs["vision_cfg"]["layers"], num)
        wrong += _not_last(moe, "text_layers", theirs["text_cfg"]["layers"], num)
    if wrong:
        raise ConfigError(
            f"CLIP-MoE's form cannot hold this model: {first_of(wrong)}. Hint: OpenAI's architectures, with experts in "
            "the last blocks, as many in both towers where there are as many"
        )


def _not_last(moe: Mapping[str, Any], key: str, depth: int, num: int) -> list[str]:
    """Their one number of layers with experts counts from the end, in both towers."""
    last = list(range(depth - min(num, depth), depth))
    return [] if moe[key] == last else [f"moe.{key} is {moe[key]}, theirs would be {last}"]
