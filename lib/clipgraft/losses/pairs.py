"""The pair engine: what every loss over all pairs of a batch needs, tile by tile, in memory O(B*D + tile).

Three decisions shape it. A loss makes two passes: row statistics (logsumexp per anchor), then sums of the other
side's features, weighted by exp(scale * similarity + bias); between the passes the caller gathers a few numbers per
row, so no collective is needed in backward. Gradients are those sums, so they are computed in forward; positives,
label smoothing and the gradient of the scale are closed forms outside of the tiles. And a reference model is nothing
but more columns: [image, -reference image] . [text, reference text] are similarities in excess of the reference's.

A process holds the exact gradient of the mean over processes of their losses, times their number, so that the average
over processes (DDP's) gives parameters the gradient of the global batch.
"""

# Shapes: B local batch, G global batch, D embedding (and the reference's beside it), V values, R and C rows and columns
# of a tile, A anchors (B or G); 2: as image and as text

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipgraft.devices import float32_products

TILES = {"cpu": (256, 2048), "cuda": (1024, 8192)}
# Similarity of a masked pair: exp gives 0, and unlike -inf it never makes a NaN.
NOT_COMPARED = -1e4


@dataclass(frozen=True)
class Pairs:
    """The pairs that a process compares: its rows of either side with all rows of the other.

    Attributes:
        image_BD: L2-normalised image features of this process, without gradient, float32 or float64.
        text_BD: the same for text; row i is the caption of image i.
        image_GD: those of all processes, this one's at rows [first_row, first_row + B).
        text_GD: the same for text.
        first_row: this process's place in the global batch.
        group_G: pairs of different groups are not compared; None compares all.
        tile: rows and columns at a time; None is what suits the device.
    """

    image_BD: Tensor
    text_BD: Tensor
    image_GD: Tensor
    text_GD: Tensor
    first_row: int = 0
    group_G: Tensor | None = None
    tile: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        image_BD: Tensor,
        text_BD: Tensor,
        image_GD: Tensor | None = None,
        text_GD: Tensor | None = None,
        first_row: int = 0,
        group_G: Tensor | None = None,
        tile: tuple[int, int] | None = None,
    ) -> Pairs:
        """Detach, and widen to float32; a process that is alone gives its own rows only."""
        image_BD, text_BD = _plain(image_BD), _plain(text_BD)
        image_GD = image_BD if image_GD is None else _plain(image_GD)
        text_GD = text_BD if text_GD is None else _plain(text_GD)
        return cls(image_BD, text_BD, image_GD, text_GD, first_row, group_G, tile)

    @property
    def is_alone(self) -> bool:
        """Whether the local batch is the global one: then a tile serves both sides."""
        return self.image_GD is self.image_BD and self.text_GD is self.text_BD

    @property
    def positive_B(self) -> Tensor:
        """Similarity of each image to its caption."""
        return (self.image_BD * self.text_BD).sum(1)

    @property
    def own(self) -> slice:
        """Where the local rows are in the global batch."""
        return slice(self.first_row, self.first_row + len(self.image_BD))


class Anchors(NamedTuple):
    """How an anchor weighs a pair: exp(scale * similarity + bias).

    Attributes:
        scale_A2: 1 / tau of each row, as image and as text.
        bias_A2: log of what its weights are multiplied by.
    """

    scale_A2: Tensor
    bias_A2: Tensor


def excess(pairs: Pairs, *references: Pairs) -> Pairs:
    """Pairs whose similarities are those of `pairs` minus the mean of the references' (each of any dimension)."""
    share = len(references) ** -0.5  # on either side
    image_BD = _beside(pairs.image_BD, [each.image_BD for each in references], -share)
    text_BD = _beside(pairs.text_BD, [each.text_BD for each in references], share)
    if pairs.is_alone:
        return replace(
            pairs, image_BD=image_BD, text_BD=text_BD, image_GD=image_BD, text_GD=text_BD
        )
    image_GD = _beside(pairs.image_GD, [each.image_GD for each in references], -share)
    text_GD = _beside(pairs.text_GD, [each.text_GD for each in references], share)
    return replace(pairs, image_BD=image_BD, text_BD=text_BD, image_GD=image_GD, text_GD=text_GD)


