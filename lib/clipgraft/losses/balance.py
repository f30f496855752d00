"""Losses that keep routers healthy, of sums over tokens: the balance loss, pooled as published too, and the z-loss.

What routers did is summed first and judged afterwards. So a batch may come in parts and from several processes: their
sums are added, and the losses, with their gradients, are those of the whole batch. Rows are tokens that were routed;
padding must be left out by the caller.
"""

# Shapes: T tokens, L layers, E experts, K top-k, S = 2 E + 3 sums

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RoutingMeans(NamedTuple):
    """What the routers of L layers did, on average over tokens.

    Attributes:
        load_LE: share of the choices that went to each expert; even use is 1 / E, without gradient.
        probs_LE: mean probability of each expert.
        z_L: mean squared logsumexp of the logits, which a loss keeps small (ST-MoE, arXiv:2202.08906, Eq. (5)).
        entropy_L: of a token's probabilities, in nats, log E where a router has no opinion; without gradient.
        top_k: experts per token.
    """

    load_LE: Tensor
    probs_LE: Tensor
    z_L: Tensor
    entropy_L: Tensor
    top_k: Tensor

    @classmethod
    def of(cls, sums_LS: Tensor) -> RoutingMeans:
        """From rows as `routing_sums` returns them, or sums of such rows."""
        num_experts = (sums_LS.shape[1] - 3) // 2
        choices_LE, probs_LE = sums_LS[:, :num_experts], sums_LS[:, num_experts:-3]
        z_L, entropy_L, tokens_L = sums_LS[:, -3:].unbind(1)
        num_choices_L = choices_LE.sum(1)
        return cls(
            choices_LE / num_choices_L[:, None],
            probs_LE / tokens_L[:, None],
            z_L / tokens_L,
            entropy_L / tokens_L,
            num_choices_L[0] / tokens_L[0],
        )


def routing_sums(logits_TE: Tensor, probs_TE: Tensor, topk_TK: Tensor) -> Tensor:
    """What one router did, summed over tokens.

    Args:
        logits_TE: of the router.
        probs_TE: their softmax over all experts.
        topk_TK: the experts each token went to.

    Returns:
        [S] in float64, which counts the tokens of any batch exactly: choices and probability of each expert, squared
        logsumexp, entropy, and number of tokens. Gradients flow through probabilities and logsumexp.
    """
    num_tokens, num_experts = probs_TE.shape
    logits_TE = logits_TE.float()
    # Not bincount, which makes a device wait for the host, in every layer.
    experts_E = torch.arange(num_experts, device=topk_TK.device)
    choices_E = (topk_TK[..., None] == experts_E).sum((0, 1))
    lse_T = logits_TE.logsumexp(1)
    entropy_T = lse_T.detach() - (probs_TE.detach() * logits_TE.detach()).sum(1)
    sums = [lse_T.square().sum(), entropy_T.sum(), lse_T.new_full((), num_tokens)]
    return torch.cat([choices_E.double(), probs_TE.float().sum(0).double(), torch.stack(sums)])


def balance_loss(means: RoutingMeans) -> Tensor:
    """How unevenly each layer uses its experts, layer by layer.

    E / K * sum_e f_e P_e, where f_e is the share of tokens that chose expert e among their K, and P_e its mean
    probability (Switch Transformer, arXiv:2101.03961, Eq. (4), for K choices).

    Returns:
        [L]: 1 if choices or probabilities are spread evenly, E / K if all tokens make one choice with certainty.
    """
    return means.load_LE.shape[1] * (means.load_LE * means.probs_LE).sum(1)


def pooled_balance_loss(sums_LS: Tensor) -> Tensor:
    """The same over the pooled tokens of all layers of a tower, E * sum_e f_e P_e, as CLIP-MoE's public code has it.

    Layers that collapse onto different experts look perfectly balanced to it: for comparisons, not for use. (The
    public code pools padding, too, and divides by the number of processes before they are averaged; we do neither.)

    Returns:
        Scalar, K where use is even.
    """
    pooled = RoutingMeans.of(sums_LS.sum(0, keepdim=True))
    return pooled.top_k * balance_loss(pooled).squeeze(0)
