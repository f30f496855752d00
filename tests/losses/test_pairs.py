"""Losses over all pairs of a batch, and their gradients, against definitions that loop over one pair at a time."""

# Shapes: B local batch, G global batch, D embedding; 2: as image and as text

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipgraft.losses.contrastive import contrastive_loss, log_odds, softmax_bias
from clipgraft.losses.distillation import (
    Projection,
    Softmax,
    affinity_loss,
    feature_loss,
    interactive_loss,
)
from clipgraft.losses.global_contrastive import (
    global_contrastive_loss,
    log_negatives,
    own_anchors,
    tau_gradient,
)
from clipgraft.losses.inner import add_eps, updated_log_u
from clipgraft.losses.pairs import Anchors, Pairs, exact, excess, row_statistics
from clipgraft.losses.siglip import siglip_loss

G, D = 6, 5
Loop = Callable[..., Tensor]


def features(seed: int = 0, dim: int = D, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, G, dim, generator=generator, dtype=torch.float64)
    return [F.normalize(each, dim=1).to(dtype).requires_grad_() for each in drawn]


def scale_of(tau: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(1 / tau, dtype=dtype, requires_grad=True)


def split(image: Tensor, text: Tensor, num_ranks: int, tile=None, group_G=None):
    """Each emulated process's rows, and its pairs."""
    num = len(image) // num_ranks
    rows = [slice(first, first + num) for first in range(0, len(image), num)]
    whole = (None, None) if num_ranks == 1 else (image, text)
    return [(r, Pairs.of(image[r], text[r], *whole, r.start, group_G, tile)) for r in rows]


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors))


def assert_same(ours: list[Tensor], loop: list[Tensor], rel: float) -> None:
    for our, its in zip(ours, loop, strict=True):
        assert (our.double() - its).norm() <= rel * its.norm() + rel * 1e-3


# --- minibatch contrastive ----------------------------------------------------------------------------------


def contrastive(image, text, scale, num_ranks=1, tile=None, smoothing=0.0, group_G=None) -> Tensor:
    ranks = split(image, text, num_ranks, tile, group_G)
    odds = [log_odds(pairs, scale) for _, pairs in ranks]
    bias = torch.cat(
        [softmax_bias(pairs, scale, odd) for (_, pairs), odd in zip(ranks, odds, strict=True)]
    )
    losses = [
        contrastive_loss(image[r], text[r], scale, pairs, odd, bias, smoothing)
        for (r, pairs), odd in zip(ranks, odds, strict=True)
    ]
    return torch.stack(losses).mean()


def contrastive_loop(image, text, scale, smoothing, groups) -> Tensor:
    total, num_counted = torch.zeros((), dtype=torch.float64), 0
    for rows, columns in ((image, text), (text, image)):
        for i in range(G):
            allowed = [j for j in range(G) if groups[j] == groups[i]]
            if len(allowed) > 1:
                logits = {j: scale * (rows[i] * columns[j]).sum() for j in allowed}
                log_sum = sum(torch.exp(logit) for logit in logits.values()).log()
                spread = sum(log_sum - logits[j] for j in allowed) / len(allowed)
                total = total + (1 - smoothing) * (log_sum - logits[i]) + smoothing * spread
                num_counted += 1
    return total / max(1, num_counted)


