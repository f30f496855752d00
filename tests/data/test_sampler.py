"""Laws of batches: who is in which, from the specification alone."""

import tracemalloc
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipgraft.config import ConfigError
from clipgraft.data.sampler import (
    HomogeneousBatches,
    RoundRobinBatches,
    UniformBatches,
    Visits,
    labels_by_pass,
    share_homogeneous,
)

LABELS = np.array([5] * 11 + [0] * 6 + [9] * 2 + [7] * 1)[np.random.default_rng(1).permutation(20)]


def epoch_of(sampler, epoch):
    steps = range(epoch * sampler.num_batches, (epoch + 1) * sampler.num_batches)
    return [sampler.batch(step) for step in steps]


@pytest.fixture(params=["uniform", "blocks", "homogeneous", "homogeneous blocks"])
def make(request):
    block = 2 if "blocks" in request.param else None
    if "homogeneous" in request.param:
        return lambda seed: HomogeneousBatches(LABELS, 3, seed, shuffle_block=block)
    return lambda seed: UniformBatches(len(LABELS), 3, seed, shuffle_block=block)


def test_an_epoch_shows_each_row_at_most_once_and_loses_less_than_a_batch(make):
    for epoch in range(3):
        rows = np.concatenate([batch.rows_B for batch in epoch_of(make(4), epoch)])
        assert len(rows) == len(set(rows)) == 18
        assert set(rows) <= set(range(20))


def test_a_batch_is_a_function_of_seed_and_step_alone(make):
    forwards, backwards = make(4), make(4)
    ours = [forwards.batch(step) for step in range(15)]
    theirs = [backwards.batch(step) for step in reversed(range(15))][::-1]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.rows_B, other.rows_B)
        np.testing.assert_array_equal(one.visit_B, other.visit_B)
        np.testing.assert_array_equal(one.group_B, other.group_B)


def test_epochs_and_seeds_have_different_orders(make):
    order = [tuple(batch.rows_B) for batch in epoch_of(make(4), 0)]
    assert order != [tuple(batch.rows_B) for batch in epoch_of(make(4), 1)]
    assert order != [tuple(batch.rows_B) for batch in epoch_of(make(5), 0)]


def test_every_row_is_seen_in_the_long_run(make):
    seen = {
        int(row)
        for epoch in range(40)
        for batch in epoch_of(make(0), epoch)
        for row in batch.rows_B
    }
    assert seen == set(range(20))


def test_batches_have_one_label_or_bring_those_of_all_rows():
    for batch in epoch_of(HomogeneousBatches(LABELS, 3, 0), 2):
        own = LABELS[batch.rows_B]
        if batch.group_B is None:
            assert len(set(own)) == 1
        else:
            assert len(set(own)) > 1 and batch.group_B.tolist() == own.tolist()


def test_each_label_has_as_many_batches_of_its_own_as_fit():
    sampler = HomogeneousBatches(LABELS, 3, 0)
    own = Counter(
        LABELS[batch.rows_B][0] for batch in epoch_of(sampler, 0) if batch.group_B is None
    )
    assert own == {5: 3, 0: 2}
    assert sampler.num_batches == 6


def test_mixed_batches_are_not_always_last():
    sampler = HomogeneousBatches(LABELS, 3, 0)
    places = {
        [batch.group_B is not None for batch in epoch_of(sampler, epoch)].index(True)
        for epoch in range(30)
    }
    assert len(places) > 2


def test_every_label_is_shuffled_anew_and_evenly():
    labels, first = np.repeat([1, 0], [6, 14]), Counter()
    for epoch in range(3000):
        sampler = HomogeneousBatches(labels, 6, epoch)
        batches = [b.rows_B for b in epoch_of(sampler, 0) if b.group_B is None]
        own = next(rows for rows in batches if set(rows) == set(range(6)))
        first[int(own[0])] += 1
    # Each of the six rows comes first 500 times, give or take five standard deviations.
    assert set(first) == set(range(6)) and all(abs(n - 500) < 103 for n in first.values())


