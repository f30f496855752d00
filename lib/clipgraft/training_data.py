"""The training set: images and tokens of the same samples, and batches of all of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from clipgraft.config import ConfigError
from clipgraft.data.loader import Batch
from clipgraft.data.sampler import UniformBatches, Visits
from clipgraft.data.shards import Shards
from clipgraft.data.tokens import Tokens
from clipgraft.recipes import TrainSettings


@dataclass(frozen=True)
class Data:
    """Images and tokens of the training set, row for row."""

    shards: Shards
    tokens: Tokens
    index: Path

    @classmethod
    def open(cls, index: Path, shard: Path) -> Data:
        """Open both and check that they are of the same samples.

        Raises:
            ConfigError: if they are not.
        """
        data = cls(Shards.open(shard), Tokens.open(index), index)
        if data.shards.samples_id != data.tokens.samples_id:
            raise ConfigError(
                f"{shard} holds samples {data.shards.samples_id}, {index} holds {data.tokens.samples_id}: they are not "
                "of one data set. Hint: give the shards that were made from this index"
            )
        return data

    def visits(self, settings: TrainSettings, seed: int) -> Visits:
        """What an epoch shows, after the weights of the sources."""
        return Visits.of_index(self.index, len(self.shards), settings.source_weights, seed)


def ordinary_batches(data: Data, settings: TrainSettings, seed: int) -> UniformBatches:
    """Batches of the whole data set, in the order that the settings ask for."""
    return UniformBatches(
        len(data.shards),
        settings.batch_size,
        seed,
        visits=data.visits(settings, seed),
        shuffle_block=settings.shuffle_block,
    )


def split(batch: Batch, num_parts: int) -> list[Batch]:
    """Parts of a batch, each of as many rows."""
    size = len(batch.rows_B) // num_parts
    parts = []
    for first in range(0, size * num_parts, size):
        rows: dict[str, Any] = {
            field.name: value[first : first + size]
            for field in fields(batch)
            if isinstance(value := getattr(batch, field.name), Tensor)
        }
        parts.append(replace(batch, **rows))
    return parts