def _beside(features: Tensor, others: list[Tensor], factor: float) -> Tensor:
    return torch.cat([features, *(factor * each for each in others)], 1)


@contextmanager
def exact() -> Iterator[None]:
    """No gradient, no autocast, no TF32: at tau = 0.01 rounding a similarity to bfloat16 moves its logit by 0.2."""
    with float32_products(), torch.no_grad(), torch.autocast("cuda", enabled=False):
        with torch.autocast("cpu", enabled=False):
            yield


def row_statistics(
    pairs: Pairs, scale: Tensor, *, with_positives: bool = True
) -> tuple[Tensor, Tensor]:
    """First pass: logsumexp of scale * similarity over the pairs of each local row.

    Args:
        pairs: what is compared.
        scale: 1 / tau, of all rows or [B, 2].
        with_positives: whether a pair is compared with itself.

    Returns:
        The logsumexp [B, 2], and the mean [B, 2] of scale * similarity under the softmax.
    """
    scale_B2 = scale.to(pairs.image_BD.dtype).expand(len(pairs.image_BD), 2)
    image, text = (_Statistics(scale_B2[:, side]) for side in (0, 1))
    for r, c, sim_RC in tiles(pairs.image_BD, pairs.text_GD, pairs, with_positives):
        image.add(sim_RC, r, axis=1)
        if pairs.is_alone:
            text.add(sim_RC, c, axis=0)
    if not pairs.is_alone:
        for r, _, sim_RC in tiles(pairs.text_BD, pairs.image_GD, pairs, with_positives):
            text.add(sim_RC, r, axis=1)
    return torch.stack([image.lse_B, text.lse_B], 1), torch.stack([image.mean_B, text.mean_B], 1)


def weighted_sums(
    pairs: Pairs,
    own: Anchors,
    everyone: Anchors,
    *,
    with_positives: bool = True,
    values: Pairs | None = None,
) -> tuple[Tensor, Tensor]:
    """Second pass: the other side's features, weighted by both anchors of a pair, summed for each local row.

    Args:
        pairs: what is compared.
        own: the local rows as anchors.
        everyone: all rows as anchors.
        with_positives: whether a pair is compared with itself.
        values: whose features are summed; by default those that are compared.

    Returns:
        [B, V] for the images (sums of text) and for the texts (sums of images).
    """
    values = pairs if values is None else values
    image_BV, text_BV = torch.zeros_like(values.image_BD), torch.zeros_like(values.text_BD)
    for r, c, sim_RC in tiles(pairs.image_BD, pairs.text_GD, pairs, with_positives):
        weight_RC = _weights(sim_RC, own, everyone, r, c, side=0)
        image_BV[r].addmm_(weight_RC, values.text_GD[c])
        if pairs.is_alone:
            text_BV[c].addmm_(weight_RC.T, values.image_BD[r])
    if not pairs.is_alone:
        for r, c, sim_RC in tiles(pairs.text_BD, pairs.image_GD, pairs, with_positives):
            weight_RC = _weights(sim_RC, own, everyone, r, c, side=1)
            text_BV[r].addmm_(weight_RC, values.image_GD[c])
    return image_BV, text_BV


