"""Which rows make up the batch of a step: pure functions of (seed, step), so a run can be resumed anywhere.

Nothing is buffered: an epoch's order is computed from the seed and the epoch when its first batch is asked for, and
kept until the next one is. An epoch shows each sample once (or as often as its source weighs), over all processes
together. What does not fill the last batch of an epoch is dropped; the next epoch drops other samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipgraft.config import ConfigError
from clipgraft.data.samples import read_columns

_BLOCKS = 8  # blocks that are shuffled together


class Rows(NamedTuple):
    """One global batch.

    Attributes:
        rows_B: rows of the samples.
        visit_B: how often each has been shown before; with (seed, row) it names a visit. (What an epoch's incomplete
            last batch would have shown counts as shown.)
        group_B: pseudo label of each, of every pass over the data its own; None where all are of one.
    """

    rows_B: np.ndarray
    visit_B: np.ndarray
    group_B: np.ndarray | None = None


class EpochVisits(NamedTuple):
    """The visits of an epoch, one pass over the data after the other, rows rising within a pass.

    Attributes:
        rows_V: samples.
        visit_V: how often each has been shown before.
        pass_V: of this epoch, from 0; no pass shows a sample twice.
    """

    rows_V: np.ndarray
    visit_V: np.ndarray
    pass_V: np.ndarray


class Visits:
    """What an epoch shows: every sample once, or as often as the weight of its source says.

    A weight of 2.5 shows all samples of a source twice, and half of them a third time: of the shuffled source the half
    whose turn it is, so that two epochs show each five times.

    Attributes:
        num: visits per epoch, the same for every epoch.
        passes: over the data, of which an epoch is made at most.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        source_N: np.ndarray | None = None,
        weight_S: np.ndarray | None = None,
    ) -> None:
        """Count the visits.

        Args:
            num_samples: rows are 0 .. num_samples - 1.
            seed: of the order in which parts of a source take turns.
            source_N: number of each sample's source; without, all samples are shown once.
            weight_S: visits per epoch of the samples of each source.
        """
        self.num_samples, self.num, self.passes = num_samples, num_samples, 1
        self._source_N = source_N
        if source_N is not None:
            assert weight_S is not None
            sizes_S = np.bincount(source_N, minlength=len(weight_S))
            whole_S = np.floor(weight_S).astype(np.int64)
            self._sizes_S = sizes_S
            self._visits_S = whole_S * sizes_S + np.rint((weight_S - whole_S) * sizes_S).astype(int)
            self.num = int(self._visits_S.sum())
            self.passes = int(whole_S.max()) + 1
            order = _shuffled_within(source_N, np.random.default_rng([seed, 0, 1]))
            self._turn_N = np.empty_like(order)
            self._turn_N[order] = _places(sizes_S)

    @classmethod
    def of_index(
        cls, index_folder: Path, num_samples: int, weights: Mapping[str, float], seed: int
    ) -> Visits:
        """Weigh the sources of an index; a source without weight has 1.

        Raises:
            ConfigError: if it has no such sources.
        """
        if not weights:
            return cls(num_samples, seed)
        table = read_columns(Path(index_folder) / "samples.parquet", ["source"])
        column = table["source"].dictionary_encode().combine_chunks()
        names, source_N = column.dictionary.to_pylist(), column.indices.to_numpy()
        unknown = ", ".join(sorted(weights.keys() - set(names)))
        if unknown:
            known = ", ".join(sorted(filter(None, names))) or "one source without a name"
            raise ConfigError(
                f"source_weights: the training set has no source {unknown}; it has {known}. "
                "Hint: give the names under download.train.sources (kind: mixed)"
            )
        weight_S = np.array([weights.get(name, 1.0) for name in names])
        return cls(num_samples, seed, source_N, weight_S)

    def of_epoch(self, epoch: int) -> EpochVisits:
        """The visits of an epoch, `num` of them."""
        if self._source_N is None:
            epoch_N, zero_N = (np.broadcast_to(each, self.num_samples) for each in (epoch, 0))
            return EpochVisits(np.arange(self.num_samples), epoch_N, zero_N)
        before_N, after_N = self._shown(epoch), self._shown(epoch + 1)
        rows_P = [np.flatnonzero(after_N - before_N > number) for number in range(self.passes)]
        rows_V = np.concatenate(rows_P)
        pass_V = np.repeat(np.arange(self.passes), [len(rows) for rows in rows_P])
        return EpochVisits(rows_V, before_N[rows_V] + pass_V, pass_V)

    def _shown(self, epochs: int) -> np.ndarray:
        """How often the first epochs show each sample: visits go round the shuffled source, sample after sample."""
        visits_N, sizes_N = self._visits_S[self._source_N], self._sizes_S[self._source_N]
        return (epochs * visits_N + self._turn_N) // sizes_N


