"""The meter of a training: its rows, and what it says in between."""

from __future__ import annotations

import logging

import pytest
import torch
from clock import Clock

from clipgraft import meter as meters
from clipgraft.config import ConfigError
from clipgraft.meter import Meter


def meter_of(num_steps: int, rows: list[dict]) -> Meter:
    return Meter(num_steps, 4, torch.tensor(2.0), rows)


def add(meter: Meter, step: int, loss: float, waited: float = 0.0) -> None:
    meter.add(step, torch.tensor(loss), 1e-3, waited, {})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    monkeypatch.setattr(meters, "NUM_ROWS", 2)  # of two steps, in what follows
    return clock


def test_a_row_is_the_mean_of_its_steps(monkeypatch):
    monkeypatch.setattr(meters, "NUM_ROWS", 2)
    rows: list[dict] = []
    meter = meter_of(4, rows)
    for step in range(1, 5):
        add(meter, step, float(step))
    assert [(row["step"], row["samples_seen"], row["loss"]) for row in rows] == [
        (2, 8, 1.5),
        (4, 16, 3.5),
    ]


def test_in_the_middle_of_a_long_row_it_says_how_it_is_and_keeps_the_row(caplog):
    rows: list[dict] = []
    meter = meter_of(1000, rows)
    add(meter, 1, 2.0)
    with caplog.at_level(logging.INFO):
        meter.glance(1)
    assert "step     1/1000" in caplog.text and "loss 2.000" in caplog.text
    assert not rows and not meter.is_due()
    for step in range(2, 11):
        add(meter, step, 3.0)
    assert [row["loss"] for row in rows] == [pytest.approx(2.9)]


def test_without_a_step_there_is_nothing_to_say(caplog):
    with caplog.at_level(logging.INFO):
        meter_of(1000, []).glance(0)
    assert not caplog.text


def test_a_loss_that_is_not_finite_is_seen_in_the_middle_of_a_row():
    meter = meter_of(1000, [])
    add(meter, 1, float("nan"))
    with pytest.raises(ConfigError, match="the loss is nan between steps 0 and 1 of 1000"):
        meter.glance(1)


def test_rates_and_waits_are_of_a_row_and_seconds_of_the_whole_training(clock):
    rows: list[dict] = []
    meter = meter_of(4, rows)
    for step, seconds, waited in [(1, 1, 0.5), (2, 3, 1.0), (3, 1, 1.25), (4, 1, 2.5)]:
        clock.let_pass(seconds)
        add(meter, step, 1.0, waited)
    assert [row["seconds"] for row in rows] == [4, 6]
    assert [row["samples_per_second"] for row in rows] == [8 / 4, 8 / 2]
    assert [row["data_wait"] for row in rows] == [1.0 / 4, 1.5 / 2]


def test_a_pause_counts_neither_for_the_training_nor_for_its_row(clock):
    rows: list[dict] = []
    meter = meter_of(4, rows)
    for step in range(1, 5):
        clock.let_pass(2)
        add(meter, step, 1.0)
        clock.let_pass(100)
        meter.pause(100)
        assert meter.seconds == 2 * step
    assert [row["seconds"] for row in rows] == [4, 8]
    assert [row["samples_per_second"] for row in rows] == [2, 2]


def test_after_a_resume_the_rest_is_reckoned_from_what_is_new(clock, caplog):
    """90 steps of 2 seconds are left, whatever the 100 steps before took."""
    meter = meter_of(200, [{"step": 100, "seconds": 9000.0}])
    for step in range(101, 111):
        clock.let_pass(2)
        add(meter, step, 1.0)
    with caplog.at_level(logging.INFO):
        meter.glance(110)
    assert "eta 3m00s" in caplog.text


def test_after_a_resume_seconds_go_on_and_rates_are_of_what_is_new(clock):
    rows: list[dict] = []
    meter = meter_of(4, rows)
    for step in (1, 2):
        clock.let_pass(3)
        add(meter, step, 1.0)
    clock.let_pass(1000)  # until someone starts it again
    meter = meter_of(4, rows)
    assert meter.seconds == 6
    for step in (3, 4):
        clock.let_pass(1)
        add(meter, step, 1.0)
    assert [(row["step"], row["seconds"]) for row in rows] == [(2, 6), (4, 8)]
    assert [row["samples_per_second"] for row in rows] == [1.3, 4]
