"""Balance and z-loss: their least and greatest values, and that sums of parts are the whole."""

from __future__ import annotations

import math

import pytest
import torch

from clipgraft.losses.balance import (
    RoutingMeans,
    balance_loss,
    pooled_balance_loss,
    routing_sums,
)

E, K = 4, 2


def sums_of(logits: torch.Tensor, k: int = K) -> torch.Tensor:
    probs = logits.float().softmax(1)
    return routing_sums(logits, probs, probs.topk(k, dim=1).indices)


def means_of(probs: torch.Tensor, topk: torch.Tensor) -> RoutingMeans:
    return RoutingMeans.of(routing_sums(probs.log().clamp_min(-50), probs, topk)[None])


def one_hot_probs(experts: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(experts), E).float()


def by_loop(layers: list[torch.Tensor], k: int) -> float:
    """E * sum_e f_e P_e over the tokens of all layers, counted one by one in float64."""
    rows = [row for logits in layers for row in logits.double().softmax(1).tolist()]
    total = 0.0
    for e in range(E):
        chosen = sum(e in sorted(range(E), key=lambda i: -row[i])[:k] for row in rows)
        total += chosen / len(rows) * math.fsum(row[e] for row in rows) / len(rows)
    return E * total


@pytest.mark.parametrize("k", [1, 2, 4])
def test_even_choices_with_even_probabilities_give_one(k):
    topk = torch.stack([torch.arange(k) + shift for shift in range(E)]) % E
    means = means_of(torch.full((E, E), 1 / E), topk)
    assert balance_loss(means).item() == pytest.approx(1)
    assert means.entropy_L.item() == pytest.approx(math.log(E))
    assert means.top_k == k


@pytest.mark.parametrize("k", [1, 2, 4])
def test_collapse_gives_experts_over_k(k):
    means = means_of(one_hot_probs([0] * 10), torch.arange(k).expand(10, k))
    assert balance_loss(means).item() == pytest.approx(E / k)
    assert means.load_LE.tolist() == [[1 / k] * k + [0] * (E - k)]
    assert means.entropy_L.item() == pytest.approx(0, abs=1e-6)


def test_no_use_in_proportion_to_probability_has_less_than_one():
    """With f_e = P_e the loss is E times a sum of squares: least where all are alike."""
    torch.manual_seed(0)
    for probs_E in torch.rand(20, E, dtype=torch.float64).softmax(1):
        sums = torch.cat([probs_E, probs_E, torch.ones(3, dtype=torch.float64)])
        assert balance_loss(RoutingMeans.of(sums[None])).item() >= 1


def test_layers_that_collapse_apart_look_balanced_only_when_pooled():
    """Two layers, each on two of four experts only (methods, 2.1 item 10)."""
    left = torch.tensor([[9.0, 8.0, -9.0, -9.0], [8.0, 9.0, -9.0, -9.0]])
    sums_LS = torch.stack([sums_of(left), sums_of(left.flip(1))])
    per_layer = balance_loss(RoutingMeans.of(sums_LS))
    assert per_layer.tolist() == pytest.approx([E / K, E / K], rel=1e-4)  # the worst there is
    assert pooled_balance_loss(sums_LS).item() == pytest.approx(K, rel=1e-4)  # the best there is


def test_both_forms_equal_their_definitions_counted_by_hand():
    torch.manual_seed(0)
    layers = [torch.randn(7, E), 3 * torch.randn(7, E)]
    sums_LS = torch.stack([sums_of(logits) for logits in layers])
    expected = [by_loop([logits], K) / K for logits in layers]
    assert balance_loss(RoutingMeans.of(sums_LS)).tolist() == pytest.approx(expected, rel=1e-6)
    assert pooled_balance_loss(sums_LS).item() == pytest.approx(by_loop(layers, K), rel=1e-6)


def test_sums_of_uneven_parts_have_the_loss_and_the_gradient_of_the_whole():
    torch.manual_seed(0)
    logits = torch.randn(11, E, requires_grad=True)

    def gradient(sums: torch.Tensor) -> torch.Tensor:
        means = RoutingMeans.of(sums[None])
        value = balance_loss(means).sum() + 0.3 * means.z_L.sum()
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    whole, parts = sums_of(logits), sums_of(logits[:2]) + sums_of(logits[2:])
    assert torch.allclose(parts, whole, rtol=1e-6)
    torch.testing.assert_close(gradient(parts), gradient(whole), rtol=1e-5, atol=1e-8)
    mean_of_parts = (sums_of(logits[:2]) / 2 + sums_of(logits[2:]) / 9) / 2
    assert (gradient(mean_of_parts) - gradient(whole)).abs().max() > 1e-3  # parts judged apart


def test_descent_moves_probability_away_from_the_crowded_expert():
    logits = torch.tensor([[1.0, 0, 0, 0]] * 8, requires_grad=True)
    balance_loss(RoutingMeans.of(sums_of(logits, 1)[None])).sum().backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_gradients_are_those_of_the_definitions():
    """Of probabilities alone, choices being what they are: in closed form, in float64."""
    torch.manual_seed(0)
    logits_TE = 2 * torch.randn(7, E, requires_grad=True)
    means = RoutingMeans.of(sums_of(logits_TE)[None])
    (z_TE,) = torch.autograd.grad(means.z_L.sum(), logits_TE, retain_graph=True)
    (balance_TE,) = torch.autograd.grad(balance_loss(means).sum(), logits_TE)
    exact_TE = logits_TE.detach().double()
    lse_T1, probs_TE = exact_TE.logsumexp(1, keepdim=True), exact_TE.softmax(1)
    top_TE = torch.zeros_like(probs_TE).scatter(1, exact_TE.topk(K, dim=1).indices, 1.0)
    load_E = top_TE.mean(0) / K
    expected_TE = E * probs_TE * (load_E - (probs_TE @ load_E)[:, None]) / len(probs_TE)
    for ours, theirs in (z_TE, 2 * lse_T1 * probs_TE / len(probs_TE)), (balance_TE, expected_TE):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-7)


def test_z_loss_is_the_mean_squared_log_partition_and_entropy_that_of_probabilities():
    logits = torch.tensor([[0.0, 0, 0, 0], [3.0, 1, 0, -2]])
    means = RoutingMeans.of(sums_of(logits)[None])
    log_z = logits.double().exp().sum(1).log()
    assert means.z_L.item() == pytest.approx(log_z.square().mean().item(), rel=1e-6)
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy().mean()
    assert means.entropy_L.item() == pytest.approx(entropy.item(), rel=1e-6)