def test_blocks_of_a_label_are_neighbours_within_it():
    labels = np.random.default_rng(0).integers(2, size=16_000)
    sampler = HomogeneousBatches(labels, 80, 0, shuffle_block=10)
    batches = sorted(
        (b.rows_B for b in epoch_of(sampler, 0) if b.group_B is None), key=lambda b: b[0]
    )
    assert len(batches) == sum(np.bincount(labels) // 80)
    place = np.empty(len(labels), int)  # among the rows of the same label
    for label in (0, 1):
        place[labels == label] = np.arange((labels == label).sum())
    blocks = [set(place[rows] // 10) for rows in batches]
    # A batch is a window of 8 blocks, or lies across two; any 80 rows would be in some 76 of 800 blocks.
    assert max(map(len, blocks)) <= 17
    assert np.median([max(each) - min(each) for each in blocks]) > 300
    assert np.median([np.abs(np.diff(place[rows])).mean() for rows in batches]) > 100


def test_the_share_in_batches_of_one_label_is_what_is_drawn():
    drawn = [b.group_B is None for b in epoch_of(HomogeneousBatches(LABELS, 3, 0), 0)]
    assert share_homogeneous(LABELS, 3) == pytest.approx(3 * drawn.count(True) / 20)


def test_round_robin_takes_one_batch_of_each_label_in_turn_and_drops_what_does_not_fill_one():
    sampler = RoundRobinBatches(LABELS, 3, 0)
    batches = epoch_of(sampler, 4)
    assert [set(LABELS[b.rows_B]) for b in batches] == [{0}, {5}, {0}, {5}, {5}]
    assert all(b.group_B is None for b in batches) and set(batches[0].visit_B) == {4}
    rows = np.concatenate([b.rows_B for b in batches])
    assert len(rows) == len(set(rows)) == 15
    lost = [
        set(range(20)) - {int(row) for b in epoch_of(sampler, e) for row in b.rows_B}
        for e in (0, 1, 2, 3)
    ]
    assert all(
        set(np.flatnonzero(LABELS > 5)) <= rows for rows in lost
    )  # small labels, in every epoch
    assert len(set(map(frozenset, lost))) > 1  # of label 5 others each time
    again = [RoundRobinBatches(LABELS, 3, 0).batch(step).rows_B for step in range(20, 25)]
    np.testing.assert_array_equal(again, [b.rows_B for b in batches])


def test_another_seed_takes_other_rows_of_each_label_in_turn():
    first, again, other = (
        [batch.rows_B.tolist() for batch in epoch_of(RoundRobinBatches(LABELS, 3, seed), 0)]
        for seed in (4, 4, 5)
    )
    assert first == again != other
    labels = [[set(LABELS[rows]) for rows in batches] for batches in (first, other)]
    assert labels[0] == labels[1]


def test_round_robin_without_a_whole_batch_is_the_users_mistake():
    with pytest.raises(
        ConfigError, match=r"batch_size = 12 has no batches: the largest of 10 .* 11 samples.*Hint"
    ):
        RoundRobinBatches(LABELS, 12, 0)


def test_one_label_makes_ordinary_batches():
    sampler = HomogeneousBatches(np.zeros(7, int), 3, 0)
    assert [batch.group_B for batch in epoch_of(sampler, 0)] == [None, None]


@pytest.mark.parametrize(
    "build",
    [lambda: UniformBatches(400, 512, 0), lambda: HomogeneousBatches(np.zeros(400, int), 512, 0)],
)
def test_data_too_small_for_a_batch_is_the_users_mistake(build):
    with pytest.raises(ConfigError, match=r"batch_size = 512 .*400 samples.*Hint"):
        build()


def test_blocks_are_read_in_long_stretches_and_in_another_order_each_epoch():
    sampler = UniformBatches(64_000, 64, 0, shuffle_block=100)
    orders = [np.concatenate([b.rows_B for b in epoch_of(sampler, epoch)]) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(64_000))
        # While 8 blocks of 100 are shuffled together, nothing outside of them is read.
        for first in range(0, 64_000, 800):
            part = order[first : first + 800]
            assert len(set(part // 100)) == 8
            assert (np.abs(np.diff(part)) > 1).mean() > 0.9
    assert (orders[0] == orders[1]).mean() < 0.01
    blocks = orders[0][::800] // 100
    assert np.abs(np.diff(blocks)).mean() > 100  # of 640


def test_a_block_larger_than_the_data_shuffles_all_of_it():
    rows = UniformBatches(20, 20, 0, shuffle_block=1000).batch(0).rows_B
    assert sorted(rows) == list(range(20)) != list(rows)


def weighed(weights, num=1000, seed=3):
    """Sources 0, 1, 2 with 50, 30 and 20 % of the samples."""
    source_N = np.repeat([0, 1, 2], [num * 5 // 10, num * 3 // 10, num * 2 // 10])
    source_N = np.random.default_rng(0).permutation(source_N)
    return source_N, Visits(num, seed, source_N, np.array(weights, float))


@pytest.mark.parametrize("kind", ["uniform", "homogeneous"])
def test_a_source_is_shown_as_often_as_it_weighs(kind):
    source_N, visits = weighed([0.5, 2.25, 0.0])
    assert visits.num == 250 + 675
    if kind == "uniform":
        sampler = UniformBatches(1000, 5, 0, visits=visits)
    else:
        sampler = HomogeneousBatches(np.arange(1000) % 7, 5, 0, visits=visits)
    assert sampler.num_batches == 185
    chosen = []
    for epoch in range(2):
        count_N = np.bincount(
            np.concatenate([b.rows_B for b in epoch_of(sampler, epoch)]), minlength=1000
        )
        assert Counter(count_N[source_N == 0]) == {0: 250, 1: 250}
        assert Counter(count_N[source_N == 1]) == {2: 225, 3: 75}
        assert Counter(count_N[source_N == 2]) == {0: 200}
        chosen.append(count_N)
    assert (chosen[0] + chosen[1])[source_N == 0].tolist() == [1] * 500  # each half has its turn


@pytest.mark.parametrize("weights", [[2.0, 2.0, 2.0], [4.0, 2.5, 0.5]])
def test_no_sample_is_twice_in_a_batch_of_its_label_however_much_it_weighs(weights):
    labels, (_, visits) = np.arange(1000) % 16, weighed(weights)
    sampler = HomogeneousBatches(labels, 24, 0, visits=visits)
    batches = epoch_of(sampler, 0) + epoch_of(sampler, 1)
    kinds = Counter(batch.group_B is None for batch in batches)
    assert kinds[True] > kinds[False] > 0
    for batch in batches:
        if batch.group_B is None:
            assert len(set(labels[batch.rows_B])) == 1 and len(set(batch.rows_B)) == 24
            continue
        pairs = set(zip(batch.group_B.tolist(), batch.rows_B.tolist(), strict=True))
        assert len(pairs) == 24  # no row twice in a group, and no group of two labels
        assert len({(group, labels[row]) for group, row in pairs}) == len(set(batch.group_B))
    assert any(len(set(batch.rows_B)) < 24 for batch in batches)
    shown = labels_by_pass(labels, visits.of_epoch(0), visits.passes)
    drawn = sum(24 for batch in epoch_of(sampler, 0) if batch.group_B is None)
    assert share_homogeneous(shown, 24) == pytest.approx(drawn / visits.num)


def test_another_seed_shows_another_part_of_a_source():
    first, again, other = (
        weighed([0.5, 2.25, 1.0], seed=seed)[1].of_epoch(0)[0].tolist() for seed in (3, 3, 4)
    )
    assert first == again != other


@pytest.mark.parametrize("kind", ["uniform", "homogeneous"])
def test_the_visits_of_a_row_are_counted_whatever_other_sources_weigh(kind):
    source_N, visits = weighed([0.5, 2.25, 1.0])
    if kind == "uniform":
        sampler = UniformBatches(1000, 5, 0, visits=visits)
    else:
        sampler = HomogeneousBatches(np.arange(1000) % 7, 5, 0, visits=visits)
    seen = [[] for _ in range(1000)]
    for epoch in range(4):
        now = [[] for _ in range(1000)]
        for b in epoch_of(sampler, epoch):
            for row, visit in zip(b.rows_B.tolist(), b.visit_B.tolist(), strict=True):
                now[row].append(visit)
        seen = [before + sorted(new) for before, new in zip(seen, now, strict=True)]
    assert seen == [list(range([2, 9, 4][source])) for source in source_N]
    plain = UniformBatches(20, 5, 0)
    assert {int(v) for b in epoch_of(plain, 7) for v in b.visit_B} == {7}


def test_sources_are_those_of_the_index(tmp_path):
    names = ["coco", "web", "web", "coco", "coco", "flickr"]
    pq.write_table(pa.table({"uid": list("abcdef"), "source": names}), tmp_path / "samples.parquet")
    visits = Visits.of_index(tmp_path, 6, {"coco": 2, "web": 0}, seed=0)
    assert Counter(visits.of_epoch(0)[0].tolist()) == {0: 2, 3: 2, 4: 2, 5: 1}
    assert Visits.of_index(tmp_path, 6, {}, seed=0).num == 6
    with pytest.raises(ConfigError, match=r"no source cocoa; it has coco, flickr, web.*Hint"):
        Visits.of_index(tmp_path, 6, {"cocoa": 2}, seed=0)
    pq.write_table(pa.table({"source": [""] * 6}), tmp_path / "samples.parquet")
    with pytest.raises(ConfigError, match="no source coco; it has one source without a name"):
        Visits.of_index(tmp_path, 6, {"coco": 2}, seed=0)


@pytest.mark.parametrize("kind", ["uniform", "blocks", "homogeneous", "homogeneous blocks"])
def test_a_million_rows_need_a_few_arrays(kind):
    num, block = 1_000_000, 1000 if "blocks" in kind else None
    labels = np.random.default_rng(0).integers(10_000, size=num).astype(np.int32)
    tracemalloc.start()
    try:
        if "homogeneous" in kind:
            sampler = HomogeneousBatches(labels, 4096, 0, shuffle_block=block)
        else:
            sampler = UniformBatches(num, 4096, 0, shuffle_block=block)
        assert len(sampler.batch(5).rows_B) == 4096
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * 8 * num
