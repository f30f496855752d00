import math

import pytest
import torch

from clipgraft.loss_settings import GammaSettings
from clipgraft.losses.inner import (
    SampleTau,
    add_eps,
    cosine_gamma,
    scent_gamma,
    updated_log_u,
    updated_tau,
)
from clipgraft.objectives import inner_rate

NAN = math.nan


def test_updates_in_logs_are_those_of_u_and_a_new_sample_takes_what_it_sees():
    u, g = [[0.5, 2.0], [NAN, 3.0]], [[4.0, 0.1], [7.0, NAN]]
    updated = updated_log_u(torch.tensor(u).log(), torch.tensor(g).log(), torch.tensor(0.3)).exp()
    assert updated[0].tolist() == pytest.approx([0.7 * 0.5 + 0.3 * 4, 0.7 * 2 + 0.3 * 0.1])
    assert updated[1, 0].item() == pytest.approx(7.0)


def test_an_inner_rate_of_one_forgets_and_far_values_stay_finite():
    log_u, log_g = torch.tensor([[400.0, -300.0]]), torch.tensor([[-400.0, 350.0]])
    assert torch.equal(updated_log_u(log_u, log_g, torch.tensor(1.0)), log_g)
    kept = updated_log_u(log_u, log_g, torch.tensor(0.25))
    expected = [400 + math.log(0.75), 350 + math.log(0.25)]
    assert kept[0].tolist() == pytest.approx(expected)


def test_eps_bounds_from_below_only():
    log_v = add_eps(torch.tensor([-900.0, 0.0, 500.0]), 1e-14)
    assert log_v.tolist() == pytest.approx([math.log(1e-14), 0.0, 500.0])


def test_a_repeated_value_is_reached_at_the_inner_rate():
    log_u = torch.zeros(1, 2, dtype=torch.float64)
    log_g = torch.full((1, 2), math.log(5.0), dtype=torch.float64)
    for _ in range(10):
        log_u = updated_log_u(log_u, log_g, torch.tensor(0.2, dtype=torch.float64))
    assert log_u.exp()[0, 0].item() == pytest.approx(5 - 4 * 0.8**10, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [1.0, 1.0, 0.6, 0.6, 0.2, 0.2]),
        ("cosine_steps", [1.0, 0.6 + 0.4 * math.cos(math.pi / 4), 0.6, 0.6 - 0.4 * math.cos(math.pi / 4), 0.2, 0.2]),
        ("constant", [1.0, 1.0, 0.2, 0.2, 0.2, 0.2]),
    ],
)  # fmt: skip
def test_inner_rates_fall_as_their_schedules_say(schedule, expected):
    gamma = {"schedule": schedule, "min": 0.2} | ({} if schedule == "constant" else {"decay": 2})
    rates = [inner_rate(GammaSettings(**gamma), epoch / 2, 9.0) for epoch in range(6)]
    assert rates == pytest.approx(expected)


def test_the_default_decay_is_the_whole_training():
    gamma = GammaSettings(schedule="cosine_steps", min=0.4)
    assert inner_rate(gamma, 4.5, 9.0) == pytest.approx(0.7)
    assert inner_rate(gamma, 9.0, 9.0) == cosine_gamma(99, 9, 0.4) == 0.4


def test_scents_rate_is_near_one_where_u_is_large_and_small_where_it_is_small():
    rates = scent_gamma(torch.tensor([-14.0, -10.0, 0.0]), 10.0)
    assert rates.tolist() == pytest.approx([1 / (1 + math.exp(4)), 0.5, 1 / (1 + math.exp(-10))])


def test_the_temperatures_of_samples_take_the_steps_of_adam():
    grads = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0))
    grads[0] = 0  # the first epoch is another matter
    start = torch.full((3, 2), 0.3)
    parameter = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([parameter], lr=0.01, betas=(0.9, 0.98), eps=1e-6)
    state = SampleTau(start, torch.zeros(3, 2), torch.zeros(3, 2))
    for epoch, grad in enumerate(grads):
        parameter.grad = grad
        adam.step()
        state = updated_tau(state, grad, 0.01, (0.9, 0.98), 1e-6, epoch, (0.01, 1.0))
    torch.testing.assert_close(state.tau_B2, parameter.detach())


def test_the_first_epoch_steps_by_the_sign_and_tau_stays_in_its_bounds():
    state = SampleTau(torch.tensor([[0.02, 0.99]]), torch.zeros(1, 2), torch.zeros(1, 2))
    grad = torch.tensor([[3.0, -40.0]])
    moved = updated_tau(state, grad, 0.005, (0.9, 0.98), 1e-8, 0, (0.01, 1.0))
    assert moved.tau_B2[0].tolist() == pytest.approx([0.015, 0.995])
    assert moved.mean_B2[0].tolist() == [3.0, -5.0]
    far = updated_tau(state, grad, 0.5, (0.9, 0.98), 1e-8, 0, (0.01, 1.0))
    assert far.tau_B2[0].tolist() == pytest.approx([0.01, 1.0])
