"""Batches for training: threads read, decode, crop and resize ahead of the model.

Threads suffice, because decoding and resizing leave the interpreter's lock alone. What a batch holds is a pure
function of (seed, step): every item has a generator of its own, made from (seed, row, epoch), so neither the
number of threads nor the number of ranks changes a pixel, and a run can begin at any step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from clipgraft.config import ConfigError
from clipgraft.data.images import decode, random_resized_crop
from clipgraft.data.shards import Shards
from clipgraft.data.tokens import Tokens

_PREFETCH = 3  # batches under way

# Streams of an item's generator; Philox counts from here, so they never meet.
_CROP, _CAPTION = 0, 1


class Sampler(Protocol):
    """Which rows make up the global batch of a step."""

    num_batches: int
    batch_size: int

    def batch(self, step: int) -> tuple[np.ndarray, bool]:
        """Rows and whether they mix pseudo labels."""


@dataclass(frozen=True)
class Batch:
    """This rank's part of one global batch.

    Attributes:
        images_BCHW: uint8; channels last in memory.
        text_BL: token ids, int64.
        rows_B: rows of the samples, int64.
        is_mixed: whether the global batch holds several pseudo labels.
    """

    images_BCHW: torch.Tensor
    text_BL: torch.Tensor
    rows_B: torch.Tensor
    is_mixed: bool


class Loader:
    """Iterates over the batches of steps start_step .. num_steps - 1.

    Attributes:
        wait_seconds: how long the consumer has waited for batches so far.
    """

    def __init__(
        self,
        shards: Shards,
        tokens: Tokens,
        sampler: Sampler,
        *,
        image_size: int,
        text_length: int,
        crop_scale: tuple[float, float],
        seed: int,
        rank: int = 0,
        world: int = 1,
        num_threads: int = 1,
        start_step: int = 0,
        num_steps: int,
    ) -> None:
        """Check that the parts fit together; work begins with iteration.

        Args:
            shards: images.
            tokens: captions of the same samples.
            sampler: rows of each global batch.
            image_size: side of the images of a batch.
            text_length: tokens per caption, with start and end.
            crop_scale: share of the area that a random crop keeps.
            seed: of crops and of the choice among captions.
            rank: this process gets rows [rank * b, (rank + 1) * b) of a global batch of world * b.
            world: number of processes.
            num_threads: threads that decode.
            start_step: first step, counted from the beginning of training.
            num_steps: length of the whole training, not of what is left of it.

        Raises:
            ConfigError: if shards and tokens are of different samples, or ranks cannot share a batch evenly.
        """
        if shards.samples_id != tokens.samples_id:
            raise ConfigError(
                f"the shards are of samples {shards.samples_id}, the tokens of {tokens.samples_id}. "
                "Hint: both must come from the same index"
            )
        if sampler.batch_size % world:
            raise ConfigError(
                f"batch_size = {sampler.batch_size} cannot be shared by {world} processes. "
                f"Hint: use a multiple of {world}"
            )
        self.shards, self.tokens, self.sampler = shards, tokens, sampler
        self.image_size, self.text_length, self.crop_scale, self.seed = (
            image_size,
            text_length,
            crop_scale,
            seed,
        )
        per_rank = sampler.batch_size // world
        self.own = slice(rank * per_rank, (rank + 1) * per_rank)
        self.num_threads, self.start_step, self.num_steps = (
            max(1, num_threads),
            start_step,
            num_steps,
        )
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="loader")
        steps = iter(range(self.start_step, self.num_steps))
        pending: deque[_Pending] = deque()
        try:
            while True:
                while len(pending) < _PREFETCH and (step := next(steps, None)) is not None:
                    pending.append(self._submit(pool, step))
                if not pending:
                    return
                started = time.perf_counter()
                batch = pending.popleft().result()
                self.wait_seconds += time.perf_counter() - started
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, step: int) -> _Pending:
        rows, is_mixed = self.sampler.batch(step)
        rows = rows[self.own]
        epoch = step // self.sampler.num_batches
        pixels = np.empty((len(rows), self.image_size, self.image_size, 3), np.uint8)
        text = np.empty((len(rows), self.text_length), np.int64)
        parts = np.array_split(np.arange(len(rows)), min(self.num_threads, len(rows)))
        futures = [pool.submit(self._fill, pixels, text, rows, epoch, part) for part in parts]
        return _Pending(futures, pixels, text, rows, is_mixed)

    def _fill(
        self, pixels: np.ndarray, text: np.ndarray, rows: np.ndarray, epoch: int, part: np.ndarray
    ) -> None:
        choice = np.empty(len(part), np.int64)
        for k, i in enumerate(part):
            row = int(rows[i])
            image = decode(self.shards.jpeg(row))
            rng = _generator(self.seed, row, epoch, _CROP)
            pixels[i] = random_resized_crop(image, self.image_size, self.crop_scale, rng)
            choice[k] = _generator(self.seed, row, epoch, _CAPTION).integers(2**31)
        text[part] = self.tokens.batch(rows[part], self.text_length, choice)


@dataclass(frozen=True)
class _Pending:
    """A batch that threads are filling."""

    futures: list[Future[None]]
    pixels: np.ndarray
    text: np.ndarray
    rows: np.ndarray
    is_mixed: bool

    def result(self) -> Batch:
        """Wait for it; an error in a thread comes out here."""
        for future in self.futures:
            future.result()
        images = torch.from_numpy(self.pixels).permute(0, 3, 1, 2)
        return Batch(
            images, torch.from_numpy(self.text), torch.from_numpy(self.rows.copy()), self.is_mixed
        )


def _generator(seed: int, row: int, epoch: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, row], counter=[0, 0, epoch, stream]))
