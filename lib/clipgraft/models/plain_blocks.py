"""What open_clip's ordinary block is, and what the blocks that stand in for it have in common."""

# Shapes: B batch, H heads, L tokens, D width, d width of a head

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from clipgraft.lean import open_clip

PLAIN = open_clip.transformer.ResidualAttentionBlock


class SelfAttentionBlock(PLAIN):  # type: ignore[misc,valid-type]
    """Stands in for open_clip's block where it attends to its own input alone."""

    def forward(
        self,
        q_x: Tensor,
        k_x: None = None,
        v_x: None = None,
        attn_mask: Any = None,
    ) -> Tensor:
        """As of open_clip's block; the mask is what the tower gives, and the block knows."""
        assert k_x is None and v_x is None, "self-attention alone"
        return self.compute(q_x, attn_mask)

    def compute(self, x_BLD: Tensor, mask: Any) -> Tensor:
        """What the block makes of tokens."""
        raise NotImplementedError


def is_plain(block: Any) -> bool:
    """Whether a block is open_clip's ordinary one, of self-attention, with nothing between its parts."""
    if type(block) is not PLAIN or hasattr(block, "ln_1_kv"):
        return False
    attn = block.attn
    has_scale = not all(isinstance(each, nn.Identity) for each in (block.ls_1, block.ls_2))
    is_whole = attn.in_proj_weight is not None and attn.in_proj_bias is not None
    return is_whole and not has_scale and attn.batch_first and not attn.dropout


def in_heads(x_BLD: Tensor, num_heads: int) -> Tensor:
    """[B, H, L, d]."""
    return x_BLD.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def mask_like(mask: Tensor, query_BHLd: Tensor) -> Tensor:
    """A mask that is added, [L, L] or [B, 1, 1, L], or [B * H, L, L] as [B, H, L, L]; in the precision of the product."""
    mask = mask.to(query_BHLd.dtype)
    return mask.unflatten(0, query_BHLd.shape[:2]) if mask.dim() == 3 else mask
