"""Towers to train with: open_clip's numbers and parameter names, in less time. Only classes change, as in `patches`.

- Self-attention is one product for queries, keys and values, and none of the copies of `nn.MultiheadAttention`. Where
  the mask is the causal one it is not given as numbers, so that flash attention can be used on GPUs. For CPUs it is
  written out here, forward and backward: in bf16 torch's kernels take longer at all lengths (benchmarks/LOG.md).
- Where a feature is that of one token, the last block computes that token alone; nothing else reads the others.
- Texts of different lengths stand one behind another, without their padding, but for attention (`padding`).
- On GPUs norms take and give bf16, and count in float32 inside; autocast would copy their input to float32 and back, five
  times the bytes.

Gradients are autograd's wherever they can be, so what is frozen costs nothing, and sharding, checkpointing and
compiling see ordinary modules.
"""

# Shapes: B batch, L tokens, T tokens of all texts, D width, H heads, d width of a head, N = B * H, C = 3 * D

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipgraft.lean import open_clip
from clipgraft.models.build import is_padding_unseen
from clipgraft.models.padding import Packing, packing
from clipgraft.models.patches import WholeVisionTransformer
from clipgraft.models.plain_blocks import SelfAttentionBlock, in_heads, is_plain, mask_like

_NORM = open_clip.transformer.LayerNorm
_IMAGE, _TEXT = open_clip.transformer.VisionTransformer, open_clip.transformer.TextTransformer


def speed_up(model: nn.Module) -> None:
    """Let a model that will be trained compute the same in less time, in place; other kinds of blocks stay.

    Args:
        model: dense or with experts, before it is sharded or put in DDP; patches may be dropped already.
    """
    for module in model.modules():
        if type(module) is _NORM:
            module.__class__ = TrainingNorm
    for tower in (model.visual, model.text):
        if type(tower) is _IMAGE:
            tower.__class__ = WholeVisionTransformer
        blocks = getattr(getattr(tower, "transformer", None), "resblocks", [])
        for block in filter(is_plain, blocks):
            block.__class__ = TrainingBlock
            block.is_causal = _is_causal(tower)
        if len(blocks) and reads_one(tower, blocks[-1]):
            blocks[-1].__class__ = LastTrainingBlock
            if type(tower) is _TEXT:
                tower.__class__ = OneTokenTextTransformer
                tower.transformer.__class__ = OneTokenTransformer
                tower.packs = is_padding_unseen(tower) and all(map(_knows_packing, blocks))


def tell_padding(model: Any, text_BL: Tensor, device: torch.device) -> None:
    """Let the text tower leave out padding of the texts that it is given next; other towers see all of it.

    Args:
        model: that is trained.
        text_BL: the texts, before they are sent.
        device: where to.
    """
    if getattr(model.text, "packs", False):
        model.text.packing = packing(text_BL, device)


def _knows_packing(block: Any) -> bool:
    """Packed, a block has no other mask than the causal one, and experts are told of padding in another way."""
    is_dense = isinstance(block, TrainingBlock) and isinstance(block.mlp, nn.Sequential)
    return is_dense and block.is_causal


