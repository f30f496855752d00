"""Minibatch contrastive loss (MBCL) of image-text pairs, as in CLIP, on the pair engine.

The positive is kept apart: what a row loses is softplus(odds), odds being the logsumexp of its negatives minus its
positive. So a loss close to 0 and its gradient keep their digits in float32, where 1 - softmax would have lost them.
"""

# Shapes: B local batch, G global batch, D embedding, U groups; 2: as image and as text

from __future__ import annotations

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


def log_odds(pairs: Pairs, logit_scale: Tensor) -> Tensor:
    """First pass: log of the odds [B, 2] of each local row, as image and as text, against its own pair."""
    with exact():
        scale = logit_scale.detach().to(pairs.image_BD.dtype)
        lse_B2, _ = row_statistics(pairs, scale, with_positives=False)
        return lse_B2 - scale * pairs.positive_B[:, None]


def softmax_bias(pairs: Pairs, logit_scale: Tensor, odds_B2: Tensor) -> Tensor:
    """Minus the logsumexp [B, 2] over all pairs of each local row: what makes exp(logit + bias) its softmax."""
    scale = logit_scale.detach().to(odds_B2.dtype)
    return -scale * pairs.positive_B[:, None] - softplus(odds_B2)


def contrastive_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    odds_B2: Tensor,
    bias_G2: Tensor,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Symmetric cross-entropy over the similarities of a batch.

    Args:
        image_BD: L2-normalised image features of this process; gradients flow into them.
        text_BD: the same for text; row i is the caption of image i.
        logit_scale: 1 / tau, as open_clip's models return it (exponentiated).
        pairs: of these features. Where they have groups, a pair that is alone in its group does not count.
        odds_B2: `log_odds` of the pairs at this scale.
        bias_G2: `softmax_bias` of all processes.
        label_smoothing: share of the target spread evenly over the columns that are compared.

    Returns:
        Mean loss of the rows that count (all processes' rows: the mean over processes is the loss of the global batch).
    """
    with exact():
        scale = logit_scale.detach().to(odds_B2.dtype)
        counts_G1 = _counts(pairs, bias_G2)[:, None]
        counts_B1 = counts_G1[pairs.own]
        num_counted = counts_G1.sum().to(scale.dtype).clamp(min=1) * len(odds_B2) / len(bias_G2)
        everyone = Anchors(scale.expand_as(bias_G2), bias_G2.masked_fill(~counts_G1, -torch.inf))
        own = Anchors(*(each[pairs.own] for each in everyone))
        # A pair has two anchors, and both pull towards the target.
        pull_B1 = odds_B2.sigmoid().sum(1, keepdim=True) - 2 * label_smoothing
        means = [
            2 * label_smoothing * _mean_of_group(pairs, features_GD, label_smoothing)
            for features_GD in (pairs.text_GD, pairs.image_GD)
        ]
        share = 1 / (2 * num_counted)
        gradients = [
            share * scale * (sum_BD - counts_B1 * (pull_B1 * positive_BD + mean_BD))
            for sum_BD, positive_BD, mean_BD in zip(
                weighted_sums(pairs, own, everyone, with_positives=False),
                (pairs.text_BD, pairs.image_BD),
                means,
                strict=True,
            )
        ]
        value_B = softplus(odds_B2).sum(1)
        for rows_BD, positive_BD, mean_BD in zip(
            (pairs.image_BD, pairs.text_BD), (pairs.text_BD, pairs.image_BD), means, strict=True
        ):
            gap_BD = label_smoothing * positive_BD - mean_BD / 2
            value_B = value_B + scale * (rows_BD * gap_BD).sum(1)
        # The loss depends on scale * image only (Euler), so the images' gradients give the scale's.
        d_scale = (pairs.image_BD * gradients[0]).sum() / scale
        value = share * (counts_B1[:, 0] * value_B).sum()
    return with_gradients(
        value, [image_BD, text_BD, logit_scale], [*gradients, d_scale.view_as(logit_scale)]
    )


def infonce(pairs: Pairs, odds_B2: Tensor) -> Tensor:
    """The loss without label smoothing and without gradient: mean of the local rows that count, as `contrastive_loss`."""
    counts_G = _counts(pairs, pairs.image_GD)
    share = counts_G.sum().clamp(min=1) * len(odds_B2) / len(counts_G)
    return softplus(odds_B2).mean(1).sum() / share  # a row that is alone adds 0


def guessing(pairs: Pairs) -> Tensor:
    """`infonce` of a model to which all pairs look alike: mean log of the candidates of the rows that count."""
    if pairs.group_G is None:
        return pairs.image_BD.new_full((), len(pairs.image_GD)).log()
    number_G, size_U = _groups(pairs.group_G)
    size_G = size_U[number_G].to(pairs.image_BD.dtype)
    return size_G.log().sum() / (size_G > 1).sum().clamp(min=1)  # a row that is alone adds log 1


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), to the last digit (torch's own returns x above 20)."""
    return -F.logsigmoid(-x)


def _counts(pairs: Pairs, bias_G2: Tensor) -> Tensor:
    """Which rows of the global batch have another one to be compared with."""
    if pairs.group_G is None:
        return torch.ones(len(bias_G2), dtype=torch.bool, device=bias_G2.device)
    number_G, size_U = _groups(pairs.group_G)
    return size_U[number_G] > 1


def _mean_of_group(pairs: Pairs, features_GD: Tensor, label_smoothing: float) -> Tensor:
    """Mean of the features that a local row is compared with."""
    if label_smoothing == 0:
        return features_GD.new_zeros(())
    if pairs.group_G is None:
        return features_GD.mean(0)
    number_G, size_U = _groups(pairs.group_G)
    sum_UD = features_GD.new_zeros(len(size_U), features_GD.shape[1])
    mean_UD = sum_UD.index_add_(0, number_G, features_GD) / size_U[:, None]
    return mean_UD[number_G[pairs.own]]


def _groups(group_G: Tensor) -> tuple[Tensor, Tensor]:
    """Groups numbered from 0, and their sizes; as many as there are rows, the last ones empty.

    Not `unique`, which makes a device wait for the host, to learn how many there are.
    """
    sorted_G, order_G = group_G.sort()
    is_next_G = torch.zeros_like(sorted_G, dtype=torch.bool)
    is_next_G[1:] = sorted_G[1:] != sorted_G[:-1]
    number_G = torch.empty_like(order_G).scatter_(0, order_G, is_next_G.cumsum(0))
    size_U = torch.zeros_like(number_G).scatter_add_(0, number_G, torch.ones_like(number_G))
    return number_G, size_U