class UniformBatches:
    """Each epoch is a new random order of all visits, or a shuffle of blocks; its incomplete last batch is dropped."""

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        *,
        visits: Visits | None = None,
        shuffle_block: int | None = None,
    ) -> None:
        """Check the sizes.

        Args:
            num_samples: rows are 0 .. num_samples - 1.
            batch_size: global batch size.
            seed: of the order.
            visits: what an epoch shows; by default every row once.
            shuffle_block: shuffle blocks of so many neighbours, and the samples of every 8 blocks, so that the
                storage is read in long stretches.

        Raises:
            ConfigError: if the data cannot fill one batch.
        """
        self.visits = visits or Visits(num_samples, seed)
        _check_sizes(self.visits.num, batch_size)
        self.batch_size, self.seed, self.shuffle_block = batch_size, seed, shuffle_block
        self.num_batches = self.visits.num // batch_size
        self._drawn = lru_cache(1)(self._draw)

    def batch(self, step: int) -> Rows:
        """The global batch of a step; there are no labels to mix."""
        epoch, number = divmod(step, self.num_batches)
        rows, visits = self._drawn(epoch)
        own = slice(number * self.batch_size, (number + 1) * self.batch_size)
        return Rows(rows[own], visits[own])

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        order = _order(self.visits.num, self.shuffle_block, rng)
        rows, visits, _ = self.visits.of_epoch(epoch)
        return rows[order], visits[order]


class HomogeneousBatches:
    """Batches of one pseudo label each; what is left of the labels is packed into mixed batches.

    Of each label, shuffled, come as many whole batches as there are. The remainders are laid end to end, label by
    label in a random order of labels, and cut into batches too: mixed ones, whose loss must mask pairs of other
    labels. At most one incomplete batch is dropped. The batches come in random order.

    Where sources weigh more than 1, each pass over the data has labels of its own (`labels_by_pass`), in mixed batches
    too: or a sample would stand among its own negatives.
    """

    def __init__(
        self,
        labels_N: np.ndarray,
        batch_size: int,
        seed: int,
        *,
        visits: Visits | None = None,
        shuffle_block: int | None = None,
    ) -> None:
        """Check the sizes.

        Args:
            labels_N: pseudo label of each sample, from 0.
            batch_size: global batch size.
            seed: of the order.
            visits: what an epoch shows; by default every row once.
            shuffle_block: as of UniformBatches, within each label.

        Raises:
            ConfigError: if the data cannot fill one batch.
        """
        self.visits = visits or Visits(len(labels_N), seed)
        _check_sizes(self.visits.num, batch_size)
        self.batch_size, self.seed, self.shuffle_block = batch_size, seed, shuffle_block
        self.num_batches = self.visits.num // batch_size
        self._labels_N, self._num_labels = labels_N, int(labels_N.max()) + 1
        self._drawn = lru_cache(1)(self._draw)

    def batch(self, step: int) -> Rows:
        """The global batch of a step, with its labels if it has several."""
        epoch, number = divmod(step, self.num_batches)
        visits, order, place, num_homogeneous = self._drawn(epoch)
        first = place[number] * self.batch_size
        own = order[first : first + self.batch_size]
        shown, group_B = EpochVisits(*(each[own] for each in visits)), None
        if place[number] >= num_homogeneous:
            group_B = labels_by_pass(self._labels_N, shown, self.visits.passes)
        return Rows(shown.rows_V, shown.visit_V, group_B)

    def _draw(self, epoch: int) -> tuple[EpochVisits, np.ndarray, np.ndarray, int]:
        """Visits of an epoch, their order with homogeneous batches first, the order of the batches, number of the first."""
        rng = np.random.default_rng([self.seed, epoch])
        visits = self.visits.of_epoch(epoch)
        label = labels_by_pass(self._labels_N, visits, self.visits.passes)
        # Labels in a random order, or the same ones would lose their remainder in every epoch.
        label = rng.permutation(self._num_labels * self.visits.passes)[label]
        whole, rest = _by_label(label, self.batch_size, self.shuffle_block, rng)
        place = rng.permutation(self.num_batches)
        return visits, np.concatenate([whole, rest]), place, len(whole) // self.batch_size


