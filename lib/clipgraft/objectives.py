"""Objectives of training: the loss of a batch of features, over all processes; what is gathered is gathered here.

An objective takes the features of this process's part of a batch, the model's and those of its references, however they
were computed, and returns a loss whose gradients need no further collective; that is why training can encode a batch in
parts. The loss of a phase is a sum of terms, each logged by its name before it is weighted.
"""

# Shapes: B local batch, G global batch, D embedding; 2: as image and as text

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from clipgraft import dist
from clipgraft.data.loader import Batch
from clipgraft.data.memory import SampleMemory
from clipgraft.loss_settings import DistillationSettings, GammaSettings, LossSettings
from clipgraft.losses.contrastive import (
    contrastive_loss,
    guessing,
    infonce,
    log_odds,
    softmax_bias,
    softplus,
)
from clipgraft.losses.distillation import (
    Projection,
    Softmax,
    affinity_loss,
    feature_loss,
    interactive_loss,
)
from clipgraft.losses.global_contrastive import (
    diagnostics,
    global_contrastive_loss,
    log_negatives,
    own_anchors,
    tau_gradient,
)
from clipgraft.losses.inner import (
    SampleTau,
    add_eps,
    cosine_gamma,
    scent_gamma,
    updated_log_u,
    updated_tau,
)
from clipgraft.losses.pairs import Anchors, Pairs, exact, excess, row_statistics
from clipgraft.losses.siglip import siglip_loss
from clipgraft.recipes import OptimSettings


class Features(NamedTuple):
    """What the model makes of a batch.

    Attributes:
        image_BD: L2-normalised.
        text_BD: L2-normalised.
        logit_scale: 1 / tau.
        logit_bias: of models made for the sigmoid loss.
    """

    image_BD: Tensor
    text_BD: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None = None


class ReferenceFeatures(NamedTuple):
    """What a reference makes of a batch, without gradient.

    Attributes:
        image_BD: L2-normalised, of any dimension.
        text_BD: the same for text.
        scale: 1 / tau of its softmax.
    """

    image_BD: Tensor
    text_BD: Tensor
    scale: Tensor

    @classmethod
    def of_parts(cls, parts: Sequence[ReferenceFeatures]) -> ReferenceFeatures:
        """Those of a batch, from those of its parts."""
        image_BD = torch.cat([part.image_BD for part in parts])
        return cls(image_BD, torch.cat([part.text_BD for part in parts]), parts[0].scale)


class Reference(Protocol):
    """Where the features of a reference come from.

    Attributes:
        sees_images: whether it looks at the images of a batch, or has their features already.
    """

    sees_images: bool

    def features(self, images_BCHW: Tensor | None, batch: Batch) -> ReferenceFeatures:
        """Features of a part of a batch.

        Args:
            images_BCHW: augmented, in 0..255, on the device of training; None if no reference looks at them.
            batch: the part.
        """


# The loss with gradient, and numbers or lists worth logging without; the epoch, with its fraction, comes last.
Loss = tuple[Tensor, dict[str, Tensor]]
Objective = Callable[[Features, Sequence[ReferenceFeatures], Batch, float], Loss]
# The same for the loss over pairs alone: of the model, and of each reference.
PairTerm = Callable[[Features, Pairs, list[Pairs], Batch, float], Loss]


class ExtraLoss(Protocol):
    """What is added to the loss: it looks at what the model did with a batch, not at the features."""

    def read(self, model: nn.Module) -> Tensor:
        """Sums over what went through the model last, with gradient; those of parts of a batch are added."""

    def loss(self, sums: Tensor) -> Loss:
        """The loss of the sums of this process's batch, and numbers worth logging."""

    def watch(self, row: Mapping[str, Any]) -> None:
        """Look at a new row of the metrics, and warn."""


def encode(model: nn.Module, images: Tensor, text: Tensor) -> Features:
    """Features of both towers, through forward, which DDP hooks into."""
    return Features(*model(images, text))


