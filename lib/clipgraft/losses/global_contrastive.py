"""Global contrastive losses: GCL, RGCL (a temperature per sample) and RGCL-g (one temperature), on the pair engine.

FastCLIP (arXiv:2407.01445) v0 and v1 are `gcl`, v2 is `rgcl`, v3 is `rgcl_g`; with the pairs in excess of a
reference's they are DRRho (arXiv:2505.06699). The value returned is the objective with the remembered u in place of the
mean over all data, not the surrogate of the public code, whose value is always about 1. Deviations from that code, each
with a test: the gradient of tau is that of this value (`tau_grad: fastclip` counts the pairs twice, as published), all
logarithms have eps, and RGCL's gradient has no extra 1 / tau.
"""

# Shapes: B local batch, G global batch, D embedding; 2: as image and as text

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.losses.pairs import (
    Anchors,
    Pairs,
    exact,
    row_statistics,
    weighted_sums,
    with_gradients,
)

Kind = Literal["gcl", "rgcl", "rgcl_g"]


def log_negatives(pairs: Pairs, tau_B2: Tensor) -> tuple[Tensor, Tensor]:
    """First pass: log g, the log of the mean over negatives of exp(margin / tau), and the mean margin.

    Args:
        pairs: what is compared.
        tau_B2: temperature of each local row, as image and as text.

    Returns:
        log g [B, 2], and the mean [B, 2] of margin / tau under the weights exp(margin / tau).
    """
    with exact():
        lse_B2, mean_B2 = row_statistics(pairs, 1 / tau_B2, with_positives=False)
        positive_B2 = pairs.positive_B[:, None] / tau_B2
        return lse_B2 - positive_B2 - _log_num_negatives(pairs), mean_B2 - positive_B2


def own_anchors(pairs: Pairs, tau_B2: Tensor, log_v_B2: Tensor, kind: Kind) -> Anchors:
    """How the local rows weigh their negatives: exp(margin / tau) / ((G - 1)(eps + u)), times tau unless GCL, over tau.

    Args:
        pairs: what is compared.
        tau_B2: temperature of each local row, as image and as text.
        log_v_B2: log(eps + u) of each, after the update.
        kind: of the loss.
    """
    scale_B2 = 1 / tau_B2
    factor_B2 = scale_B2.log() if kind == "gcl" else torch.zeros_like(scale_B2)
    shift_B2 = scale_B2 * pairs.positive_B[:, None] + log_v_B2 + _log_num_negatives(pairs)
    return Anchors(scale_B2, factor_B2 - shift_B2)


def global_contrastive_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    everyone: Anchors,
    log_g_B2: Tensor,
    log_v_B2: Tensor,
    *,
    kind: Kind,
    rho: float = 0.0,
    tau_grad: Literal["exact", "fastclip"] = "exact",
) -> Tensor:
    """Half of GCL, RGCL or RGCL-g, with the remembered u as the constant of the gradient estimator.

    Args:
        image_BD: L2-normalised image features of this process; gradients flow into them.
        text_BD: the same for text.
        logit_scale: 1 / tau; has no gradient in RGCL.
        pairs: of these features, or in excess of a reference's.
        everyone: `own_anchors` of all processes.
        log_g_B2: `log_negatives` of the pairs.
        log_v_B2: log(eps + u) after the update.
        kind: gcl: mean of log(eps + u) over anchors; rgcl: of tau_i (log(eps + u) + rho); rgcl_g: the same with
            one tau.
        rho: radius of the distributions that RGCL is robust to, in nats.
        tau_grad: that of this value, or the published code's.

    Returns:
        Mean over the local rows and both sides; the mean over processes is that of the global batch.
    """
    with exact():
        own = Anchors(*(each[pairs.own] for each in everyone))
        sums = weighted_sums(pairs, own, everyone, with_positives=False)
        # Both anchors of a row measure their margins from its own pair, which is pushed up in return.
        factor_B2 = own.scale_A2 if kind == "gcl" else torch.ones_like(own.scale_A2)
        pull_B1 = (factor_B2 * (log_g_B2 - log_v_B2).exp()).sum(1, keepdim=True)
        share = 1 / (2 * len(log_v_B2))
        d_image_BD = share * (sums[0] - pull_B1 * pairs.text_BD)
        d_text_BD = share * (sums[1] - pull_B1 * pairs.image_BD)
        scale = logit_scale.detach().to(log_v_B2.dtype)
        if kind == "gcl":
            value, d_outer = log_v_B2.mean(), torch.zeros_like(scale)
        else:
            value = ((log_v_B2 + rho) / own.scale_A2).mean()
            d_outer = -value / scale  # of tau, which stands before the logarithms
        # The pairs depend on scale * image only (Euler), so the images' gradients give the scale's.
        d_pairs = (pairs.image_BD * d_image_BD).sum() / scale
        d_scale = d_outer + d_pairs * (2 if tau_grad == "fastclip" else 1)
    inputs, gradients = [image_BD, text_BD], [d_image_BD, d_text_BD]
    if kind != "rgcl":
        inputs, gradients = [*inputs, logit_scale], [*gradients, d_scale.view_as(logit_scale)]
    return with_gradients(value, inputs, gradients)


def tau_gradient(
    tau_B2: Tensor, log_g_B2: Tensor, log_v_B2: Tensor, margin_B2: Tensor, rho: float
) -> Tensor:
    """Gradient of RGCL for each sample's tau: log(eps + u) + rho - the mean margin under the estimator's weights."""
    return log_v_B2 + rho - (log_g_B2 - log_v_B2).exp() * margin_B2


def diagnostics(
    pairs: Pairs,
    tau_B2: Tensor,
    log_g_B2: Tensor,
    log_u_B2: Tensor,
    log_v_B2: Tensor,
    margin_B2: Tensor,
) -> dict[str, Tensor]:
    """What is worth looking at while training, each a mean over the local rows.

    Returns:
        infonce: the minibatch contrastive loss (of excess margins, if the pairs have a reference); gcl: GCL with the
        remembered u; kl: of the weights of the negatives from uniform, which rho is compared to; drift: how far
        log u is from this batch's log g.
    """
    return {
        "infonce": F.softplus(log_g_B2 + _log_num_negatives(pairs)).mean(),
        "gcl": (tau_B2 * log_v_B2).mean(),
        "kl": ((log_g_B2 - log_v_B2).exp() * margin_B2 - log_v_B2).mean(),
        "drift": (log_g_B2 - log_u_B2).abs().mean(),
    }


def _log_num_negatives(pairs: Pairs) -> float:
    return math.log(len(pairs.image_GD) - 1)