class RoundRobinBatches:
    """Homogeneous batches as CLIP-MoE publishes them: one of each label in turn, labels that are used up left out.

    What does not fill a batch of its label is lost in that epoch: with 729 labels of 1 M samples and batches of 800 about
    a quarter of them, and labels smaller than a batch for good. The last batches of an epoch, at the lowest learning
    rate, are all of the largest label. (One order for all processes, though; theirs had one each, and lost a third.)
    """

    def __init__(self, labels_N: np.ndarray, batch_size: int, seed: int) -> None:
        """Order the labels of the batches, which is the same for every epoch.

        Args:
            labels_N: pseudo label of each sample, from 0.
            batch_size: global batch size.
            seed: of the order within labels.

        Raises:
            ConfigError: if no label fills a batch.
        """
        self.batch_size, self.seed, self._labels_N = batch_size, seed, labels_N
        whole_C = np.bincount(labels_N) // batch_size
        label = np.repeat(np.arange(len(whole_C)), whole_C)
        self._turns = np.lexsort((label, _places(whole_C)))
        self.num_batches = len(label)
        if not self.num_batches:
            raise ConfigError(
                f"batch_order: round_robin with batch_size = {batch_size:,} has no batches: the largest of "
                f"{len(whole_C):,} pseudo labels has {np.bincount(labels_N).max():,} samples. "
                "Hint: a smaller batch, or batch_order: shuffled"
            )
        self._drawn = lru_cache(1)(self._draw)

    def batch(self, step: int) -> Rows:
        """The global batch of a step, of one label."""
        epoch, number = divmod(step, self.num_batches)
        first = self._turns[number] * self.batch_size
        rows_B = self._drawn(epoch)[first : first + self.batch_size]
        return Rows(rows_B, np.broadcast_to(epoch, len(rows_B)))

    def _draw(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        return _by_label(self._labels_N, self.batch_size, None, rng)[0]


def labels_by_pass(labels_N: np.ndarray, visits: EpochVisits, passes: int) -> np.ndarray:
    """Labels of visits, of each pass its own: no sample has one twice.

    Args:
        labels_N: pseudo label of each sample, from 0.
        visits: of one epoch.
        passes: over the data, of which an epoch is made at most.
    """
    return labels_N[visits.rows_V] * passes + visits.pass_V


def share_homogeneous(labels_N: np.ndarray, batch_size: int) -> float:
    """Share of the visits that are in batches of their own label; the others are packed, or lost to round-robin."""
    sizes_C = np.bincount(labels_N)
    return float((sizes_C // batch_size * batch_size).sum() / sizes_C.sum())


def _by_label(
    label: np.ndarray, batch_size: int, block: int | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """What fills batches of its label, and what is left; both label by label, random within."""
    order = _shuffled_within(label if block is None else _windows(label, block, rng), rng)
    sizes_C = np.bincount(label)
    is_whole = _places(sizes_C) < np.repeat(sizes_C // batch_size * batch_size, sizes_C)
    return order[is_whole], order[~is_whole]


def _shuffled_within(group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An order of everything, group by group, random within: numbers of (group, random, place), sorted.

    No sample is looked up, so it takes a tenth of what a permutation does, and 100,000 groups no longer than ten. What
    draws the same random bits stays in order; there are at least 17 of them for 100 M samples of 1 M groups.
    """
    num = len(group)
    place_bits, group_bits = num.bit_length(), int(group.max()).bit_length()
    random_bits = 64 - place_bits - group_bits
    keys = rng.integers(1 << random_bits, size=num, dtype=np.uint64)
    keys <<= np.uint64(place_bits)
    keys |= np.arange(num, dtype=np.uint64)
    keys |= group.astype(np.uint64) << np.uint64(64 - group_bits) if group_bits else np.uint64(0)
    keys.sort()
    keys &= np.uint64((1 << place_bits) - 1)
    return keys.view(np.int64)


def _windows(label: np.ndarray, block: int, rng: np.random.Generator) -> np.ndarray:
    """The group of each, to be shuffled together: a few blocks, drawn at random, of neighbours of its label.

    Groups are numbered label by label, those of a label in random order.
    """
    sizes_C = np.bincount(label)
    num_blocks_C = -(-sizes_C // block)
    drawn = _shuffled_within(np.repeat(np.arange(len(sizes_C)), num_blocks_C), rng)
    group_of_block = np.empty(len(drawn), np.int64)
    group_of_block[drawn] = (_places(num_blocks_C) % _BLOCKS == 0).cumsum()
    group = np.empty(len(label), np.int64)
    is_first = _places(sizes_C) % block == 0
    group[np.argsort(label, kind="stable")] = group_of_block[is_first.cumsum() - 1]
    return group


def _places(sizes: np.ndarray) -> np.ndarray:
    """0 .. size - 1 of each, one after the other."""
    return np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)


def _order(count: int, block: int | None, rng: np.random.Generator) -> np.ndarray:
    """A random order of 0 .. count - 1: of all, or of blocks of neighbours and within every few blocks."""
    if block is None:
        return rng.permutation(count)
    first_of_block = rng.permutation(-(-count // block)) * block
    order = (first_of_block[:, None] + np.arange(min(block, count))).ravel()
    order = order[order < count]
    for first in range(0, count, block * _BLOCKS):
        rng.shuffle(order[first : first + block * _BLOCKS])
    return order


def _check_sizes(num_visits: int, batch_size: int) -> None:
    if batch_size > num_visits:
        raise ConfigError(
            f"batch_size = {batch_size:,} is larger than the data ({num_visits:,} samples). "
            f"Hint: set batch_size to at most {num_visits}, or use more data"
        )