def objective_of(
    world: dist.World,
    loss: LossSettings,
    optim: OptimSettings,
    memory: SampleMemory | None,
    num_epochs: float,
    distillation: DistillationSettings | None = None,
    projections: Sequence[Projection | None] = (),
) -> Objective:
    """The objective that the settings ask for: the loss over pairs, and what is learned from references.

    Args:
        world: this process.
        loss: of pairs.
        optim: whose betas and eps the temperatures of samples share.
        memory: from `memory_of` the same settings.
        num_epochs: of the whole training.
        distillation: weights of its terms; None is without.
        projections: for each reference that of feature distillation; None where dimensions are equal.
    """
    weights = distillation or DistillationSettings()
    pair_term = _pair_term(loss, optim, memory, num_epochs)
    needs_pairs = loss.margins == "reference" or weights.affinity or weights.interactive

    def objective(
        features: Features, references: Sequence[ReferenceFeatures], batch: Batch, epoch: float
    ) -> Loss:
        pairs = gather_pairs(world, features)
        others = [gather_pairs(world, each) for each in references] if needs_pairs else []
        value, extras = pair_term(features, pairs, others, batch, epoch)
        terms = {"pair": (loss.weight, value)}
        if weights.feature:
            terms["feature"] = weights.feature, feature_term(features, references, projections)
        if weights.affinity:
            targets = [_softmax(x, each.scale) for x, each in zip(others, references, strict=True)]
            student, is_kl = _softmax(pairs, features.logit_scale), weights.affinity_form == "kl"
            value = affinity_loss(*features[:3], student, targets, is_kl)
            terms["affinity"] = weights.affinity, value
        if weights.interactive:
            terms["interactive"] = weights.interactive, interactive_term(features, pairs, others)
        total = torch.stack([weight * term for weight, term in terms.values()]).sum()
        return total, extras | {name: term.detach() for name, (_, term) in terms.items()}

    return objective


def memory_of(loss: LossSettings, num_samples: int, temperature: float) -> SampleMemory | None:
    """What the loss remembers: log u of each side; and, if each has its own, tau and its Adam's moments."""
    if not loss.is_global:
        return None
    own_tau = [temperature] * 2 + [0.0] * 4 if loss.tau == "per_sample" else []
    return SampleMemory(num_samples, [math.nan, math.nan, *own_tau])


def feature_term(
    features: Features,
    references: Sequence[ReferenceFeatures],
    projections: Sequence[Projection | None],
) -> Tensor:
    """Feature distillation, mean over references."""
    losses = []
    for reference, projection in zip(references, projections, strict=True):
        image_BD, text_BD = features[:2] if projection is None else projection(*features[:2])
        losses.append(feature_loss(image_BD, text_BD, reference.image_BD, reference.text_BD))
    return torch.stack(losses).mean()


def interactive_term(features: Features, pairs: Pairs, others: Sequence[Pairs]) -> Tensor:
    """Interactive distillation, mean over references."""
    losses = []
    for other in others:
        crossed = replace(pairs, image_GD=other.image_GD, text_GD=other.text_GD)
        with exact():
            lse_B2, _ = row_statistics(crossed, features.logit_scale.detach())
        losses.append(interactive_loss(*features[:3], crossed, lse_B2))
    return torch.stack(losses).mean()


def _softmax(pairs: Pairs, scale: Tensor) -> Softmax:
    with exact():
        scale = scale.detach().to(pairs.image_BD.dtype).reshape(())
        lse_B2, _ = row_statistics(pairs, scale)
    return Softmax(pairs, scale, dist.gather(lse_B2))


def _pair_term(
    loss: LossSettings, optim: OptimSettings, memory: SampleMemory | None, num_epochs: float
) -> PairTerm:
    if loss.kind == "contrastive":
        return contrastive_term
    if loss.kind == "siglip":
        return siglip_term
    assert memory is not None
    return GlobalTerm(loss, optim, memory, num_epochs)


def contrastive_term(features: Features, pairs: Pairs, *_: object) -> Loss:
    """Plain contrastive training."""
    return _contrastive(features, pairs, log_odds(pairs, features.logit_scale), 0.0), {}


def siglip_term(features: Features, pairs: Pairs, *_: object) -> Loss:
    """The sigmoid loss."""
    assert features.logit_bias is not None, "start_model gives it"
    return siglip_loss(*features, pairs), {}  # type: ignore[arg-type]


