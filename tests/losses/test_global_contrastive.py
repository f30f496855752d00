"""Global contrastive losses where it is hard: small tau, features that collapse, margins in excess of a reference's.

Where the inner rate is 1, u is the batch's own g and the loss has a closed form, whose gradients autograd knows.
"""

# Shapes: G global batch; 2: as image and as text

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_pairs import (
    EPS,
    RHO,
    D,
    G,
    contrastive,
    features,
    global_loss,
    gradients,
    scale_of,
    siglip,
)
from torch import Tensor

from clipgraft.losses.global_contrastive import diagnostics, log_negatives
from clipgraft.losses.inner import add_eps
from clipgraft.losses.pairs import Pairs

KINDS = ["gcl", "rgcl", "rgcl_g"]
TAUS = [0.005, 0.01, 0.07, 1.0]
SIGNS = torch.tensor([1.0, -1, 1, -1, 1, -1])[:, None]
ONES = F.normalize(torch.ones(G, D), dim=1)
AXES = torch.eye(G)
CROSSED = AXES[[1, 0, 3, 2, 5, 4]]  # each image has its neighbour's caption
HARD = {
    "all equal": (ONES, ONES),
    "all opposite": (ONES, -ONES),
    "two kinds": (SIGNS * ONES, SIGNS * ONES),
    "two kinds, opposite": (SIGNS * ONES, -SIGNS * ONES),
    "each apart": (AXES, AXES),
    "each its own opposite": (AXES, -AXES),
    "captions crossed": (AXES, CROSSED),
    "captions crossed and turned": (AXES, -CROSSED),
}


def log_g_of(sim_GG: Tensor, tau_G2: Tensor) -> Tensor:
    """Log of the mean of exp(margin / tau) over negatives, from the whole matrix."""
    positive_G1 = sim_GG.diagonal()[:, None]
    is_own = torch.eye(G, dtype=torch.bool)
    sides = [
        ((side - positive_G1) / tau_G1).masked_fill(is_own, -math.inf).logsumexp(1)
        for side, tau_G1 in zip((sim_GG, sim_GG.T), tau_G2[:, None].unbind(2), strict=True)
    ]
    return torch.stack(sides, 1) - math.log(G - 1)


def closed_form(image, text, tau_G2, kind, reference=None, eps=EPS) -> Tensor:
    sim_GG = image @ text.T
    if reference is not None:
        sim_GG = sim_GG - reference[0] @ reference[1].T
    log_v_G2 = torch.logaddexp(
        log_g_of(sim_GG, tau_G2), torch.tensor(math.log(eps), dtype=torch.float64)
    )
    return log_v_G2.mean() if kind == "gcl" else (tau_G2 * (log_v_G2 + RHO)).mean()


def own_taus(tau: float) -> Tensor:
    return torch.linspace(tau, min(1.0, 3 * tau), 2 * G, dtype=torch.float64).reshape(G, 2)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize("has_reference", [False, True])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("kind", KINDS)
def test_with_rate_one_gradients_are_those_of_the_closed_form(kind, tau, has_reference, dtype, rel):
    image, text = features(dtype=dtype)
    reference = [x.detach() for x in features(7, 3, dtype)] if has_reference else None
    scale, taus = scale_of(tau, dtype), own_taus(tau).to(dtype)
    ours, d_tau = global_loss(
        image, text, scale, kind, reference=reference, tau=taus if kind == "rgcl" else None
    )
    wide = [x.detach().double().requires_grad_() for x in (image, text, scale, taus)]
    tau_G2 = wide[3] if kind == "rgcl" else (1 / wide[2]).expand(G, 2)
    theirs = None if reference is None else [x.double() for x in reference]
    form = closed_form(*wide[:2], tau_G2, kind, theirs)
    assert ours.item() == pytest.approx(form.item(), rel=rel)
    if kind == "rgcl":
        found = [*gradients(ours, image, text), d_tau / (2 * G)]
        expected = gradients(form, *wide[:2], wide[3])
    else:
        found, expected = gradients(ours, image, text, scale), gradients(form, *wide[:3])
    # The gradient of tau is a small difference of two terms that are as large as the loss.
    slack = 0.05 * rel * tau * abs(form.item())
    for our, its in zip(found, expected, strict=True):
        assert (our.double() - its).norm() <= rel * its.norm() + (0 if its.ndim else slack)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("kind", ["contrastive", "siglip", *KINDS])
