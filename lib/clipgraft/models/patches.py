"""Patches: in training, an image tower that sees a part of each image (CLIPA, arXiv 2305.07017; FLIP, 2212.00794).

Patches are chosen before they are projected, so what is dropped costs nothing, and then get the rows of the position
table that are theirs. Which ones is a function of the sample's random word alone, in whole numbers: the same on any
device and for any number of processes. Shapes never change and nothing waits for the host. A tower keeps its
parameters and their names; only its class is another. Evaluation sees everything, unless it is about that.
"""

# Shapes: B batch, C channels, H and W pixels, N patches of the grid, K patches kept, P = C * pixels of a patch, D width

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.config import ConfigError
from clipgraft.lean import open_clip
from clipgraft.reductions import (
    RESIZE,
    BlockPatches,
    GridPatches,
    ImageReduction,
    RandomPatches,
    Resize,
    block_sides,
    num_kept,
)

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # splitmix64 in signed numbers, which wrap alike
_COLUMN_BITS = 16


class WholeVisionTransformer(open_clip.transformer.VisionTransformer):
    """open_clip's image tower, whose stem is a product of all patches with the weights instead of a convolution."""

    def _embeds(self, x: Tensor) -> Tensor:
        """Takes the place of open_clip's; the same but for rounding."""
        return _embed(self, split_patches(x, self.grid_size), self.positional_embedding[1:])


class PartialVisionTransformer(open_clip.transformer.VisionTransformer):
    """open_clip's image tower, which in training sees the patches that `image_bits_B` draws.

    Attributes:
        image_reduction: which patches stay.
        image_bits_B: a random word per image of the next batch, int64, on its device.
        drops_in_evaluation: whether it does so in evaluation, too.
    """

    image_reduction: ImageReduction
    image_bits_B: Tensor | None
    drops_in_evaluation: bool = False

    def _embeds(self, x: Tensor) -> Tensor:
        """The stem on some of the patches; takes the place of open_clip's, which is the stem on all."""
        if not (self.training or self.drops_in_evaluation):
            return super()._embeds(x)
        assert self.image_bits_B is not None and len(self.image_bits_B) == len(x), (
            "dropping needs a random word for each image of the batch"
        )
        index_BK = choose_patches(self.image_bits_B, self.image_reduction, self.grid_size)
        # From the float32 table, cast afterwards: a row's gradient is a sum over the batch, too long for bf16.
        row_BKD = F.embedding(index_BK, self.positional_embedding[1:])
        return _embed(self, gather_patches(x, index_BK, self.grid_size), row_BKD)