class TrainingNorm(_NORM):  # type: ignore[misc,valid-type]
    """A norm that autocast on a GPU leaves in the precision of its input; compiled, it is one kernel anyway."""

    def forward(self, x: Tensor) -> Tensor:
        """As open_clip's; its weights are rounded as those of products are."""
        is_plain = not x.is_cuda or x.dtype == torch.float32 or torch.compiler.is_compiling()
        if is_plain or not torch.is_autocast_enabled("cuda"):
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class TrainingBlock(SelfAttentionBlock):
    """A block of self-attention.

    Attributes:
        is_causal: whether the mask it is given is the causal one.
    """

    is_causal: bool

    def compute(self, x_BLD: Tensor, mask: Tensor | Packing | None) -> Tensor:
        """As open_clip's block."""
        return self._rest(x_BLD, self._mix(self.ln_1(x_BLD), mask))

    def _mix(self, normed_BLD: Tensor, mask: Tensor | Packing | None) -> Tensor:
        attn = self.attn
        qkv_BLC = F.linear(normed_BLD, attn.in_proj_weight, attn.in_proj_bias)
        if isinstance(mask, Packing):
            return mask.pack(attend(mask.unpack(qkv_BLC), attn.num_heads, self.is_causal))
        if self.is_causal or mask is None:
            return attend(qkv_BLC, attn.num_heads, self.is_causal)
        heads = [in_heads(each, attn.num_heads) for each in qkv_BLC.chunk(3, dim=-1)]
        mixed_BHLd = F.scaled_dot_product_attention(*heads, attn_mask=mask_like(mask, heads[0]))
        return mixed_BHLd.transpose(1, 2).flatten(2)

    def _rest(self, x_BLD: Tensor, mixed_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attn.out_proj(mixed_BLD)
        return x_BLD + self.mlp(self.ln_2(x_BLD))


class LastTrainingBlock(TrainingBlock):
    """The last block of a tower whose feature is that of one token.

    Which one is an argument, not an attribute: compiled code takes what a module has for what stays in its place.
    """

    def forward(
        self,
        q_x: Tensor,
        k_x: None = None,
        v_x: None = None,
        attn_mask: Tensor | Packing | None = None,
        place_B: Tensor | None = None,
    ) -> Tensor:
        """That token, [B, 1, D]; of each item of the batch the one at its place, or the first."""
        assert k_x is None and v_x is None, "self-attention alone"
        attn, width = self.attn, q_x.shape[2]
        weight, bias = attn.in_proj_weight, attn.in_proj_bias
        normed_BLD = self.ln_1(q_x)
        query_B1D = F.linear(_read(normed_BLD, attn_mask, place_B), weight[:width], bias[:width])
        key_value_BLC = F.linear(normed_BLD, weight[width:], bias[width:])
        if isinstance(attn_mask, Packing):
            key_value_BLC = attn_mask.unpack(key_value_BLC)
        heads = [in_heads(x, attn.num_heads) for x in (query_B1D, *key_value_BLC.chunk(2, dim=-1))]
        mask = None if attn_mask is None else _row(attn_mask, place_B, heads[0])
        mixed_BH1d = F.scaled_dot_product_attention(*heads, attn_mask=mask)
        mixed_B1D = mixed_BH1d.transpose(1, 2).flatten(2)
        return self._rest(_read(q_x, attn_mask, place_B), mixed_B1D)


def _read(x_BLD: Tensor, mask: Tensor | Packing | None, place_B: Tensor | None) -> Tensor:
    if isinstance(mask, Packing):
        return x_BLD[0].index_select(0, mask.end_B)[:, None]
    if place_B is None:
        return x_BLD[:, :1]
    return x_BLD[torch.arange(len(x_BLD), device=x_BLD.device), place_B][:, None]


def _row(mask: Tensor | Packing, place_B: Tensor | None, query_BH1d: Tensor) -> Tensor:
    """The mask of the token that is read, [B, 1 or H, 1, L]."""
    assert place_B is not None, "images have no mask"
    if isinstance(mask, Packing):
        position_L = torch.arange(mask.shape[1], device=place_B.device)
        return (position_L <= place_B[:, None])[:, None, None]
    if mask.dim() == 2:
        return mask_like(mask, query_BH1d)[place_B][:, None, None]
    item_B = torch.arange(len(place_B), device=mask.device)
    return mask_like(mask, query_BH1d)[item_B, :, place_B][:, :, None]


class OneTokenTransformer(open_clip.transformer.Transformer):  # type: ignore[misc]
    """Blocks of which the last is told what to read."""

    def forward(self, x_BLD: Tensor, attn_mask: Tensor | Packing | None, place_B: Tensor) -> Tensor:
        """What is read, [B, 1, D]. Packed texts are [1, T, D], and their packing is in the mask's place, which is causal."""
        *others, last = self.resblocks
        for block in others:
            x_BLD = self._run(block, x_BLD, None, None, attn_mask)
        return self._run(last, x_BLD, None, None, attn_mask, place_B)

    def _run(self, block: nn.Module, *inputs: Tensor | Packing | None) -> Tensor:
        if self.grad_checkpointing:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class OneTokenTextTransformer(_TEXT):  # type: ignore[misc,valid-type]
    """A text tower whose last block computes the token that is read.

    Attributes:
        packs: whether it can compute a batch without its padding.
        packing: of the next batch, from `tell_padding`; None: it has all of its padding.
    """

    packs: bool
    packing: Packing | None = None

    def forward(self, text: Tensor) -> Tensor:
        """As of open_clip's tower."""
        x_BLD, mask = self._embeds(text)
        place_B = self._place(text, x_BLD)
        told, self.packing = self.packing, None
        if told is not None:
            assert told.shape == x_BLD.shape[:2], "told of a batch of another shape"
            x_BLD, mask = told.pack(x_BLD), told
        x_B1D = self.transformer(x_BLD, attn_mask=mask, place_B=place_B)
        pooled_BD = self.ln_final(x_B1D[:, 0])
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(pooled_BD)
        return pooled_BD if self.text_projection is None else pooled_BD @ self.text_projection

    def _place(self, text_BL: Tensor, x_BLD: Tensor) -> Tensor:
        """What open_clip's pooling makes of the numbers of the tokens."""
        pool_type = self.pool_type if self.cls_emb is None else "last"
        number_BL = torch.arange(x_BLD.shape[1], device=text_BL.device).expand(len(text_BL), -1)
        return open_clip.transformer.text_global_pool(number_BL, text_BL, pool_type, self.eos_id)


def reads_one(tower: Any, last: nn.Module) -> bool:
    """Whether a tower's feature is that of one token; experts are told of all tokens, so these have to be there."""
    if not isinstance(last, TrainingBlock) or not isinstance(last.mlp, nn.Sequential):
        return False
    if tower.output_tokens:
        return False
    if isinstance(tower, _IMAGE):
        return bool(tower.attn_pool is None and tower.pool_type == "tok")
    return bool(type(tower) is _TEXT and (tower.pool_type != "none" or tower.cls_emb is not None))


def attend(qkv_BLC: Tensor, num_heads: int, is_causal: bool) -> Tensor:
    """Self-attention without a mask, or the causal one."""
    if qkv_BLC.device.type == "cpu" and not torch.compiler.is_compiling():
        return _CpuAttention.apply(qkv_BLC, num_heads, is_causal)
    return attend_by_torch(qkv_BLC, num_heads, is_causal)


def attend_by_torch(qkv_BLC: Tensor, num_heads: int, is_causal: bool) -> Tensor:
    """The same, with the kernel that torch has for the device."""
    heads = [in_heads(each, num_heads) for each in qkv_BLC.chunk(3, dim=-1)]
    mixed_BHLd = F.scaled_dot_product_attention(*heads, is_causal=is_causal)
    return mixed_BHLd.transpose(1, 2).flatten(2)


class _CpuAttention(torch.autograd.Function):
    """Self-attention on a CPU: heads are brought together in one copy, forward and backward; [N, L, L] is kept between."""

    @staticmethod
    def forward(ctx: Any, qkv_BLC: Tensor, num_heads: int, is_causal: bool) -> Tensor:
        num, length, _ = qkv_BLC.shape
        qkv_3NLd = _split(qkv_BLC, 3 * num_heads).view(3, num * num_heads, length, -1)
        query_NLd, key_NLd, value_NLd = qkv_3NLd
        ctx.num_heads, ctx.scale = num_heads, 1 / math.sqrt(qkv_3NLd.shape[-1])
        # A row of 16 numbers in bf16 takes softmax several times as long as in float32, backward most of all.
        score_NLL = torch.bmm(query_NLd, key_NLd.transpose(1, 2)).to(_at_least_float32(qkv_BLC))
        score_NLL.mul_(ctx.scale)
        if is_causal:
            score_NLL += torch.full_like(score_NLL[0], -math.inf).triu_(1)
        share_NLL = score_NLL.softmax(2)
        ctx.save_for_backward(qkv_3NLd, share_NLL)
        share_NLL = share_NLL.to(value_NLd.dtype)
        return _join(torch.bmm(share_NLL, value_NLd).view(num_heads, num, length, -1))

    @staticmethod
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor, None, None]:
        qkv_3NLd, share_NLL = ctx.saved_tensors
        query_NLd, key_NLd, value_NLd = qkv_3NLd
        grad_NLd = _split(grad_BLD, ctx.num_heads).view_as(query_NLd)
        d_share_NLL = torch.bmm(grad_NLd, value_NLd.transpose(1, 2)).to(share_NLL.dtype)
        d_score_NLL = torch._softmax_backward_data(d_share_NLL, share_NLL, 2, share_NLL.dtype)
        d_score_NLL = d_score_NLL.mul_(ctx.scale).to(grad_NLd.dtype)
        share_NLL = share_NLL.to(grad_NLd.dtype)
        d_qkv_3NLd = torch.empty_like(qkv_3NLd)
        torch.bmm(d_score_NLL, key_NLd, out=d_qkv_3NLd[0])
        torch.bmm(d_score_NLL.transpose(1, 2), query_NLd, out=d_qkv_3NLd[1])
        torch.bmm(share_NLL.transpose(1, 2), grad_NLd, out=d_qkv_3NLd[2])
        num, length, _ = grad_BLD.shape
        return _join(d_qkv_3NLd.view(3 * ctx.num_heads, num, length, -1)), None, None


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _split(x_BLD: Tensor, num_heads: int) -> Tensor:
    """Heads first: [H, B, L, d]."""
    return x_BLD.unflatten(2, (num_heads, -1)).permute(2, 0, 1, 3).contiguous()


def _join(x_HBLd: Tensor) -> Tensor:
    return x_HBLd.permute(1, 2, 0, 3).flatten(2)


def _is_causal(tower: Any) -> bool:
    """Whether the mask of a tower is the causal one, and nothing is added to it."""
    if not isinstance(tower, _TEXT) or tower.attn_mask is None or tower.cls_emb is not None:
        return False
    return torch.equal(tower.attn_mask.cpu(), tower.build_causal_mask())
