import pytest
import torch

from clipgraft.losses.balance import balance_loss, z_loss

E = 4


def one_hot_probs(experts: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(experts), E).float()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_even_choices_with_even_probabilities_give_one(k):
    topk = torch.stack([torch.arange(k) + shift for shift in range(E)]) % E
    probs = torch.full((E, E), 1 / E)
    assert balance_loss(probs, topk).item() == pytest.approx(1)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_collapse_gives_experts_over_k(k):
    topk = torch.arange(k).expand(10, k)
    assert balance_loss(one_hot_probs([0] * 10), topk).item() == pytest.approx(E / k)


def test_layers_that_collapse_apart_look_balanced_only_when_pooled():
    left, right = one_hot_probs([0, 0, 1, 1]), one_hot_probs([2, 2, 3, 3])
    choices_left, choices_right = left.argmax(1, keepdim=True), right.argmax(1, keepdim=True)
    assert balance_loss(left, choices_left).item() == pytest.approx(2)
    assert balance_loss(right, choices_right).item() == pytest.approx(2)
    pooled = balance_loss(torch.cat([left, right]), torch.cat([choices_left, choices_right]))
    assert pooled.item() == pytest.approx(1)


def test_equals_the_definition_counted_by_hand():
    probs = torch.rand(7, E).softmax(1)
    topk = probs.topk(2, dim=1).indices
    expected = 0.0
    for e in range(E):
        f = sum(e in row for row in topk.tolist()) / 7
        expected += f * sum(row[e] for row in probs.tolist()) / 7
    assert balance_loss(probs, topk).item() == pytest.approx(E / 2 * expected, rel=1e-5)


def test_descent_moves_probability_away_from_the_crowded_expert():
    logits = torch.tensor([[1.0, 0, 0, 0]] * 8, requires_grad=True)
    probs = logits.softmax(1)
    balance_loss(probs, probs.topk(1, dim=1).indices).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_z_loss_is_the_mean_squared_log_partition():
    logits = torch.tensor([[0.0, 0, 0, 0], [3.0, 3, 3, 3]])
    log4 = torch.tensor(4.0).log()
    assert torch.allclose(z_loss(logits), (log4**2 + (3 + log4) ** 2) / 2)
