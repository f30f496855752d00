"""What a global contrastive loss remembers of a sample, and how a visit changes it: log u, and maybe tau.

u is the inner estimate of g, the mean of exp(margin / tau) over all negatives in the data (FastCLIP,
arXiv:2407.01445, section 3). It is kept as log u, because u itself over- and underflows float32 at small tau; NaN is
"not yet seen". eps is added where u is used, so it can be changed without touching what is remembered.
"""

# Shapes: B local batch; 2: as image and as text

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

GRAD_TAU_BOUND = 5.0  # FastCLIP clamps the gradient of a sample's tau


def updated_log_u(log_u_B2: Tensor, log_g_B2: Tensor, gamma_B2: Tensor) -> Tensor:
    """Update in logs: u <- (1 - gamma) u + gamma g (FastCLIP, Alg. 1); a sample that is seen first takes g.

    Args:
        log_u_B2: as remembered; NaN if not yet seen.
        log_g_B2: of this batch.
        gamma_B2: inner rate, of all or of each.
    """
    moved_B2 = torch.logaddexp(log_u_B2 + torch.log1p(-gamma_B2), log_g_B2 + gamma_B2.log())
    return torch.where(log_u_B2.isnan(), log_g_B2, moved_B2)


def add_eps(log_u_B2: Tensor, eps: float) -> Tensor:
    """log(eps + u), which is what the loss divides by and takes the logarithm of."""
    return torch.logaddexp(log_u_B2, torch.full_like(log_u_B2, math.log(eps)))


def cosine_gamma(epoch: float, decay: float, gamma_min: float) -> float:
    """Inner rate that falls from 1 to `gamma_min` over `decay` epochs, and stays there."""
    if epoch >= decay:
        return gamma_min
    return gamma_min + (1 - gamma_min) * (1 + math.cos(math.pi * epoch / decay)) / 2


def scent_gamma(log_v_B2: Tensor, offset: float) -> Tensor:
    """Inner rate of each sample: sigmoid(log(eps + u) + offset) (SCENT, arXiv:2602.02877)."""
    return torch.sigmoid(log_v_B2 + offset)


class SampleTau(NamedTuple):
    """Temperature of each sample and side, and the moments of its Adam."""

    tau_B2: Tensor
    mean_B2: Tensor
    square_B2: Tensor


def updated_tau(
    state: SampleTau,
    grad_B2: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    epoch: int,
    bounds: tuple[float, float],
) -> SampleTau:
    """One Adam step of every tau of a batch, as FastCLIP v2 takes it.

    A sample is visited once per epoch, so epoch + 1 corrects the bias; in epoch 0 both betas are 0, which makes a
    step of size `lr` in the direction of the sign.
    """
    beta1, beta2 = betas if epoch > 0 else (0.0, 0.0)
    grad_B2 = grad_B2.clamp(-GRAD_TAU_BOUND, GRAD_TAU_BOUND)
    mean_B2 = beta1 * state.mean_B2 + (1 - beta1) * grad_B2
    square_B2 = beta2 * state.square_B2 + (1 - beta2) * grad_B2.square()
    corrected_B2 = (square_B2 / (1 - beta2 ** (epoch + 1))).sqrt()
    step_B2 = mean_B2 / (1 - beta1 ** (epoch + 1)) / (corrected_B2 + eps)
    return SampleTau((state.tau_B2 - lr * step_B2).clamp(*bounds), mean_B2, square_B2)
