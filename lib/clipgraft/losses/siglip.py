"""Sigmoid loss of all pairs (SigLIP, arXiv:2303.15343), on the pair engine; one pass, for nothing couples its pairs."""

# Shapes: B local batch, G global batch, D embedding, R and C rows and columns of a tile

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.losses.pairs import Pairs, exact, tiles, with_gradients


def siglip_loss(
    image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, logit_bias: Tensor, pairs: Pairs
) -> Tensor:
    """Binary cross-entropy of every pair being a positive, summed over the pairs of an image.

    Args:
        image_BD: L2-normalised image features of this process; gradients flow into them.
        text_BD: the same for text; row i is the caption of image i.
        logit_scale: 1 / tau.
        logit_bias: is added to the logits.
        pairs: of these features.

    Returns:
        Mean over the local images; the mean over processes is the loss of the global batch.
    """
    with exact():
        scale, bias = (x.detach().to(pairs.image_BD.dtype) for x in (logit_scale, logit_bias))
        share = 1 / len(image_BD)
        # Every pair as if it were a negative; then the positives: softplus(-x) - softplus(x) = -x.
        value = -(scale * pairs.positive_B + bias).sum()
        d_bias = -torch.ones_like(bias) * len(image_BD)
        d_image_BD, d_text_BD = -pairs.text_BD, -pairs.image_BD
        for r, c, sim_RC in tiles(pairs.image_BD, pairs.text_GD, pairs):
            logit_RC = sim_RC.mul_(scale).add_(bias)
            value -= F.logsigmoid(-logit_RC).sum()
            p_RC = logit_RC.sigmoid_()
            d_bias += p_RC.sum()
            d_image_BD[r].addmm_(p_RC, pairs.text_GD[c])
            if pairs.is_alone:
                d_text_BD[c].addmm_(p_RC.T, pairs.image_BD[r])
        if not pairs.is_alone:
            for r, c, sim_RC in tiles(pairs.text_BD, pairs.image_GD, pairs):
                p_RC = sim_RC.mul_(scale).add_(bias).sigmoid_()
                d_text_BD[r].addmm_(p_RC, pairs.image_GD[c])
        d_scale = share * (pairs.image_BD * d_image_BD).sum()
        gradients = [share * scale * d_image_BD, share * scale * d_text_BD]
        gradients += [d_scale.view_as(logit_scale), (share * d_bias).view_as(logit_bias)]
    return with_gradients(share * value, [image_BD, text_BD, logit_scale, logit_bias], gradients)