def drop_patches(model: nn.Module, reduction: ImageReduction) -> None:
    """Let the image tower of a model see a part of each image in training, in place.

    Args:
        model: with one of open_clip's own image towers; experts may be in it already, or come later.
        reduction: which part; with `resize` the model stays as it is.

    Raises:
        ConfigError: if windows of 2 x 2 do not fill the grid.
    """
    if isinstance(reduction, Resize):
        return
    tower = model.visual
    assert type(tower) in (open_clip.transformer.VisionTransformer, PartialVisionTransformer), type(
        tower
    )
    try:
        num_kept(reduction, *tower.grid_size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    tower.__class__ = PartialVisionTransformer
    tower.image_reduction, tower.image_bits_B = reduction, None


def num_patches(model: nn.Module) -> tuple[int, int]:
    """Patches of an image that a model sees in training, and all of them; the class token left out."""
    tower = model.visual
    rows, columns = tower.grid_size
    is_partial = isinstance(tower, PartialVisionTransformer)
    kept = num_kept(tower.image_reduction if is_partial else RESIZE, rows, columns)
    if isinstance(
        tower.patch_dropout, open_clip.transformer.PatchDropout
    ):  # open_clip's own, a key of the model config
        kept = max(1, int(kept * (1 - tower.patch_dropout.prob)))
    return kept, rows * columns


def choose_patches(bits_B: Tensor, reduction: ImageReduction, grid: tuple[int, int]) -> Tensor:
    """Numbers of the patches that stay, in rising order.

    Args:
        bits_B: a random word per image, int64 (all 64 bits count).
        reduction: which patches stay.
        grid: rows and columns of patches.

    Returns:
        int64 [B, K].
    """
    rows, columns = grid
    number_N = torch.arange(rows * columns, device=bits_B.device)
    if isinstance(reduction, RandomPatches):
        # 40 bits of noise, below them the patch: no two keys are equal, so every sort agrees.
        noise_BN = _shift_right(draw_words(bits_B, rows * columns), 64 - 40)
        key_BN = noise_BN << _COLUMN_BITS | number_N
        kept_BK = key_BN.sort(1).values[:, : num_kept(reduction, rows, columns)]
        return (kept_BK & (1 << _COLUMN_BITS) - 1).sort(1).values
    if isinstance(reduction, GridPatches):
        corner_K = number_N.view(rows, columns)[::2, ::2].flatten()
        if reduction.cell == "fixed":
            return corner_K.expand(len(bits_B), -1)
        cell_BK = _shift_right(draw_words(bits_B, len(corner_K)), 62)
        return (corner_K + (cell_BK >> 1) * columns + (cell_BK & 1)).sort(1).values
    if isinstance(reduction, BlockPatches):
        height, width = block_sides(reduction, rows, columns)
        block_K = number_N.view(rows, columns)[:height, :width].flatten()
        word_2B = draw_words(bits_B, 2).unbind(1)
        top_B = _below(word_2B[0], rows - height + 1)
        left_B = _below(word_2B[1], columns - width + 1)
        return block_K + (top_B * columns + left_B)[:, None]
    return number_N.expand(len(bits_B), -1)


def _embed(tower: Any, patch_BKP: Tensor, row_KD: Tensor) -> Tensor:
    """The tokens of patches with these rows of the position table, behind the class token."""
    x_BKD = F.linear(patch_BKP, tower.conv1.weight.flatten(1))
    x_BKD = x_BKD + row_KD.to(x_BKD.dtype)
    cls_D = tower.class_embedding.to(x_BKD.dtype) + tower.positional_embedding[0].to(x_BKD.dtype)
    x_BLD = torch.cat([cls_D.expand(len(x_BKD), 1, -1), x_BKD], dim=1)
    return tower.ln_pre(tower.patch_dropout(x_BLD))


def split_patches(images_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """The pixels of all patches, in the order in which `conv1` has its weights.

    Returns:
        [B, N, P].
    """
    rows, columns = grid
    split = images_BCHW.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # B C rows h columns w
    return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def gather_patches(images_BCHW: Tensor, index_BK: Tensor, grid: tuple[int, int]) -> Tensor:
    """The pixels of some patches, in the order in which `conv1` has its weights.

    Returns:
        [B, K, P].
    """
    rows, columns = grid
    split = images_BCHW.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # B C rows h columns w
    image_B1 = torch.arange(len(split), device=split.device)[:, None]
    return split[image_B1, :, index_BK // columns, :, index_BK % columns].flatten(2)


def draw_words(bits_B: Tensor, count: int) -> Tensor:
    """Random words [B, count] from one per sample: those of `draw_bits(0, bits_B, 0, count)` in `data/draws.py`."""
    key_B = _mix(_mix(_FIRST_KEY ^ bits_B * _GOLDEN))
    counter = torch.arange(1, count + 1, device=bits_B.device) * _GOLDEN
    return _mix(key_B[:, None] + counter)


def _below(word_B: Tensor, limit: int) -> Tensor:
    """Whole numbers in [0, limit), by the upper 32 bits of each word."""
    return _shift_right(word_B, 32) * limit >> 32


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64."""
    x = (x ^ _shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift_right(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, places: int) -> Tensor:
    """Zeros come in from the left, as if the numbers had no sign."""
    return x >> places & (1 << 64 - places) - 1


_FIRST_KEY = int(_mix(torch.tensor(_GOLDEN)))