def tiles(
    rows_BD: Tensor, columns_GD: Tensor, pairs: Pairs, with_positives: bool = True
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Similarities, tile by tile, in a buffer that the next tile overwrites.

    Args:
        rows_BD: local features of one side.
        columns_GD: all features of the other side.
        pairs: which pairs are compared, and the size of the tiles.
        with_positives: whether a pair is compared with itself.

    Yields:
        Rows, columns, and their similarities.
    """
    num_rows, num_columns = pairs.tile or TILES.get(rows_BD.device.type, TILES["cuda"])
    buffer = rows_BD.new_empty(min(num_rows, len(rows_BD)) * min(num_columns, len(columns_GD)))
    for first in range(0, len(rows_BD), num_rows):
        r = slice(first, min(first + num_rows, len(rows_BD)))
        for left in range(0, len(columns_GD), num_columns):
            c = slice(left, min(left + num_columns, len(columns_GD)))
            shape = (r.stop - r.start, c.stop - c.start)
            sim_RC = buffer[: shape[0] * shape[1]].view(shape)
            torch.mm(rows_BD[r], columns_GD[c].T, out=sim_RC)
            _mask(sim_RC, pairs, r, c, with_positives)
            yield r, c, sim_RC


def with_gradients(value: Tensor, inputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """A scalar whose gradients are known already.

    Args:
        value: of the loss.
        inputs: what it depends on.
        gradients: one for each input, of its shape; a reference's columns, at the end, are cut off.
    """
    cut = [
        gradient[..., : x.shape[-1]] if x.ndim else gradient
        for x, gradient in zip(inputs, gradients, strict=True)
    ]
    loss: Tensor = _WithGradients.apply(value, *cut, *inputs)
    return loss


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: Tensor, *tensors: Tensor) -> Tensor:
        count = len(tensors) // 2
        pairs = zip(tensors[:count], tensors[count:], strict=True)
        context.save_for_backward(*(gradient.to(x.dtype) for gradient, x in pairs))
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [grad * gradient for gradient in context.saved_tensors]
        return (None, *[None for _ in gradients], *gradients)


class _Statistics:
    """Logsumexp and mean under the softmax, of each row, over tiles as they come."""

    def __init__(self, scale_B: Tensor) -> None:
        self.scale_B = scale_B
        self.lse_B = torch.full_like(scale_B, -torch.inf)
        self.mean_B = torch.zeros_like(scale_B)

    def add(self, sim_RC: Tensor, own: slice, axis: int) -> None:
        scale = self.scale_B[own].unsqueeze(axis)
        top = sim_RC.amax(axis, keepdim=True)
        shifted_RC = (sim_RC - top).mul_(scale)
        p_RC = shifted_RC.exp()
        sum_R = p_RC.sum(axis)
        mean_R = p_RC.mul_(shifted_RC).sum(axis) / sum_R
        offset_R = (top * scale).squeeze(axis)
        lse_R = torch.logaddexp(before_R := self.lse_B[own], more_R := sum_R.log() + offset_R)
        old_R, new_R = (before_R - lse_R).exp(), (more_R - lse_R).exp()
        self.mean_B[own] = old_R * self.mean_B[own] + new_R * (mean_R + offset_R)
        self.lse_B[own] = lse_R


def _mask(sim_RC: Tensor, pairs: Pairs, r: slice, c: slice, with_positives: bool) -> None:
    offset = pairs.first_row + r.start - c.start
    if not with_positives and -sim_RC.shape[0] < offset < sim_RC.shape[1]:
        sim_RC.diagonal(offset).fill_(NOT_COMPARED)
    if pairs.group_G is not None:
        group_R = pairs.group_G[pairs.own][r]
        sim_RC.masked_fill_(group_R[:, None] != pairs.group_G[c], NOT_COMPARED)


def _weights(
    sim_RC: Tensor, own: Anchors, everyone: Anchors, r: slice, c: slice, side: int
) -> Tensor:
    """Weights of both anchors of a pair; rows are of `side`, columns of the other one. Overwrites the tile."""
    weight_RC = (sim_RC * everyone.scale_A2[c, 1 - side]).add_(everyone.bias_A2[c, 1 - side]).exp_()
    sim_RC.mul_(own.scale_A2[r, side, None]).add_(own.bias_A2[r, side, None]).exp_()
    return weight_RC.add_(sim_RC)


def _plain(features: Tensor) -> Tensor:
    return features.detach().to(torch.promote_types(features.dtype, torch.float32)).contiguous()
