"""Laws of batches: who is in which, from the specification alone."""

from collections import Counter

import numpy as np
import pytest

from clipgraft.config import ConfigError
from clipgraft.data.sampler import HomogeneousBatches, UniformBatches

LABELS = np.array([5] * 11 + [0] * 6 + [9] * 2 + [7] * 1)[np.random.default_rng(1).permutation(20)]


def epoch_of(sampler, epoch):
    steps = range(epoch * sampler.num_batches, (epoch + 1) * sampler.num_batches)
    return [sampler.batch(step) for step in steps]


@pytest.fixture(params=["uniform", "homogeneous"])
def make(request):
    if request.param == "uniform":
        return lambda seed: UniformBatches(len(LABELS), 3, seed)
    return lambda seed: HomogeneousBatches(LABELS, 3, seed)


def test_an_epoch_shows_each_row_at_most_once_and_loses_less_than_a_batch(make):
    for epoch in range(3):
        rows = np.concatenate([rows for rows, _ in epoch_of(make(4), epoch)])
        assert len(rows) == len(set(rows)) == 18
        assert set(rows) <= set(range(20))


def test_a_batch_is_a_function_of_seed_and_step_alone(make):
    forwards, backwards = make(4), make(4)
    ours = [forwards.batch(step) for step in range(15)]
    theirs = [backwards.batch(step) for step in reversed(range(15))][::-1]
    for (rows, mixed), (other_rows, other_mixed) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(rows, other_rows)
        assert mixed == other_mixed


def test_epochs_and_seeds_have_different_orders(make):
    order = [tuple(rows) for rows, _ in epoch_of(make(4), 0)]
    assert order != [tuple(rows) for rows, _ in epoch_of(make(4), 1)]
    assert order != [tuple(rows) for rows, _ in epoch_of(make(5), 0)]


def test_every_row_is_seen_in_the_long_run(make):
    seen = {int(row) for epoch in range(40) for rows, _ in epoch_of(make(0), epoch) for row in rows}
    assert seen == set(range(20))


def test_batches_have_one_label_unless_they_say_so():
    for rows, is_mixed in epoch_of(HomogeneousBatches(LABELS, 3, 0), 2):
        assert (len(set(LABELS[rows])) > 1) == is_mixed


def test_each_label_has_as_many_batches_of_its_own_as_fit():
    sampler = HomogeneousBatches(LABELS, 3, 0)
    own = Counter(LABELS[rows][0] for rows, is_mixed in epoch_of(sampler, 0) if not is_mixed)
    assert own == {5: 3, 0: 2}
    assert (sampler.num_batches, sampler.num_homogeneous) == (6, 5)


def test_mixed_batches_are_not_always_last():
    sampler = HomogeneousBatches(LABELS, 3, 0)
    places = {[mixed for _, mixed in epoch_of(sampler, epoch)].index(True) for epoch in range(30)}
    assert len(places) > 2


def test_one_label_makes_ordinary_batches():
    sampler = HomogeneousBatches(np.zeros(7, int), 3, 0)
    assert [is_mixed for _, is_mixed in epoch_of(sampler, 0)] == [False, False]


@pytest.mark.parametrize(
    "build",
    [lambda: UniformBatches(400, 512, 0), lambda: HomogeneousBatches(np.zeros(400, int), 512, 0)],
)
def test_data_too_small_for_a_batch_is_the_users_mistake(build):
    with pytest.raises(ConfigError, match=r"batch_size = 512 .*400 samples.*Hint"):
        build()