class GlobalTerm:
    """A global contrastive loss, and the memory of its samples."""

    def __init__(
        self, loss: LossSettings, optim: OptimSettings, memory: SampleMemory, num_epochs: float
    ) -> None:
        """See `objective_of`."""
        self.loss, self.optim, self.memory = loss, optim, memory
        self.num_epochs = num_epochs

    def __call__(
        self, features: Features, plain: Pairs, others: list[Pairs], batch: Batch, epoch: float
    ) -> Loss:
        """Update what is remembered of the batch, then compute the loss with it."""
        kind, rho = self.loss.kind, self.loss.rho
        assert kind != "contrastive" and kind != "siglip"
        pairs = excess(plain, *others) if self.loss.margins == "reference" else plain
        known_BC = self.memory.read(batch.rows_B, pairs.image_BD.device).to(pairs.image_BD)
        with exact():
            tau_B2 = (1 / features.logit_scale.to(known_BC)).expand(len(known_BC), 2)
            own_tau = SampleTau(*known_BC[:, 2:].split(2, 1)) if kind == "rgcl" else None
            tau_B2 = tau_B2 if own_tau is None else own_tau.tau_B2
            log_g_B2, margin_B2 = log_negatives(pairs, tau_B2)
            gamma_B2 = self._gamma(known_BC[:, :2], epoch)
            log_u_B2 = updated_log_u(known_BC[:, :2], log_g_B2, gamma_B2)
            log_v_B2 = add_eps(log_u_B2, self.loss.eps)
            known = [log_u_B2]
            if own_tau is not None:
                grad_B2 = tau_gradient(tau_B2, log_g_B2, log_v_B2, margin_B2, rho)
                known += self._step_tau(own_tau, grad_B2, int(epoch))
            own = own_anchors(pairs, tau_B2, log_v_B2, kind)
            everyone = Anchors(*(dist.gather(each) for each in own))
            self.memory.write(batch.rows_B, torch.cat(known, 1))
            extras = diagnostics(pairs, tau_B2, log_g_B2, log_u_B2, log_v_B2, margin_B2)
            if pairs is not plain:
                extras["infonce"] = softplus(log_odds(plain, 1 / tau_B2)).mean()
            extras["gamma"] = gamma_B2.mean()
            if own_tau is not None:
                extras["tau_mean"] = tau_B2.mean()
        loss = global_contrastive_loss(
            features.image_BD,
            features.text_BD,
            features.logit_scale,
            pairs,
            everyone,
            log_g_B2,
            log_v_B2,
            kind=kind,
            rho=rho,
            tau_grad=self.loss.tau_grad,
        )
        return loss, extras

    def _gamma(self, log_u_B2: Tensor, epoch: float) -> Tensor:
        gamma = self.loss.gamma
        if gamma.schedule != "scent":
            rate = inner_rate(gamma, epoch, self.num_epochs)
            return log_u_B2.new_full((), rate)
        scent_B2 = scent_gamma(add_eps(log_u_B2, self.loss.eps), gamma.offset)
        return scent_B2.nan_to_num(1.0)  # not yet seen

    def _step_tau(self, own_tau: SampleTau, grad_B2: Tensor, epoch: int) -> SampleTau:
        assert self.loss.lr_tau is not None
        betas = (self.optim.beta1, self.optim.beta2)
        return updated_tau(
            own_tau, grad_B2, self.loss.lr_tau, betas, self.optim.eps, epoch, self.loss.tau_bounds
        )


def inner_rate(gamma: GammaSettings, epoch: float, num_epochs: float) -> float:
    """Gamma of all samples at an epoch, counted with its fraction; 1 in the first epoch, unless it falls by steps."""
    if gamma.schedule == "constant":
        return gamma.min if epoch >= 1 else 1.0
    when = epoch if gamma.schedule == "cosine_steps" else math.floor(epoch)
    return cosine_gamma(when, gamma.decay or num_epochs, gamma.min)


def pair_loss(world: dist.World, features: Features) -> Tensor:
    """Contrastive loss of this process's rows against the rows of all; `contrastive_loss` says the rest."""
    return contrastive_term(features, gather_pairs(world, features))[0]


def expert_loss(
    world: dist.World, features: Features, label_smoothing: float, group_G: Tensor | None
) -> Loss:
    """Contrastive loss within groups, and what tells whether there is anything to learn: InfoNCE, and that of guessing."""
    pairs = gather_pairs(world, features, group_G)
    odds_B2 = log_odds(pairs, features.logit_scale)
    loss = _contrastive(features, pairs, odds_B2, label_smoothing)
    return loss, {"infonce": infonce(pairs, odds_B2), "guessing": guessing(pairs)}


def _contrastive(
    features: Features, pairs: Pairs, odds_B2: Tensor, label_smoothing: float
) -> Tensor:
    bias_G2 = dist.gather(softmax_bias(pairs, features.logit_scale, odds_B2))
    return contrastive_loss(*features[:3], pairs, odds_B2, bias_G2, label_smoothing)


def gather_pairs(
    world: dist.World, features: Features | ReferenceFeatures, group_G: Tensor | None = None
) -> Pairs:
    """This process's features and those of all, without gradient; of the model, or of a reference."""
    image_BD, text_BD = features.image_BD.detach(), features.text_BD.detach()
    if world.size == 1:
        return Pairs.of(image_BD, text_BD, group_G=group_G)
    first_row = world.rank * len(image_BD)
    image_GD, text_GD = dist.gather(torch.cat([image_BD, text_BD], 1)).chunk(2, 1)
    return Pairs.of(image_BD, text_BD, image_GD, text_GD, first_row, group_G)
