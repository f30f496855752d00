"""Texts without their padding: which tokens count, and the batch with these alone, one text behind another.

Where nothing that is used depends on what follows an end token, blocks may compute the rest alone. Products and norms
do not ask which text a token is of; attention does, and gets the batch back as it was. Rows go there and back by places
that are found on the host, forward and backward, never by sums in the order in which threads arrive.
"""

# Shapes: B texts, L tokens of each with padding, N = B * L, T <= N tokens that are kept, D width, P picked rows, R rows

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipgraft import devices

VARIABLE = "CLIPGRAFT_PACK_TEXTS"
_LEAST_STEP, _STEPS = 32, 32  # rows; of a large batch, that are at least so many
_WORTH = 7 / 8  # of the tokens: what is saved has to pay for the way there and back


class Packing(NamedTuple):
    """Where the tokens of a batch are that are kept, and where they were.

    Attributes:
        kept_T: their places in the flattened batch.
        place_N: the way back: of each token its number among them; of those left out T.
        end_B: numbers of the end tokens among them.
        shape: B and L.
    """

    kept_T: Tensor
    place_N: Tensor
    end_B: Tensor
    shape: tuple[int, int]

    def pack(self, x_BLD: Tensor) -> Tensor:
        """The tokens that are kept, as one text, [1, T, D]."""
        return pick_rows(x_BLD.flatten(0, 1), self.kept_T, self.place_N)[None]

    def unpack(self, x_1TD: Tensor) -> Tensor:
        """The way back, [B, L, D]: zeros for those left out."""
        return with_padding(x_1TD[0], self.kept_T, self.place_N).view(*self.shape, -1)


def packing(text_BL: Tensor, device: torch.device) -> Packing | None:
    """How to leave out the padding of texts that are still on the host.

    The number of tokens is rounded up with some of the padding, so that numbers repeat: oneDNN makes a kernel for each
    shape that it meets, and a GPU's memory is given out in pieces that were used before.

    Args:
        text_BL: token ids, padded behind the end token.
        device: that computes.

    Returns:
        None if so few are left out that it does not pay, or where CLIPGRAFT_PACK_TEXTS=0.
    """
    if os.environ.get(VARIABLE) == "0":
        return None
    end_B, num = text_BL.argmax(1), text_BL.numel()
    is_real_N = _is_up_to(end_B, text_BL).flatten()
    num_real = int(is_real_N.sum())
    step = 1 << max(num // _STEPS, _LEAST_STEP).bit_length() - 1
    num_kept = -(-num_real // step) * step
    if num_kept >= _WORTH * num:
        return None
    is_padding_N = ~is_real_N
    is_kept_N = is_real_N | (is_padding_N & (is_padding_N.cumsum(0) <= num_kept - num_real))
    kept_T, place_N = places(is_kept_N)
    end_B = place_N[torch.arange(len(end_B)) * text_BL.shape[1] + end_B]
    kept_T, place_N, end_B = (devices.send(x, device) for x in (kept_T, place_N, end_B))
    return Packing(kept_T, place_N, end_B, (len(text_BL), text_BL.shape[1]))


def places(is_kept_N: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tokens are that are kept, and the way back: of each its number among them, of the others T."""
    kept_T = is_kept_N.nonzero().squeeze(1)
    return kept_T, (is_kept_N.cumsum(0) - 1).where(is_kept_N, len(kept_T))


def real_tokens(text_BL: Tensor) -> Tensor:
    """Padding follows the end token, the highest id. Id 0 alone is no sign of it: it is "!"."""
    return _is_up_to(text_BL.argmax(1), text_BL)


def _is_up_to(end_B: Tensor, text_BL: Tensor) -> Tensor:
    return torch.arange(text_BL.shape[1], device=text_BL.device) <= end_B[:, None]


def pick_rows(y_RD: Tensor, place_P: Tensor, number_R: Tensor) -> Tensor:
    """The rows at these places, [P, D]; `number_R` has of each row its number among them, of those left out P."""
    return _Pick.apply(y_RD, place_P, number_R)


def with_padding(y_TD: Tensor, kept_T: Tensor, place_N: Tensor) -> Tensor:
    """Rows put back to where they were picked from, [N, D]: zeros for those left out."""
    return _Lengthen.apply(y_TD, kept_T, place_N)


class _Pick(torch.autograd.Function):
    """Rows at P places; backward, each to its place, zeros to the rows whose number is P, nobody's."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, place_P: Tensor, number_R: Tensor) -> Tensor:
        ctx.save_for_backward(number_R)
        return y_RD.index_select(0, place_P)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:
        (number_R,) = ctx.saved_tensors
        if len(number_R) == len(grad_PD):
            return grad_PD.index_select(0, number_R), None, None
        return _with_zeros(grad_PD, number_R), None, None


class _Lengthen(torch.autograd.Function):
    """Rows with zeros for padding; backward, without it."""

    @staticmethod
    def forward(ctx: Any, y_TD: Tensor, kept_T: Tensor, place_N: Tensor) -> Tensor:
        ctx.save_for_backward(kept_T)
        return _with_zeros(y_TD, place_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (kept_T,) = ctx.saved_tensors
        return grad_ND.index_select(0, kept_T), None, None


def _with_zeros(y_TD: Tensor, place_N: Tensor) -> Tensor:
    """Rows at these places, zeros for place T. Choosing them takes a CPU a seventh of the time of putting them there."""
    return torch.cat([y_TD, y_TD.new_zeros(1, y_TD.shape[1])]).index_select(0, place_N)