@pytest.mark.parametrize("groups", [[0] * G, [0, 1, 0, 0, 2, 1]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_contrastive_is_its_definition_on_any_number_of_processes(num_ranks, smoothing, groups):
    group_G = torch.tensor(groups) if len(set(groups)) > 1 else None
    for dtype, rel in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = [*features(dtype=dtype), scale_of(0.05, dtype)]
        wide = [x.detach().double().requires_grad_() for x in inputs]
        loop = contrastive_loop(*wide, smoothing, groups)
        ours = contrastive(*inputs, num_ranks, (2, 4), smoothing, group_G)
        assert ours.item() == pytest.approx(loop.item(), rel=rel)
        assert_same(gradients(ours, *inputs), gradients(loop, *wide), rel)


@pytest.mark.parametrize("tau", [0.02, 1.0])
def test_a_loss_close_to_zero_keeps_its_digits_in_float32(tau):
    image = F.normalize(
        torch.eye(G) + 0.1 * features(dtype=torch.float32, dim=G)[0].detach(), dim=1
    )
    text = F.normalize(image + 0.02 * features(3, G, torch.float32)[1].detach(), dim=1)
    inputs = [image.requires_grad_(), text.requires_grad_(), scale_of(tau, torch.float32)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    ours, loop = contrastive(*inputs), contrastive(*wide)
    assert tau == 1 or 0 < loop.item() < 1e-15
    assert ours.item() == pytest.approx(loop.item(), rel=1e-4)
    for our, its in zip(gradients(ours, *inputs), gradients(loop, *wide), strict=True):
        assert (our.double() - its).norm() <= 1e-4 * its.norm()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_size_of_the_tiles_does_not_matter(num_ranks):
    inputs = [*features(), scale_of(0.03)]
    whole = gradients(contrastive(*inputs, num_ranks), *inputs)
    for tile in ((1, 1), (2, 3), (4, 2), (5, 100)):
        assert_same(gradients(contrastive(*inputs, num_ranks, tile), *inputs), whole, 1e-13)


def test_the_mean_logit_is_that_under_the_softmax():
    image, text = features()
    image, text = image.detach(), text.detach()
    lse, mean = row_statistics(Pairs.of(image, text, tile=(2, 2)), torch.tensor(9.0))
    for side, (rows, columns) in enumerate(((image, text), (text, image))):
        for i in range(G):
            logits = [9.0 * float(rows[i] @ columns[j]) for j in range(G)]
            total = sum(map(math.exp, logits))
            assert lse[i, side].item() == pytest.approx(math.log(total), rel=1e-12)
            expected = sum(math.exp(x) * x for x in logits) / total
            assert mean[i, side].item() == pytest.approx(expected, rel=1e-11)


# --- global contrastive -------------------------------------------------------------------------------------

RHO, EPS = 3.0, 1e-3


def global_loss(
    image, text, scale, kind, *, num_ranks=1, log_u=None, gamma=1.0, reference=None, tau=None,
    tau_grad="exact", tile=(2, 4), eps=EPS,
):  # fmt: skip
    """Loss and the temperature's gradient of each sample, of the mean over processes."""
    ranks = split(image, text, num_ranks, tile)
    if reference is not None:
        others = split(*reference, num_ranks)
        ranks = [
            (r, excess(pairs, other)) for (r, pairs), (_, other) in zip(ranks, others, strict=True)
        ]
    log_u = torch.full((len(image), 2), math.nan, dtype=image.dtype) if log_u is None else log_u
    tau = (1 / scale.detach()).expand(len(image), 2) if tau is None else tau
    seen, anchors = [], []
    for r, pairs in ranks:
        log_g, margin = log_negatives(pairs, tau[r])
        gamma_ = torch.tensor(gamma, dtype=log_g.dtype)
        log_v = add_eps(updated_log_u(log_u[r], log_g, gamma_), eps)
        seen.append((log_g, log_v, margin))
        anchors.append(own_anchors(pairs, tau[r], log_v, kind))
    everyone = Anchors(*map(torch.cat, zip(*anchors, strict=True)))
    losses = [
        global_contrastive_loss(
            image[r], text[r], scale, pairs, everyone, log_g, log_v, kind=kind, rho=RHO, tau_grad=tau_grad
        )
        for (r, pairs), (log_g, log_v, _) in zip(ranks, seen, strict=True)
    ]  # fmt: skip
    d_tau = [tau_gradient(tau[r], *rest, RHO) for (r, _), rest in zip(ranks, seen, strict=True)]
    return torch.stack(losses).mean(), torch.cat(d_tau)


def global_loop(image, text, tau, kind, *, log_u=None, gamma=1.0, reference=None, tau_grad="exact"):
    """The published estimator: u is a constant, and g / (eps + u) stands for log(eps + g)."""
    total = torch.zeros((), dtype=torch.float64)
    surrogate = torch.zeros((), dtype=torch.float64)
    sims = [[(image[i] * text[j]).sum() for j in range(G)] for i in range(G)]
    if reference is not None:
        sims = [
            [sims[i][j] - (reference[0][i] * reference[1][j]).sum() for j in range(G)]
            for i in range(G)
        ]
    for side in (0, 1):
        for i in range(G):
            tau_i = tau[i, side] if tau.ndim else tau
            others = [sims[i][j] if side == 0 else sims[j][i] for j in range(G) if j != i]
            g = sum(torch.exp((other - sims[i][i]) / tau_i) for other in others) / (G - 1)
            first = log_u is None or math.isnan(log_u[i, side])
            u = g.item() if first else (1 - gamma) * math.exp(log_u[i, side]) + gamma * g.item()
            log_v = math.log(EPS + u)
            if kind == "gcl":
                total, surrogate = total + log_v, surrogate + g / (EPS + u)
                continue
            pairs = tau_i.detach() * g / (EPS + u)
            if tau_grad == "fastclip":  # in the code both passes give tau a gradient
                pairs = pairs + (pairs - pairs_without_tau(others, sims[i][i], tau_i, EPS + u))
            total = total + tau_i.item() * (log_v + RHO)
            surrogate = surrogate + pairs + tau_i * (log_v + RHO)
    return total / (2 * G), surrogate / (2 * G)


def pairs_without_tau(others, positive, tau, v):
    """The same value and gradient of features, none of tau."""
    tau = tau.detach()
    return tau * sum(torch.exp((other - positive) / tau) for other in others) / (G - 1) / v


STALE = torch.tensor(
    [[0.3, -1.0], [math.nan] * 2, [2.0, -9.0], [0.0, 0.5], [1.0, 1.0], [-3.0, 4.0]]
)


@pytest.mark.parametrize("has_reference", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("kind", ["gcl", "rgcl_g"])
def test_global_contrastive_is_its_definition_on_any_number_of_processes(
    kind, num_ranks, has_reference
):
    for dtype, rel in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = [*features(dtype=dtype), scale_of(0.1, dtype)]
        wide = [x.detach().double().requires_grad_() for x in inputs]
        reference = features(7, 3, dtype) if has_reference else None
        theirs = [x.detach().double() for x in reference] if has_reference else None
        for log_u, gamma in ((None, 1.0), (STALE.to(dtype), 0.3)):
            change = {"log_u": log_u, "gamma": gamma}
            ours, _ = global_loss(*inputs, kind, num_ranks=num_ranks, reference=reference, **change)
            value, surrogate = global_loop(*wide[:2], 1 / wide[2], kind, reference=theirs, **change)
            assert ours.item() == pytest.approx(value.item(), rel=rel)
            assert_same(gradients(ours, *inputs), gradients(surrogate, *wide), rel)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_temperature_per_sample_is_its_definition_on_any_number_of_processes(num_ranks):
    image, text = features()
    tau = torch.linspace(0.05, 0.4, 2 * G, dtype=torch.float64).reshape(G, 2)
    wanted = tau.clone().requires_grad_()
    ours, d_tau = global_loss(
        image, text, scale_of(0.1), "rgcl", num_ranks=num_ranks, tau=tau, log_u=STALE.double(),
        gamma=0.3,
    )  # fmt: skip
    value, surrogate = global_loop(image, text, wanted, "rgcl", log_u=STALE.double(), gamma=0.3)
    assert ours.item() == pytest.approx(value.item(), rel=1e-12)
    *loop, loop_tau = gradients(surrogate, image, text, wanted)
    assert_same(gradients(ours, image, text), loop, 1e-12)
    assert_same([d_tau], [2 * G * loop_tau], 1e-12)


def test_the_published_tau_gradient_counts_the_pairs_twice():
    inputs = [*features(), scale_of(0.1)]
    change = {"log_u": STALE.double(), "gamma": 0.3, "tau_grad": "fastclip"}
    ours, _ = global_loss(*inputs, "rgcl_g", num_ranks=2, **change)
    _, surrogate = global_loop(*inputs[:2], 1 / inputs[2], "rgcl_g", **change)
    ours, loop = gradients(ours, *inputs), gradients(surrogate, *inputs)
    assert_same(ours[2:], loop[2:], 1e-12)
    assert_same(ours[:2], loop[:2], 1e-12)


@pytest.mark.parametrize("kind", ["gcl", "rgcl_g"])
def test_the_tau_gradient_is_the_slope_of_the_loss(kind):
    image, text = features()
    scale, step = scale_of(0.1), 1e-4
    loss, _ = global_loss(image, text, scale, kind)
    above, below = (
        global_loss(image, text, (scale + sign * step).detach(), kind)[0].item() for sign in (1, -1)
    )
    (slope,) = gradients(loss, scale)
    assert slope.item() == pytest.approx((above - below) / (2 * step), rel=1e-7)


def test_a_samples_tau_gradient_is_the_slope_of_the_loss():
    image, text = features()
    tau = torch.linspace(0.05, 0.4, 2 * G, dtype=torch.float64).reshape(G, 2)
    _, d_tau = global_loss(image, text, scale_of(0.1), "rgcl", tau=tau)
    for row, side in ((0, 0), (3, 1)):
        bump = torch.zeros_like(tau)
        bump[row, side] = 1e-5
        above, below = (
            global_loss(image, text, scale_of(0.1), "rgcl", tau=moved)[0].item()
            for moved in (tau + bump, tau - bump)
        )
        slope = 2 * G * (above - below) / 2e-5
        assert d_tau[row, side].item() == pytest.approx(slope, rel=1e-6)


def test_with_rate_one_and_eps_of_the_positive_it_is_the_contrastive_loss():
    image, text = features()
    scale, eps = scale_of(0.2), 1 / (G - 1)  # log(1/(G-1) + g) = InfoNCE - log(G-1)
    ours, _ = global_loss(image, text, scale, "gcl", eps=eps)
    infonce = contrastive(image, text, scale)
    assert ours.item() == pytest.approx(infonce.item() - math.log(G - 1), rel=1e-12)
    inputs = (image, text, scale)
    assert_same(gradients(ours, *inputs), gradients(infonce, *inputs), 1e-12)


@pytest.mark.parametrize("tau", [0.005, 0.01, 0.07, 1.0])
@pytest.mark.parametrize("kind", ["contrastive", "gcl", "rgcl", "rgcl_g", "siglip"])
def test_features_that_collapse_or_oppose_give_finite_losses_and_gradients(kind, tau):
    ones = F.normalize(torch.ones(G, D), dim=1)
    signs = torch.tensor([1.0, -1, 1, -1, 1, -1])[:, None]
    drawn = [x.detach() for x in features(dtype=torch.float32)]
    for image, text in ((ones, ones), (ones, -ones), (signs * ones, -signs * ones), drawn):
        inputs = [image.clone().requires_grad_(), text.clone().requires_grad_()]
        scale = scale_of(tau, torch.float32)
        for log_u in (None, torch.full((G, 2), -80.0), torch.full((G, 2), 300.0)):
            if kind == "contrastive":
                loss = contrastive(*inputs, scale)
            elif kind == "siglip":
                loss = siglip(*inputs, scale, torch.tensor(-10.0, requires_grad=True))
            else:
                loss, _ = global_loss(*inputs, scale, kind, log_u=log_u, gamma=0.1, eps=1e-14)
            assert loss.isfinite()
            assert all(d.isfinite().all() for d in gradients(loss, *inputs))


# --- sigmoid and distillation -------------------------------------------------------------------------------


def siglip(image, text, scale, bias, num_ranks=1) -> Tensor:
    ranks = split(image, text, num_ranks, (2, 4))
    losses = [siglip_loss(image[r], text[r], scale, bias, pairs) for r, pairs in ranks]
    return torch.stack(losses).mean()


def siglip_loop(image, text, scale, bias) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i in range(G):
        for j in range(G):
            sign = 1 if i == j else -1
            logit = scale * (image[i] * text[j]).sum() + bias
            total = total + torch.log(1 + torch.exp(-sign * logit))
    return total / G


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_sigmoid_is_its_definition_on_any_number_of_processes(num_ranks):
    for dtype, rel in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        bias = torch.tensor(-2.0, dtype=dtype, requires_grad=True)
        inputs = [*features(dtype=dtype), scale_of(0.2, dtype), bias]
        wide = [x.detach().double().requires_grad_() for x in inputs]
        ours, loop = siglip(*inputs, num_ranks), siglip_loop(*wide)
        assert ours.item() == pytest.approx(loop.item(), rel=rel)
        assert_same(gradients(ours, *inputs), gradients(loop, *wide), rel)


def softmaxes(ranks, scale) -> list[Softmax]:
    lse = torch.cat([row_statistics(pairs, scale.detach())[0] for _, pairs in ranks])
    return [Softmax(pairs, scale.detach(), lse) for _, pairs in ranks]


def affinity(image, text, scale, references, scales, num_ranks, is_kl, tile=(2, 4)) -> Tensor:
    ranks = split(image, text, num_ranks, tile)
    ours = softmaxes(ranks, scale)
    others = [
        softmaxes(split(*reference, num_ranks, (3, 2)), its)
        for reference, its in zip(references, scales, strict=True)
    ]
    losses = [
        affinity_loss(image[r], text[r], scale, ours[k], [each[k] for each in others], is_kl)
        for k, (r, _) in enumerate(ranks)
    ]
    return torch.stack(losses).mean()


def affinity_loop(image, text, scale, references, scales, is_kl) -> Tensor:
    """One pair at a time: the references' probabilities are averaged, then compared."""
    total = torch.zeros((), dtype=torch.float64)
    for rows, columns, side in ((image, text, 0), (text, image, 1)):
        for i in range(G):
            logit = torch.stack([scale * (rows[i] * columns[j]).sum() for j in range(G)])
            p = [0.0] * G
            for reference, its in zip(references, scales, strict=True):
                weight = [
                    math.exp(its.item() * float(reference[side][i] @ reference[1 - side][j]))
                    for j in range(G)
                ]
                p = [p[j] + weight[j] / sum(weight) / len(references) for j in range(G)]
            for j in range(G):
                total = total - p[j] * (logit[j] - logit.exp().sum().log())
                total = total + (p[j] * math.log(p[j]) if is_kl else 0)
    return total / (2 * G)


@pytest.mark.parametrize("is_kl", [False, True])
@pytest.mark.parametrize("num_references", [1, 2, 3])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_affinity_is_its_definition_on_any_number_of_processes(num_ranks, num_references, is_kl):
    for dtype, rel in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = [*features(dtype=dtype), scale_of(0.2, dtype)]
        wide = [x.detach().double().requires_grad_() for x in inputs]
        dims = (3, 7, D)[:num_references]
        references = [[x.detach() for x in features(7 + dim, dim, dtype)] for dim in dims]
        theirs = [[x.double() for x in reference] for reference in references]
        scales = [torch.tensor(scale, dtype=dtype) for scale in (8.0, 3.0, 20.0)[:num_references]]
        ours = affinity(*inputs, references, scales, num_ranks, is_kl)
        loop = affinity_loop(*wide, theirs, scales, is_kl)
        assert ours.item() == pytest.approx(loop.item(), rel=rel)
        assert_same(gradients(ours, *inputs), gradients(loop, *wide), rel)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.numel())
        return out


def test_affinity_from_several_references_holds_nothing_of_the_size_of_the_matrix():
    num, dim, tile = 256, 4, (8, 16)
    drawn = torch.nn.functional.normalize(torch.randn(3, 2, num, dim), dim=3)
    scale = torch.tensor(5.0)
    with LargestTensor() as largest:
        for is_kl in (False, True):
            softs = [
                softmaxes([(slice(0, num), Pairs.of(*each, tile=tile))], scale)[0] for each in drawn
            ]
            affinity_loss(*drawn[0], scale, softs[0], softs[1:], is_kl)
    assert largest.numel <= 2 * num * dim < num * num // 16


def test_feature_distillation_is_twice_one_minus_the_cosine_of_images_plus_texts():
    (image, text), (other_image, other_text) = features(), [x.detach() for x in features(7)]
    ours = feature_loss(image, text, other_image, other_text)
    loop = torch.zeros((), dtype=torch.float64)
    for rows, others in ((image, other_image), (text, other_text)):
        for i in range(G):
            cosine = sum(rows[i, d] * others[i, d] for d in range(D))
            loop = loop + 2 * (1 - cosine) / G
    assert ours.item() == pytest.approx(loop.item(), rel=1e-14)
    # On the sphere: what moves a feature along itself is normalised away.
    for rows, our, its in zip(
        (image, text), gradients(ours, image, text), gradients(loop, image, text), strict=True
    ):
        assert_same([tangent(our, rows)], [tangent(its, rows)], 1e-13)


def tangent(gradient: Tensor, rows: Tensor) -> Tensor:
    rows = rows.detach()
    return gradient - (gradient * rows).sum(1, keepdim=True) * rows


def test_a_projections_gradient_is_the_slope_of_the_loss():
    image, text = features()
    reference = [x.detach() for x in features(7, 3)]
    projection = Projection(D, 3, seed=1).double()

    def loss() -> Tensor:
        return feature_loss(*projection(image, text), *reference)

    grads = gradients(loss(), projection.image, projection.text, image)
    for parameter, grad in zip((projection.image, projection.text, image), grads, strict=True):
        for place in ((0, 0), (2, 4)):
            values = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter[place] += step
                    values.append(loss().item())
                    parameter[place] -= step
            slope = (values[0] - values[1]) / 2e-6
            assert grad[place].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_a_projection_is_linear_then_normalised():
    image, text = (x.detach() for x in features())
    projection = Projection(D, 3, seed=1).double()
    for rows, weight, ours in zip(
        (image, text), (projection.image, projection.text), projection(image, text), strict=True
    ):
        for i in range(G):
            row = [sum(weight[k, d].item() * rows[i, d].item() for d in range(D)) for k in range(3)]
            length = math.sqrt(sum(x * x for x in row))
            assert ours[i].tolist() == pytest.approx([x / length for x in row], rel=1e-12)
    assert not torch.equal(projection.image, projection.text)
    assert torch.equal(projection.image, Projection(D, 3, seed=1).image.double())


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_interactive_is_its_definition_on_any_number_of_processes(num_ranks):
    image, text = features()
    other_image, other_text = (x.detach() for x in features(7))
    scale = scale_of(0.2)
    losses = []
    for r, _ in split(image, text, num_ranks):
        pairs = Pairs.of(image[r], text[r], other_image, other_text, r.start, tile=(2, 4))
        lse, _ = row_statistics(pairs, scale.detach())
        losses.append(interactive_loss(image[r], text[r], scale, pairs, lse))
    ours, loop = torch.stack(losses).mean(), torch.zeros((), dtype=torch.float64)
    for rows, columns in ((image, other_text), (text, other_image)):
        for i in range(G):
            logits = [scale * (rows[i] * columns[j]).sum() for j in range(G)]
            loop = loop + sum(x.exp() for x in logits).log() - logits[i]
    loop = loop / (2 * G)
    assert ours.item() == pytest.approx(loop.item(), rel=1e-12)
    assert_same(gradients(ours, image, text, scale), gradients(loop, image, text, scale), 1e-12)


def test_products_are_exact_whatever_is_set_and_the_setting_is_given_back():
    inputs = [x.detach() for x in features(dtype=torch.float32)]
    expected, _ = row_statistics(Pairs.of(*inputs), torch.tensor(100.0))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16), exact():
            assert torch.get_float32_matmul_precision() == "highest"
            inside, _ = row_statistics(Pairs.of(*inputs), torch.tensor(100.0))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(inside, expected)
