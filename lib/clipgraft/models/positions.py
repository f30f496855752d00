"""Position tables: what they are made of, and how they go from one phase to the next.

A table always stands among the weights, with open_clip's name and a row for the class token, which open_clip's image
tower always has; a frozen one only wants no gradient. So a model opens in open_clip whatever its tables were made of.
CLIPA v1 trains with a frozen sin-cos table, then learns from the interpolated one; v2 computes a fresh one per size,
which keeps the distance of neighbours where interpolation keeps that of the edges.
"""

# Shapes: L positions (of images with that of the class token), G side of the grid of patches, D width, F frequencies (D / 4)

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clipgraft.config import ConfigError
from clipgraft.lean import open_clip
from clipgraft.misfits import position_kind, position_misfit, stretch_misfit
from clipgraft.recipes import PhaseSettings

log = logging.getLogger(__name__)

IMAGE, TEXT = "visual.positional_embedding", "text.positional_embedding"
_TEXT_STD = 0.01  # of open_clip's fresh text tables


class TextResize(NamedTuple):
    """How a text table gets to another length.

    Attributes:
        kind: `linear`, `stretch`, `pad` or `none`, as `text_pos_resize` of a phase.
        keep: rows that `stretch` leaves as they are.
    """

    kind: str = "linear"
    keep: int = 20


LINEAR = TextResize()


def sincos_table(width: int, grid: int, form: str) -> Tensor:
    """Sines and cosines of the place of each patch; zeros for the class token.

    A row is sin(x w), cos(x w), sin(y w), cos(y w) for x, y = 0 .. G - 1 and frequencies w from 1 down to 1/10000:
    MAE stops one short of the latter, MoCo v3 reaches it.

    Args:
        width: D.
        grid: G.
        form: `mae` (open_clip's `sin_cos_2d`) or `moco` (CLIPA's JAX code).

    Returns:
        float32 [1 + G * G, D].

    Raises:
        ConfigError: if the width cannot be cut into four parts.
    """
    num = width // 4
    if width % 4 or num < 2:
        raise ConfigError(
            f"pos_embed: a sin-cos table needs a width that is a multiple of 4 and at least 8, vision_cfg.width is "
            f"{width}. Hint: pos_embed: learned"
        )
    exponent_F = np.arange(num) / (num if form == "mae" else num - 1)
    angle_GF = np.arange(grid)[:, None] * (1 / 10000**exponent_F)
    axis_GH = np.concatenate([np.sin(angle_GF), np.cos(angle_GF)], axis=1)
    x_LH, y_LH = np.tile(axis_GH, (grid, 1)), np.repeat(axis_GH, grid, axis=0)
    table_LD = np.concatenate([x_LH, y_LH], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, width)), table_LD])).float()


def stretched_table(before_LD: Tensor, length: int, keep: int) -> Tensor:
    """Long-CLIP's stretching: the first rows stay, the others are spread evenly over the rest of the new table.

    Row p >= keep is the old table at place keep + (p - keep) (L - keep) / (length - keep), between two rows in a
    straight line, and behind the last row as the last two go on. Long-CLIP (arXiv:2403.15378) does it from 77 to 248
    with 20 kept, where the places are quarters. To a shorter length the same rule is its inverse.

    Args:
        before_LD: the table.
        length: rows that are wanted.
        keep: rows that stay.

    Raises:
        ConfigError: if no row is left to stretch.
    """
    num = len(before_LD)
    misfit = stretch_misfit(keep, num)
    if misfit:
        raise ConfigError(misfit)
    if length <= keep:
        return before_LD[:length]
    place_L = keep + torch.arange(length - keep, dtype=torch.float64) * (num - keep) / (
        length - keep
    )
    left_L = place_L.long().clamp(max=num - 2)
    share_L1 = (place_L - left_L)[:, None]
    wide_LD = before_LD.double()
    tail_LD = (1 - share_L1) * wide_LD[left_L] + share_L1 * wide_LD[left_L + 1]
    return torch.cat([before_LD[:keep], tail_LD.to(before_LD)])


def resize_positions(state: dict[str, Tensor], model: nn.Module, text: TextResize = LINEAR) -> None:
    """Fit the position tables in `state` to the lengths of `model`, in place.

    open_clip's own functions: image, bicubic with antialias over the grid, class token kept; text, linear.

    Args:
        state: weights.
        model: has the lengths that are wanted.
        text: `linear`; `stretch`: as `stretched_table`; `pad`: rows stay as they are, what is missing is drawn anew;
            `none`: a table of another length is drawn anew. Drawn from torch's global generator.

    Raises:
        ConfigError: if no row is left to stretch.
    """
    open_clip.model.resize_pos_embed(state, model)
    before_LD, num = state[TEXT], len(model.text.positional_embedding)
    if text.kind == "linear" or len(before_LD) == num:
        open_clip.model.resize_text_pos_embed(state, model)
        return
    if text.kind == "stretch":
        state[TEXT] = stretched_table(before_LD, num, text.keep)
        return
    kept_LD = before_LD[: num if text.kind == "pad" else 0]
    fresh_LD = torch.randn(num - len(kept_LD), before_LD.shape[1]) * _TEXT_STD
    state[TEXT] = torch.cat([kept_LD, fresh_LD.to(kept_LD)])


def start_positions(
    model: nn.Module, config: dict[str, Any], settings: PhaseSettings, *, is_carried: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the image positions of a model those that its phase starts with, in place.

    Args:
        model: its tables are fresh, or already resized to the phase.
        config: of the model so far; its `pos_embed_type` counts where `settings.pos_embed` is null.
        settings: the phase.
        is_carried: whether the table comes with weights, rather than being fresh.

    Returns:
        The config of the model from now on, so that open_clip reads it as it is, and what was done, for `model.json`.

    Raises:
        ConfigError: if a learned table shall be frozen or recomputed.
    """
    was_frozen = config["vision_cfg"].get("pos_embed_type", "learnable") == "sin_cos_2d"
    misfit = position_misfit(settings, was_frozen, is_carried)
    if misfit:
        raise ConfigError(misfit)
    kind = position_kind(settings, was_frozen)
    is_frozen, recompute = kind == "sincos_frozen", settings.pos_resize == "recompute"
    table_LD = model.visual.positional_embedding
    is_computed = kind != "learned" and (recompute or not is_carried)
    if is_computed:
        width, grid = table_LD.shape[1], model.visual.grid_size[0]
        table_LD.data.copy_(sincos_table(width, grid, settings.sincos_form))
    table_LD.requires_grad_(not is_frozen)
    done = {
        "pos_embed": kind,
        "image": settings.pos_resize if is_carried else "fresh",
        "sincos_form": settings.sincos_form if is_computed else None,
        "text": settings.text_pos_resize if is_carried else "fresh",
    }
    log.info("positions %s, image %s, text %s", kind, done["image"], done["text"])
    if settings.pos_embed is not None:
        kind_there = "sin_cos_2d" if is_frozen else "learnable"
        vision = {**config["vision_cfg"], "pos_embed_type": kind_there}
        config = {**config, "vision_cfg": vision}
    return config, done