def test_the_gradient_of_tau_is_the_slope_of_the_loss(kind, tau):
    image, text = features()

    def loss_at(scale: Tensor) -> Tensor:
        if kind == "contrastive":
            return contrastive(image, text, scale)
        if kind == "siglip":
            return siglip(image, text, scale, torch.tensor(-2.0, dtype=torch.float64))
        return global_loss(image, text, scale, kind)[0]

    scale = scale_of(tau)
    step = 1e-5 * scale.item()
    if kind == "rgcl":  # each sample has its own; here all are moved
        slope = -global_loss(image, text, scale, kind)[1].mean() / scale.detach() ** 2
    else:
        (slope,) = gradients(loss_at(scale), scale)
    above, below = (loss_at((scale + sign * step).detach()).item() for sign in (1, -1))
    assert slope.item() == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("other", [None, *HARD])
@pytest.mark.parametrize("name", HARD)
def test_hard_features_have_the_closed_forms_loss_and_finite_gradients(name, other, tau):
    """Margins of up to 2 / tau = 400, and twice that in excess of a reference's."""
    reference = None if other is None else HARD[other]
    for kind in KINDS:
        image, text = (x.clone().requires_grad_() for x in HARD[name])
        scale, taus = scale_of(tau, torch.float32), torch.full((G, 2), tau)
        form = closed_form(
            *(x.double() for x in HARD[name]),
            taus.double(),
            kind,
            None if reference is None else [x.double() for x in reference],
            eps=1e-14,
        )
        for log_u in (None, -1e3, 300.0):
            stale = None if log_u is None else torch.full((G, 2), log_u)
            gamma = 1.0 if log_u is None else 0.1
            change = {"log_u": stale, "gamma": gamma, "reference": reference, "eps": 1e-14}
            loss, d_tau = global_loss(image, text, scale, kind, tau=taus, **change)
            found = gradients(loss, image, text)
            assert loss.isfinite() and d_tau.isfinite().all()
            assert all(d.isfinite().all() for d in found)
            if log_u is None:
                assert loss.item() == pytest.approx(form.item(), rel=1e-4, abs=1e-4)


def test_what_is_logged_is_what_it_says():
    image, text = (x.detach() for x in features())
    tau, log_u = (
        own_taus(0.1),
        torch.randn(G, 2, generator=torch.Generator().manual_seed(1)).double(),
    )
    pairs = Pairs.of(image, text, tile=(2, 4))
    log_g, margin = log_negatives(pairs, tau)
    said = diagnostics(pairs, tau, log_g, log_u, add_eps(log_g, 1e-300), margin)
    expected = {"infonce": 0.0, "gcl": 0.0, "kl": 0.0, "drift": 0.0}
    for side, sims in enumerate((image @ text.T, text @ image.T)):
        for i in range(G):
            exps = [math.exp(float(sims[i, j] - sims[i, i]) / tau[i, side]) for j in range(G)]
            negatives = [x for j, x in enumerate(exps) if j != i]
            g, weights = sum(negatives) / (G - 1), [x / sum(negatives) for x in negatives]
            expected["infonce"] += math.log(sum(exps))
            expected["gcl"] += tau[i, side].item() * math.log(g)
            expected["kl"] += sum(w * math.log(w * (G - 1)) for w in weights)
            expected["drift"] += abs(math.log(g) - log_u[i, side].item())
    for key, total in expected.items():
        assert said[key].item() == pytest.approx(total / (2 * G), rel=1e-10), key
