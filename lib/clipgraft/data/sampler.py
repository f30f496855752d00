"""Which rows make up the batch of a step: pure functions of (seed, step), so a run can be resumed anywhere.

Nothing is buffered or stored: an epoch's order is computed from the seed and the epoch. Both samplers drop what
does not fill the last batch of an epoch; the next epoch leaves out other samples.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from clipgraft.config import ConfigError


class UniformBatches:
    """Each epoch is a new random order of all samples; its incomplete last batch is dropped."""

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        """Check the sizes.

        Args:
            num_samples: rows are 0 .. num_samples - 1.
            batch_size: global batch size.
            seed: of the order.

        Raises:
            ConfigError: if the data cannot fill one batch.
        """
        _check_sizes(num_samples, batch_size)
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.num_batches = num_samples // batch_size
        self._order = lru_cache(maxsize=2)(self._draw)

    def batch(self, step: int) -> tuple[np.ndarray, bool]:
        """Rows of the global batch of a step, and False: there are no labels to mix."""
        epoch, number = divmod(step, self.num_batches)
        begin = number * self.batch_size
        return self._order(epoch)[begin : begin + self.batch_size], False

    def _draw(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)


class HomogeneousBatches:
    """Batches of one pseudo label each; what is left of the labels is packed into mixed batches.

    Of each label, shuffled, come as many whole batches as there are. The remainders are laid end to end, label by
    label in a random order of labels, and cut into batches too: mixed ones, whose loss must mask pairs of other
    labels. At most one incomplete batch is dropped. The batches come in random order.
    """

    def __init__(self, labels: np.ndarray, batch_size: int, seed: int) -> None:
        """Sort rows by label.

        Args:
            labels: one integer per row.
            batch_size: global batch size.
            seed: of the order.

        Raises:
            ConfigError: if the data cannot fill one batch.
        """
        _check_sizes(len(labels), batch_size)
        self.batch_size, self.seed = batch_size, seed
        self.num_batches = len(labels) // batch_size
        order = np.argsort(labels, kind="stable")
        _, sizes = np.unique(labels, return_counts=True)
        self._groups = np.split(order, np.cumsum(sizes)[:-1])
        self.num_homogeneous = int(
            (sizes // batch_size).sum()
        )  # of num_batches; the others are mixed
        self._epoch = lru_cache(maxsize=2)(self._draw)

    def batch(self, step: int) -> tuple[np.ndarray, bool]:
        """Rows of the global batch of a step, and whether they have several labels."""
        epoch, number = divmod(step, self.num_batches)
        rows, place = self._epoch(epoch)
        return rows[place[number]], bool(place[number] >= self.num_homogeneous)

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Batches of an epoch [num_batches, batch_size], homogeneous ones first, and the order of use."""
        rng = np.random.default_rng([self.seed, epoch])
        whole, rest = [], []
        for group in self._groups:
            shuffled = rng.permutation(group)
            cut = len(shuffled) // self.batch_size * self.batch_size
            whole.append(shuffled[:cut])
            rest.append(shuffled[cut:])
        # A random order of labels, or the same labels would lose their remainder in every epoch.
        packed = [rest[label] for label in rng.permutation(len(rest))]
        rows = np.concatenate(whole + packed)[: self.num_batches * self.batch_size]
        return rows.reshape(self.num_batches, self.batch_size), rng.permutation(self.num_batches)


def _check_sizes(num_samples: int, batch_size: int) -> None:
    if batch_size > num_samples:
        raise ConfigError(
            f"batch_size = {batch_size:,} is larger than the data ({num_samples:,} samples). "
            f"Hint: set batch_size to at most {num_samples}, or use more data"
        )
