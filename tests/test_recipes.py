"""Laws of the recipes: rates, warm-ups and steps. Oracle: the tables that CLIPA's authors published."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from clipgraft.recipes import TrainSettings
from clipgraft.schedule import num_steps, num_warmup_steps, peak_lr


def settings(samples_seen: float = 1000, batch_size: int = 10, **optim: object) -> TrainSettings:
    return TrainSettings(samples_seen=int(samples_seen), batch_size=batch_size, optim=optim)


@pytest.mark.parametrize(
    ("lr_per_256", "batch_size", "peak"),
    [
        (8e-6, 65_536, 2.048e-3),  # B/16 and H/14, short
        (8e-6, 32_768, 1.024e-3),  # L/16, short
        (8e-7, 8_192, 2.56e-5),  # B/16, full
        (8e-7, 7_168, 2.24e-5),  # L/16, full
        (4e-7, 32_768, 5.12e-5),  # H/14 at 224
        (1e-7, 16_384, 6.4e-6),  # H/14 at 336
        (4e-6, 65_536, 1.024e-3),  # bigG, short
    ],
)
def test_peak_rates_are_the_published_ones(lr_per_256, batch_size, peak):
    got = peak_lr(settings(1e9, batch_size, lr_per_256=lr_per_256))
    assert got == pytest.approx(peak, rel=1e-12)
    assert peak_lr(settings(1e9, batch_size, lr=peak)) == peak


@pytest.mark.parametrize(
    ("samples", "batch_size", "steps"),
    [
        (51_200_000, 65_536, 782),  # B/16, short
        (51_200_000, 32_768, 1_563),  # L/16, short: 1,562.5
        (26_214_400, 32_768, 800),  # H/14 at 224
        (26_214_400, 16_384, 1_600),  # H/14 at 336
        (52_428_800, 65_536, 800),  # L/14, short
        (0, 65_536, 0),
    ],
)
def test_a_warm_up_in_samples_has_the_published_steps(samples, batch_size, steps):
    in_samples = settings(12.8e9, batch_size, lr=1.0, warmup_samples=samples)
    assert num_warmup_steps(in_samples) == steps
    assert num_warmup_steps(settings(12.8e9, batch_size, lr=1.0, warmup_steps=steps)) == steps


@pytest.mark.parametrize(
    ("samples", "batch_size", "steps"),
    [
        (131_072_000, 8_192, 16_000),
        (131_072_000, 7_168, 18_286),
        (524_288_000, 32_768, 16_000),
        (131_072_000, 16_384, 8_000),
        (0, 16, 0),
    ],
)
def test_training_has_the_published_steps(samples, batch_size, steps):
    assert num_steps(settings(samples, batch_size, lr=1.0)) == steps


def test_a_share_of_the_steps_is_rounded_and_a_twentieth_by_default():
    assert num_warmup_steps(settings(1000, lr=1.0, warmup=0.126)) == 13
    assert num_warmup_steps(settings(1000, lr=1.0)) == 5
    assert num_warmup_steps(settings(1000, lr=1.0, warmup=0.0)) == 0


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({}, "either `lr` or `lr_per_256`, got neither"),
        ({"lr": 0.1, "lr_per_256": 1e-6}, "got lr = 0.1 and lr_per_256 = 1e-06"),
        ({"lr": 0.1, "warmup": 0.1, "warmup_steps": 3}, "got warmup = 0.1 and warmup_steps = 3"),
        ({"lr": 0.1, "warmup_samples": 1, "warmup_steps": 0}, "one warm-up"),
        ({"lr": 0.1, "warmup_steps": 101}, "101 steps is longer .* are 100 steps"),
        ({"lr": 0.1, "warmup_samples": 1001}, "101 steps is longer"),
        ({"lr": 0.1, "lr_min": 0.2}, "lr_min = 0.2 is above the peak learning rate, 0.1: "),
        ({"lr_per_256": 0.256, "lr_min": 0.02}, r"rate, 0.01 \(lr_per_256 in batches of 10\)"),
    ],
)
def test_rules_that_contradict_each_other_are_refused(optim, message):
    with pytest.raises(ValidationError, match=message):
        settings(**optim)


def test_a_rate_may_stay_at_its_peak():
    assert settings(lr=0.1, lr_min=0.1).optim.lr_min == 0.1


def test_null_takes_a_rule_back():
    assert peak_lr(settings(lr=None, lr_per_256=256e-3)) == pytest.approx(0.01)
    assert num_warmup_steps(settings(1000, lr=1.0, warmup=None, warmup_steps=100)) == 100
