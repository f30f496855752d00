"""Distillation from the features of reference models: feature, affinity and interactive; the latter two on the pair engine.

Feature distillation pulls each feature towards the reference's of the same sample; where dimensions differ, it is a
learned projection of the feature that is pulled. Affinity is the cross-entropy of the model's softmax over the batch
from the references', in both directions (CLIP-KD, arXiv:2307.12732; TinyCLIP); features may have any dimension, and
several references are averaged after their softmax (MobileCLIP). The loss is linear in that mean, so each reference is a
second pass of its own, with its own anchors, and nothing of the size of the matrix is held. Interactive contrasts the
model's images with the reference's texts, and its texts with the reference's images, so that dimensions must be equal.
"""

# Shapes: B local batch, G global batch, D embedding, K references, R and C rows and columns of a tile; 2: as image and as
# text

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.losses.pairs import (
    Anchors,
    Pairs,
    exact,
    tiles,
    weighted_sums,
    with_gradients,
)


class Softmax(NamedTuple):
    """The softmax of each row's similarities, as image and as text.

    Attributes:
        pairs: what is compared.
        scale: 1 / tau.
        lse_G2: `row_statistics` of the pairs at this scale, of all processes.
    """

    pairs: Pairs
    scale: Tensor
    lse_G2: Tensor


class Projection(nn.Module):
    """Linear maps of a model's features to the dimension of a reference's, for feature distillation (CLIP-KD).

    Drawn by a generator of its own, so that the model begins with the same weights with and without it.
    """

    def __init__(self, dim: int, reference_dim: int, seed: int) -> None:
        """Draw both maps."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        image, text = torch.randn(2, reference_dim, dim, generator=generator) * dim**-0.5
        self.image, self.text = nn.Parameter(image), nn.Parameter(text)

    def forward(self, image_BD: Tensor, text_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Projected and L2-normalised, in the precision of the maps."""
        image_BD, text_BD = image_BD.to(self.image.dtype), text_BD.to(self.text.dtype)
        return (
            F.normalize(F.linear(image_BD, self.image), dim=1),
            F.normalize(F.linear(text_BD, self.text), dim=1),
        )


def feature_loss(
    image_BD: Tensor, text_BD: Tensor, reference_image_BD: Tensor, reference_text_BD: Tensor
) -> Tensor:
    """Squared distance from the reference's features: 2 (1 - cosine) of images plus the same of texts.

    Args:
        image_BD: L2-normalised image features of this process, maybe projected; gradients flow into them.
        text_BD: the same for text.
        reference_image_BD: L2-normalised, of the same samples and dimension, without gradient.
        reference_text_BD: the same for text.

    Returns:
        Sum over both sides of the mean over local rows; the mean over processes is the loss of the global batch.
    """
    image = (reference_image_BD - image_BD).square().sum(1).mean()
    return image + (reference_text_BD - text_BD).square().sum(1).mean()


def affinity_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    student: Softmax,
    references: Sequence[Softmax],
    is_kl: bool = False,
) -> Tensor:
    """Cross-entropy (or KL, of equal gradient) of a softmax of similarities from the mean of those of references.

    Args:
        image_BD: L2-normalised image features of this process; gradients flow into them.
        text_BD: the same for text.
        logit_scale: 1 / tau of the model.
        student: of these features, at this scale.
        references: of the references' features of the same samples, each at its own scale.
        is_kl: subtract the entropy of the references' mean.

    Returns:
        Half of the sum of both directions' means; the mean over processes is the loss of the global batch.
    """
    with exact():
        pairs, scale, lse_G2 = student
        lse_B2, share = lse_G2[pairs.own], 1 / (2 * len(image_BD))
        sums = weighted_sums(pairs, *_anchors(student))
        targets = [torch.zeros_like(each) for each in sums]
        for reference in references:
            parts = weighted_sums(reference.pairs, *_anchors(reference), values=pairs)
            for target, part in zip(targets, parts, strict=True):
                target.add_(part, alpha=1 / len(references))
        value = lse_B2.sum() - scale * (pairs.image_BD * targets[0]).sum()
        if is_kl:
            value = value + _negative_entropy(references)
        gradients = [share * scale * (a - b) for a, b in zip(sums, targets, strict=True)]
        d_scale = (pairs.image_BD * gradients[0]).sum() / scale
    return with_gradients(
        share * value, [image_BD, text_BD, logit_scale], [*gradients, d_scale.view_as(logit_scale)]
    )


def interactive_loss(
    image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, pairs: Pairs, lse_B2: Tensor
) -> Tensor:
    """Contrastive loss of each side against the reference's other side.

    Args:
        image_BD: L2-normalised image features of this process; gradients flow into them.
        text_BD: the same for text.
        logit_scale: 1 / tau.
        pairs: the model's local rows, and as those of all processes the reference's.
        lse_B2: `row_statistics` of the pairs.

    Returns:
        Mean over the local rows and both sides.
    """
    with exact():
        scale = logit_scale.detach().to(lse_B2.dtype).reshape(())
        share = 1 / (2 * len(lse_B2))
        nobody = torch.full_like(pairs.image_GD[:, :2], -torch.inf)  # the reference is no anchor
        everyone = Anchors(scale.expand_as(nobody), nobody)
        sums = weighted_sums(pairs, Anchors(scale.expand_as(lse_B2), -lse_B2), everyone)
        positives = pairs.text_GD[pairs.own], pairs.image_GD[pairs.own]
        rows = pairs.image_BD, pairs.text_BD
        gradients = [share * scale * (a - b) for a, b in zip(sums, positives, strict=True)]
        own_pairs = sum((x * y).sum() for x, y in zip(rows, positives, strict=True))
        value = share * (lse_B2.sum() - scale * own_pairs)
        d_scale = sum((x * d).sum() for x, d in zip(rows, gradients, strict=True)) / scale
    return with_gradients(
        value, [image_BD, text_BD, logit_scale], [*gradients, d_scale.view_as(logit_scale)]
    )


def _anchors(softmax: Softmax) -> tuple[Anchors, Anchors]:
    """How the local rows, and all rows, weigh their pairs: by their probability."""
    everyone = Anchors(softmax.scale.expand_as(softmax.lse_G2), -softmax.lse_G2)
    return Anchors(*(each[softmax.pairs.own] for each in everyone)), everyone


def _negative_entropy(references: Sequence[Softmax]) -> Tensor:
    """Sum of p log p over the pairs of the local rows and both sides, p being the mean of the references."""
    total = torch.zeros_like(references[0].scale)
    for side in (0, 1):
        for parts in zip(*(_log_probabilities(each, side) for each in references), strict=True):
            log_p_RC = torch.stack(parts).logsumexp(0) - math.log(len(references))
            total = total + (log_p_RC.exp() * log_p_RC).sum()
    return total


def _log_probabilities(softmax: Softmax, side: int) -> Iterator[Tensor]:
    """Log of the softmax of the local rows of a side, tile by tile."""
    pairs, scale, lse_G2 = softmax
    sides = ((pairs.image_BD, pairs.text_GD), (pairs.text_BD, pairs.image_GD))
    lse_B = lse_G2[pairs.own][:, side]
    for r, _, sim_RC in tiles(*sides[side], pairs):
        yield sim_RC * scale - lse_B[r, None]
