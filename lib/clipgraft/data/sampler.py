"""Which rows make up the batch of a step: pure functions of (seed, step), so a run can be resumed anywhere.

Nothing is buffered: an epoch's order is computed from the seed and the epoch when its first batch is asked for, and
kept until the next one is. An epoch shows each sample once (or as often as its source weighs), over all processes
together. What does not fill the last batch of an epoch is dropped; the next epoch drops other samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from clipgraft.config import ConfigError

_BLOCKS = 8  # blocks that are shuffled together


class Rows(NamedTuple):
    """One global batch.

    Attributes:
        rows_B: rows of the samples.
        visit_B: how often each has been shown before, at most; with (seed, row) it names a visit.
        is_mixed: whether the rows have several pseudo labels.
    """

    rows_B: np.ndarray
    visit_B: np.ndarray
    is_mixed: bool


class Visits:
    """What an epoch shows: every sample once, or as often as the weight of its source says.

    A weight of 2.5 shows all samples of a source twice, and a random half of them, another one in each epoch, a
    third time.

    Attributes:
        num: visits per epoch, the same for every epoch.
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
            seed: of the random parts.
            source_N: number of each sample's source; without, all samples are shown once.
            weight_S: visits per epoch of the samples of each source.
        """
        self.num_samples, self.seed, self.num, self.passes = num_samples, seed, num_samples, 1
        self._source_N = source_N
        if source_N is not None:
            assert weight_S is not None
            sizes_S = np.bincount(source_N, minlength=len(weight_S))
            self._whole_S = np.floor(weight_S).astype(np.int64)
            self._part_S = np.rint((weight_S - self._whole_S) * sizes_S).astype(np.int64)
            self.num = int((self._whole_S * sizes_S + self._part_S).sum())
            self.passes = int(self._whole_S.max()) + 1

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
        file = pq.ParquetFile(Path(index_folder) / "samples.parquet")
        names, source_N = [""], np.zeros(num_samples, np.int64)
        if "source" in file.schema_arrow.names:
            column = file.read(["source"])["source"].combine_chunks().dictionary_encode()
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

    def of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and visit numbers [num], one pass over the data after the other, rising within a pass."""
        if self._source_N is None:
            return np.arange(self.num_samples), np.broadcast_to(epoch, self.num_samples)
        rng = np.random.default_rng([self.seed, epoch, 1])
        last_N = self._whole_S[self._source_N]  # passes that show a sample
        for source, part in enumerate(self._part_S):
            rows = np.flatnonzero(self._source_N == source)
            last_N[rng.choice(rows, part, replace=False)] += 1
        passes = [np.flatnonzero(last_N > number) for number in range(self.passes)]
        number = np.repeat(np.arange(self.passes), [len(rows) for rows in passes])
        return np.concatenate(passes), epoch * self.passes + number


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
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def batch(self, step: int) -> Rows:
        """The global batch of a step; there are no labels to mix."""
        epoch, number = divmod(step, self.num_batches)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, *self._draw(epoch))
        _, rows, visits = self._epoch
        own = slice(number * self.batch_size, (number + 1) * self.batch_size)
        return Rows(rows[own], visits[own], False)

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        order = _order(self.visits.num, self.shuffle_block, rng)
        rows, visits = self.visits.of_epoch(epoch)
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
        self._epoch: tuple[int, tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray, int] | None
        self._epoch = None

    def batch(self, step: int) -> Rows:
        """The global batch of a step, and whether it has several labels."""
        epoch, number = divmod(step, self.num_batches)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, *self._draw(epoch))
        _, (rows, visits), order, place, num_homogeneous = self._epoch
        first = place[number] * self.batch_size
        own = order[first : first + self.batch_size]
        return Rows(rows[own], visits[own], bool(place[number] >= num_homogeneous))

    def _draw(
        self, epoch: int
    ) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray, int]:
        """Visits of an epoch, their order with homogeneous batches first, the order of the batches, number of the first."""
        rng = np.random.default_rng([self.seed, epoch])
        visits = self.visits.of_epoch(epoch)
        label = labels_by_pass(self._labels_N, *visits, self.visits.passes)
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
        self._epoch: tuple[int, np.ndarray] | None = None

    def batch(self, step: int) -> Rows:
        """The global batch of a step, of one label."""
        epoch, number = divmod(step, self.num_batches)
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch = (epoch, _by_label(self._labels_N, self.batch_size, None, rng)[0])
        first = self._turns[number] * self.batch_size
        rows = self._epoch[1][first : first + self.batch_size]
        return Rows(rows, np.broadcast_to(epoch, len(rows)), False)


def labels_by_pass(
    labels_N: np.ndarray, rows: np.ndarray, visit: np.ndarray, passes: int
) -> np.ndarray:
    """Labels of visits, of each pass its own: no sample has one twice.

    Args:
        labels_N: pseudo label of each sample, from 0.
        rows: samples that are visited.
        visit: numbers of the visits.
        passes: over the data, of which an epoch is made.
    """
    label = labels_N[rows]
    return label if passes == 1 else label + (int(labels_N.max()) + 1) * (visit % passes)


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
