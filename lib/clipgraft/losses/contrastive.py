"""Minibatch contrastive loss (MBCL) of image-text pairs, as in CLIP.

Computed in float32 whatever autocast says: at tau = 0.01 the similarities are multiplied by 100, and bfloat16 would
round them to a few tenths. In the distributed form each rank scores its rows against the features of all ranks,
so that the mean of the losses of all ranks is the loss of the global batch.
"""

# Shapes: B local batch, G global batch, D embedding

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    image_GD: Tensor | None = None,
    text_GD: Tensor | None = None,
    first_row: int = 0,
    label_smoothing: float = 0.0,
    group_G: Tensor | None = None,
) -> Tensor:
    """Symmetric cross-entropy over the similarities of a batch.

    Args:
        image_BD: L2-normalised image features of this rank.
        text_BD: the same for text; row i is the caption of image i.
        logit_scale: 1 / tau, as open_clip's models return it (exponentiated).
        image_GD: features of all ranks, this rank's at rows [first_row, first_row + B). Default: this rank's.
        text_GD: the same for text.
        first_row: this rank's place in the global batch.
        label_smoothing: share of the target spread evenly over the columns that are compared.
        group_G: pseudo label of each row of the global batch. Pairs of different labels are not compared, and
            a pair that is alone with its label does not count. Default: all pairs are compared.

    Returns:
        Mean loss of the rows that count (all ranks' rows: the mean over ranks is the loss of the global batch).
    """
    with torch.autocast(image_BD.device.type, enabled=False):
        scale = logit_scale.float()
        image_BD, text_BD = image_BD.float(), text_BD.float()
        image_GD = image_BD if image_GD is None else image_GD.float()
        text_GD = text_BD if text_GD is None else text_GD.float()
        image_logits_BG = scale * image_BD @ text_GD.T
        text_logits_BG = scale * text_BD @ image_GD.T
        directions = (image_logits_BG, text_logits_BG)
        if group_G is None:
            target_B = first_row + torch.arange(len(image_BD), device=image_BD.device)
            losses = [
                F.cross_entropy(x, target_B, label_smoothing=label_smoothing) for x in directions
            ]
        else:
            losses = [_grouped(x, group_G, first_row, label_smoothing) for x in directions]
        return (losses[0] + losses[1]) / 2


def _grouped(logits_BG: Tensor, group_G: Tensor, first_row: int, label_smoothing: float) -> Tensor:
    num_rows = len(logits_BG)
    same_GG = group_G[:, None] == group_G[None, :]
    counts_G = same_GG.sum(1) > 1
    same_BG = same_GG[first_row : first_row + num_rows]
    counts_B = counts_G[first_row : first_row + num_rows]
    log_p_BG = logits_BG.masked_fill(~same_BG, -torch.inf).log_softmax(1)
    target_B = log_p_BG.diagonal(first_row)
    mean_B = log_p_BG.masked_fill(~same_BG, 0).sum(1) / same_BG.sum(1)
    loss_B = -(1 - label_smoothing) * target_B - label_smoothing * mean_B
    # The number of rows that count is the global one, so that ranks with few such rows weigh less.
    num_counted = counts_G.sum().clamp(min=1) * (num_rows / len(group_G))
    return (loss_B * counts_B).sum() / num_counted
