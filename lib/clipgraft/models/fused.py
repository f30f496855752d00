"""Blocks to look at a model with: the same features on a CPU in less than half of the time.

What is saved: torch gives float32 products to MKL, which on other processors than Intel's is half as fast as oneDNN
with weights that it has laid out once; activations and residual sums are then part of the product. And where a tower's
feature is that of one token, the last block computes that token alone. Parameters and their names stay; only the class
of the blocks is another, as in `patches`. Weights that change afterwards are not seen, so nothing is trained like this.
"""

# Shapes: B batch, L tokens, D width, F hidden, H heads, S tokens that are computed (L, or 1 in a last block)

from __future__ import annotations

import platform
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.lean import open_clip
from clipgraft.models.plain_blocks import SelfAttentionBlock, in_heads, is_plain, mask_like

_GELUS = {"none": "none", "tanh": "tanh"}  # what oneDNN calls torch's approximations
# `place_B`: which token the feature is of, for each item of the batch that a thread has in a tower; it has one at a time.
_here = threading.local()


def fuse(model: nn.Module) -> None:
    """Let a model on a CPU compute the same features faster, in place; blocks of other kinds stay as they are.

    Args:
        model: in evaluation mode, in float32, dense or with experts; or several side by side (`models`).
    """
    if not _has_onednn():
        return
    for each in getattr(model, "models", [model]):
        for tower in (each.visual, each.text):
            blocks = getattr(getattr(tower, "transformer", None), "resblocks", [])
            for block in filter(_is_fusible, blocks):
                block.__class__ = FusedBlock
                block.lay_out()
            if len(blocks) and isinstance(blocks[-1], FusedBlock) and _pools_one(tower, blocks[-1]):
                blocks[-1].__class__ = LastBlock
                blocks[-1].lay_out()
                tower.register_forward_pre_hook(_tell_last)


class FusedBlock(SelfAttentionBlock):
    """A block whose weights oneDNN has laid out."""

    def lay_out(self) -> None:
        """Hand the weights to oneDNN; once, and again if they change."""
        attn = self.attn
        self.qkv = _Product(attn.in_proj_weight, attn.in_proj_bias)
        self.out = _Product(attn.out_proj.weight, attn.out_proj.bias)
        self.fc, self.proj = None, None
        if isinstance(self.mlp, nn.Sequential):
            self.fc = _Product(self.mlp.c_fc.weight, self.mlp.c_fc.bias, self.mlp.gelu)
            self.proj = _Product(self.mlp.c_proj.weight, self.mlp.c_proj.bias)

    def compute(self, x_BLD: Tensor, mask: Tensor | None) -> Tensor:
        """As open_clip's block."""
        query_BLD, key_BLD, value_BLD = self.qkv(self.ln_1(x_BLD)).chunk(3, dim=-1)
        return self._rest(x_BLD, query_BLD, key_BLD, value_BLD, mask)

    def _rest(
        self,
        x_BSD: Tensor,
        query_BSD: Tensor,
        key_BLD: Tensor,
        value_BLD: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        num_heads = self.attn.num_heads
        heads = [in_heads(each, num_heads) for each in (query_BSD, key_BLD, value_BLD)]
        mask = None if mask is None else mask_like(mask, heads[0])
        mixed_BHSd = F.scaled_dot_product_attention(*heads, attn_mask=mask)
        x_BSD = self.out(mixed_BHSd.transpose(1, 2).flatten(2), x_BSD)
        if self.fc is None:
            return x_BSD + self.mlp(self.ln_2(x_BSD))
        return self.proj(self.fc(self.ln_2(x_BSD)), x_BSD)


class LastBlock(FusedBlock):
    """The last block of a tower whose feature is that of one token: the other tokens are left as they came."""

    def lay_out(self) -> None:
        """As of any block, but queries apart: only one token asks."""
        super().lay_out()
        weight, bias, width = self.attn.in_proj_weight, self.attn.in_proj_bias, self.attn.embed_dim
        del self.qkv
        self.query = _Product(weight[:width], bias[:width])
        self.key_value = _Product(weight[width:], bias[width:])

    def compute(self, x_BLD: Tensor, mask: Tensor | None) -> Tensor:
        """The tokens [B, L, D], of which one is the block's output."""
        normed_BLD, item_B, place_B = self.ln_1(x_BLD), torch.arange(len(x_BLD)), _here.place_B
        if mask is not None:
            mask = mask[place_B][:, None, None]
        query_BSD = self.query(normed_BLD[item_B, place_B][:, None])
        key_BLD, value_BLD = self.key_value(normed_BLD).chunk(2, dim=-1)
        x_BSD = x_BLD[item_B, place_B][:, None]
        y_BSD = self._rest(x_BSD, query_BSD, key_BLD, value_BLD, mask)
        return x_BLD.index_put((item_B, place_B), y_BSD[:, 0])


class _Product:
    """A linear layer as oneDNN wants its weight; the activation or the sum that follows is part of it."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: nn.Module | None = None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self._bias = bias.detach().contiguous()
        is_gelu = isinstance(activation, nn.GELU)
        self._how: tuple[Any, ...] = (
            ("gelu", [], _GELUS[activation.approximate]) if is_gelu else ("none", [], "")
        )
        self._after = nn.Identity() if is_gelu or activation is None else activation

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        product = torch.ops.mkldnn._linear_pointwise
        if added is not None:
            return product.binary(x, added, self._weight, self._bias, "add")
        return self._after(product(x, self._weight, self._bias, *self._how))


def _tell_last(tower: Any, arguments: tuple[Tensor, ...]) -> None:
    """Which token of each item the tower's feature is of."""
    (items,) = arguments
    is_image = isinstance(tower, open_clip.transformer.VisionTransformer)
    _here.place_B = torch.zeros(len(items), dtype=torch.long) if is_image else items.argmax(1)


def _has_onednn() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


def _is_fusible(block: Any) -> bool:
    """Whether a block is what is fused: float32 on a CPU, and plain."""
    if not is_plain(block):
        return False
    weight = block.attn.in_proj_weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def _pools_one(tower: Any, last: FusedBlock) -> bool:
    """Whether a tower's feature is that of one token; where experts are told of, all tokens have to be there."""
    if last.fc is None or tower.output_tokens:
        return False
    if isinstance(tower, open_clip.transformer.VisionTransformer):
        return bool(tower.attn_pool is None and tower.pool_type == "tok")
    return bool(tower.pool_type == "argmax" and tower.cls_emb is None)
