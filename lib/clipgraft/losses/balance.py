"""Losses that keep routers healthy: the balance loss and the z-loss, one layer at a time.

The public CLIP-MoE code computes its balance loss over the pooled tokens of all layers, where layers that collapse
onto different experts look perfectly balanced. Here a layer is judged alone; the caller averages over layers.
Padding must be left out by the caller: rows are tokens that were routed.
"""

# Shapes: T tokens, E experts, K top-k

from __future__ import annotations

import torch
from torch import Tensor


def balance_loss(probs_TE: Tensor, topk_TK: Tensor) -> Tensor:
    """How unevenly one layer uses its experts.

    E / K * sum_e f_e P_e, where f_e is the share of tokens that chose expert e among their K, and P_e its mean
    probability (Switch Transformer, arXiv:2101.03961, Eq. (4), for K choices).

    Args:
        probs_TE: softmax of the router logits over all experts; gradients flow through these.
        topk_TK: the experts each token went to.

    Returns:
        1 if choices or probabilities are spread evenly, E / K if all tokens make one choice with certainty.
    """
    num_tokens, num_experts = probs_TE.shape
    chosen_E = torch.bincount(topk_TK.flatten(), minlength=num_experts).float()
    share_E = chosen_E / (num_tokens * topk_TK.shape[1])  # f_e / K: of all choices
    return num_experts * (share_E * probs_TE.float().mean(0)).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean squared logsumexp of the router logits, which keeps them small (ST-MoE, arXiv:2202.08906, Eq. (5))."""
    return logits_TE.float().logsumexp(1).square().mean()
