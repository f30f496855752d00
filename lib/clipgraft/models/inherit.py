"""Inheritance: a model that starts as another one, at another patch size.

The student sees an image as the reference sees it resampled by areas: a patch is constant within each of its pixels,
and a pixel of the other size is the mean of what it covers. That is linear, so it can be moved into the patch kernel
without loss: w' = U^T w U, with U the matrix of the resampling along one side. From 32 to 16 pixels, where U repeats
each pixel, the kernel is summed over 2 x 2; from 16 to 32 it is spread, a quarter each. The position table goes to the
finer or coarser grid by bicubic interpolation with antialias, its class token kept, as when images change their size.
All else is taken over as it is, with what shapes do not tell: the activation, and the temperature. So the student is
the reference on resampled images, exactly, at the same grid of patches (shown in tests/models/test_inherit.py).
"""

# Shapes: O pixels along a side of the reference's patch, P of the student's, D width, C channels

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clipgraft.config import ConfigError
from clipgraft.lean import open_clip
from clipgraft.models.build import build
from clipgraft.models.positions import IMAGE, LINEAR, TEXT, TextResize, resize_positions
from clipgraft.models.weights import KERNEL, adopt_scalars, first_of, misfits

log = logging.getLogger(__name__)

# What may differ: sizes, which are resampled, and what only says how to train or to read texts.
_FREE = {
    "vision_cfg": {"image_size", "patch_size", "patch_dropout", "output_tokens", "act_kwargs"},
    "text_cfg": {
        "context_length",
        "vocab_size",
        "output_tokens",
        "act_kwargs",
        "hf_tokenizer_name",
        "tokenizer_kwargs",
        "tokenizer_mode",
    },
}


class Described(Protocol):
    """A model and its description, as `load_reference` or `load_model` returns them."""

    @property
    def model(self) -> nn.Module:
        """Its weights are copied."""

    @property
    def spec(self) -> dict[str, Any]:
        """`config`, `preprocess` and `moe` are read."""


def inherit(
    config: dict[str, Any], reference: Described, text_positions: TextResize = LINEAR
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """The weights of a student that starts as a reference.

    Args:
        config: of the student, from `model_config`; its activation is replaced by the reference's.
        reference: of any patch size, at its own image size: what was interpolated once is not interpolated again.
        text_positions: how the table gets to another text length (`resize_positions`).

    Returns:
        The state for `build` of the returned config, that config, and what was done, for `model.json`. The latter has
        the reference's `mean`, `std`, `interpolation` and `resize_mode` as `preprocess`: its weights want such images.

    Raises:
        ConfigError: names the tensors and settings that cannot be carried over.
    """
    theirs = reference.spec["config"]
    config = _with_activation(config, theirs)
    state = {
        name: part.detach().cpu().clone() for name, part in reference.model.state_dict().items()
    }
    with torch.device("meta"):
        model = build(config)
    done = _sizes(state)
    if KERNEL in state:
        state[KERNEL] = resample_kernel(state[KERNEL], model.visual.patch_size)
    adopt_scalars(state, model, config.get("init_logit_bias"))
    wrong = [part for part in (_differences(config, theirs), misfits(state, model)) if part]
    if wrong:
        raise ConfigError(
            f"init_from: reference: it cannot be carried over: {'; '.join(map(first_of, wrong))}. Hint: patch size, "
            "image size and text length may differ, nothing else; and `index: {vocabulary: full}` for public weights"
        )
    resize_positions(state, model, text_positions)
    done = {name: [before, _sizes(state)[name]] for name, before in done.items()}
    done["activation"] = "QuickGELU" if config["quick_gelu"] else "GELU"
    done["tau"] = round(float((-state["logit_scale"].double()).exp()), 6)
    log.info(
        "starts as the reference: %s", ", ".join(f"{name} {what}" for name, what in done.items())
    )
    preprocess = {key: what for key, what in reference.spec["preprocess"].items() if key != "size"}
    return state, config, done | {"preprocess": preprocess}


def resample_kernel(kernel_DCOO: Tensor, sides: tuple[int, int]) -> Tensor:
    """The kernel that answers to a patch as the given one does to the patch resampled by areas.

    Args:
        kernel_DCOO: of the reference, of any sides.
        sides: height and width in pixels that are wanted.

    Returns:
        [D, C, height, width]; the answer to a constant patch is the same.
    """
    rows_OP, columns_OP = (
        area_matrix(new, old) for new, old in zip(sides, kernel_DCOO.shape[2:], strict=True)
    )
    resampled = torch.einsum("dchw,hp,wq->dcpq", kernel_DCOO.double(), rows_OP, columns_OP)
    return resampled.to(kernel_DCOO.dtype)


def area_matrix(num_from: int, num_to: int) -> Tensor:
    """Resampling of a line of pixels by areas: each new pixel is the mean of what it covers.

    Returns:
        float64 [num_to, num_from]; rows add up to 1.
    """
    edge_to, edge_from = (
        torch.arange(num + 1, dtype=torch.float64) / num for num in (num_to, num_from)
    )
    until = torch.minimum(edge_to[1:, None], edge_from[None, 1:])
    since = torch.maximum(edge_to[:-1, None], edge_from[None, :-1])
    return (until - since).clamp(min=0) * num_to


def _with_activation(config: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(config) | {"quick_gelu": bool(theirs.get("quick_gelu", False))}
    for tower in ("vision_cfg", "text_cfg"):
        config[tower].pop("act_kwargs", None)
        if theirs[tower].get("act_kwargs") is not None:
            config[tower]["act_kwargs"] = theirs[tower]["act_kwargs"]
    return config


def _differences(config: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Settings of the towers that differ, in words; some, like the number of heads, do not show in any shape."""
    forms = {"vision_cfg": open_clip.CLIPVisionCfg, "text_cfg": open_clip.CLIPTextCfg}
    differences = []
    for tower, form in forms.items():
        ours, others = (dataclasses.asdict(form(**part[tower])) for part in (config, theirs))
        is_timm = others.get("timm_model_name") is not None  # by which timm knows the other keys
        differences += [
            f"{tower}.{key} is {others[key]}, the model has {ours[key]}"
            for key in (["timm_model_name"] if is_timm else ours)
            if ours[key] != others[key] and key not in _FREE[tower]
        ]
    return differences


def _sizes(state: dict[str, Tensor]) -> dict[str, Any]:
    """What may be resampled, as far as the image tower is open_clip's own."""
    lengths = {"image_positions": IMAGE, "text_positions": TEXT}
    sizes = {name: len(state[key]) for name, key in lengths.items() if key in state}
    return sizes | ({"patch": list(state[KERNEL].shape[2:])} if KERNEL in state else {})
