"""Batches for training: threads read, decode, crop and resize ahead of the model.

Threads suffice, because reading, decoding and resizing leave the interpreter's lock alone. What a batch holds is a
pure function of (seed, step): the numbers of a sample come from (seed, row, visit), for the whole batch at once, so
neither the number of threads nor the number of processes changes a pixel, and a run can begin at any step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clipgraft.config import ConfigError
from clipgraft.data.augment import NUM_UNIFORM
from clipgraft.data.cached import ReferenceCache, shared_crops
from clipgraft.data.crops import random_boxes, whole_boxes
from clipgraft.data.draws import as_uniform, draw_bits
from clipgraft.data.sampler import Rows
from clipgraft.data.shards import Shards
from clipgraft.data.tokens import Tokens
from clipgraft.moe_settings import FIRST_SENTENCE
from clipgraft.reductions import TRUNCATE, TextReduction

_PREFETCH = 3  # batches under way

# Columns of the random words of a visit; a new one comes last, so that the others stay as they are.
_CAPTION, _TOKENS, _CROP, _AUGMENT = 0, 1, slice(2, 6), slice(6, 6 + NUM_UNIFORM)
_PATCHES = _AUGMENT.stop
_SHORT = _PATCHES + 1
_VIEW = slice(_CROP.start, _AUGMENT.stop)  # how a picture is shown


Sizes = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Sampler(Protocol):
    """Which rows make up the global batch of a step."""

    batch_size: int

    def batch(self, step: int) -> Rows:
        """Rows, how often they were shown before, and their pseudo labels if these are several."""


@dataclass(frozen=True)
class Batch:
    """This rank's part of one global batch.

    Attributes:
        images_BCHW: uint8; channels last in memory.
        text_BL: token ids, int64.
        rows_B: rows of the samples, int64.
        captions_B: numbers of the drawn captions, among all captions of the data set, int64.
        group_B: pseudo labels, int64, of which each has its own negatives; None where the global batch has one.
        uniform_BK: float32 in [0, 1), what `augment` goes by; None if the loader was not asked for it.
        image_bits_B: int64, a random word that says which patches of an image are kept; None likewise.
        crop_B: int64, which of the stored crops each image is; None where it is none.
        cached_BE: float16, stored embeddings of images and texts by each reference; None where there are none.
        short_BL: as text_BL, of a second caption of each sample; None where there is none.
    """

    images_BCHW: Tensor
    text_BL: Tensor
    rows_B: Tensor
    captions_B: Tensor
    group_B: Tensor | None = None
    uniform_BK: Tensor | None = None
    image_bits_B: Tensor | None = None
    crop_B: Tensor | None = None
    cached_BE: Tensor | None = None
    short_BL: Tensor | None = None


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
        captions: Mapping[str, float] | None = None,
        text_reduction: TextReduction = TRUNCATE,
        augment: bool = False,
        drops_patches: bool = False,
        pin_memory: bool = False,
        caches: Sequence[ReferenceCache] = (),
        sizes: Sizes | None = None,
        squash: bool = False,
        short_captions: str | None = None,
    ) -> None:
        """Check that the parts fit together; work begins with iteration.

        Args:
            shards: images.
            tokens: captions of the same samples.
            sampler: rows of each global batch.
            image_size: side of the images of a batch.
            text_length: tokens per caption, with start and end.
            crop_scale: share of the area that a random crop keeps.
            seed: of crops, of the choice among captions and of augmentation.
            rank: this process gets rows [rank * b, (rank + 1) * b) of a global batch of world * b.
            world: number of processes, which divides a batch.
            num_threads: threads that decode.
            start_step: first step, counted from the beginning of training.
            num_steps: length of the whole training, not of what is left of it.
            captions: how often each kind of caption is drawn; by default all captions of a sample alike.
            text_reduction: what is kept of captions that are too long.
            augment: draw what `augment` needs.
            drops_patches: draw what `models/patches.py` needs.
            pin_memory: put batches where a GPU can fetch them by itself.
            caches: embeddings that are read along; if they have several crops of each sample, these are shown.
            sizes: widths and heights of pictures by row, which boxes are drawn for; by default as stored.
            squash: show all of each picture instead of a crop.
            short_captions: the kind that a second caption is drawn from, or `first_sentence` of the drawn one.

        Raises:
            ConfigError: if a sample has no caption of a kind that is drawn, or caches hold different crops.
        """
        tokens.check_weights(captions or {})
        if short_captions not in (None, FIRST_SENTENCE):
            _check_short(tokens, short_captions)
        assert shards.samples_id == tokens.samples_id and sampler.batch_size % world == 0
        self.shards, self.tokens, self.sampler = shards, tokens, sampler
        self.image_size, self.text_length = image_size, text_length
        self.crop_scale, self.seed = crop_scale, seed
        per_rank = sampler.batch_size // world
        self.own = slice(rank * per_rank, (rank + 1) * per_rank)
        self.num_threads = max(1, num_threads)
        self.start_step, self.num_steps = start_step, num_steps
        self.captions, self.text_reduction = captions or {}, text_reduction
        self.augment, self.drops_patches, self.pin_memory = augment, drops_patches, pin_memory
        self.short_captions = short_captions
        self.caches, self.squash, self.crops = caches, squash, shared_crops(caches)
        assert self.crops is None or self.crops.augmentation.crop_scale == crop_scale
        self.sizes = sizes or (shards.sizes if self.crops is None else self.crops.sizes)
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
        rows, visits, groups = self.sampler.batch(step)
        rows_B = np.array(rows[self.own], np.int64)  # a copy: the batch outlives the epoch's order
        visit_B = visits[self.own]
        count = max(
            _CROP.stop,
            self.augment * _AUGMENT.stop,
            self.drops_patches * (_PATCHES + 1),
            bool(self.short_captions) * (_SHORT + 1),
        )
        bits_BK = draw_bits(self.seed, rows_B, visit_B, count)
        crop_B = None
        if self.crops is not None:
            crop_B = self.crops.choose(self.seed, rows_B, visit_B)
            view = slice(_VIEW.start, min(_VIEW.stop, count))
            bits_BK[:, view] = draw_bits(self.crops.seed, rows_B, crop_B, count)[:, view]
        num_cached = 2 * sum(cache.dim for cache in self.caches)
        size, pin = (len(rows_B), self.image_size, self.image_size, 3), self.pin_memory
        batch = Batch(
            torch.empty(size, dtype=torch.uint8, pin_memory=pin).permute(0, 3, 1, 2),
            torch.empty((len(rows_B), self.text_length), dtype=torch.int64, pin_memory=pin),
            torch.from_numpy(rows_B),
            torch.empty(len(rows_B), dtype=torch.int64),
            None if groups is None else torch.from_numpy(groups[self.own]),
            _uniform(bits_BK[:, _AUGMENT], pin) if self.augment else None,
            _tensor(bits_BK[:, _PATCHES].view(np.int64), pin) if self.drops_patches else None,
            None if crop_B is None else torch.from_numpy(crop_B),
            torch.empty((len(rows_B), num_cached), dtype=torch.float16, pin_memory=pin)
            if self.caches
            else None,
            torch.empty((len(rows_B), self.text_length), dtype=torch.int64, pin_memory=pin)
            if self.short_captions
            else None,
        )
        parts = np.array_split(np.arange(len(rows_B)), min(self.num_threads, len(rows_B)))
        futures = [pool.submit(self._fill_text, batch, bits_BK)]
        for part in parts:
            own = slice(int(part[0]), int(part[-1]) + 1)
            futures.append(pool.submit(self._fill_images, batch, bits_BK, own))
        return _Pending(batch, futures)

    def _fill_images(self, batch: Batch, bits_BK: np.ndarray, own: slice) -> None:
        rows_B = batch.rows_B[own].numpy()
        uniform_B4 = as_uniform(bits_BK[own, _CROP])
        box_B4 = (
            whole_boxes(*self.sizes(rows_B))
            if self.squash
            else random_boxes(*self.sizes(rows_B), uniform_B4, self.crop_scale)
        )
        pixels_BHWC = batch.images_BCHW.permute(0, 2, 3, 1)[own].numpy()
        self.shards.squares(rows_B, box_B4, pixels_BHWC)

    def _fill_text(self, batch: Batch, bits_BK: np.ndarray) -> None:
        uniform_B = as_uniform(bits_BK[:, _CAPTION])
        caption_B = self.tokens.choose(batch.rows_B.numpy(), uniform_B, self.captions)
        text_BL = self.tokens.encode(
            caption_B, self.text_length, self.text_reduction, bits_BK[:, _TOKENS]
        )
        batch.text_BL.copy_(torch.from_numpy(text_BL))
        batch.captions_B.copy_(torch.from_numpy(caption_B))
        if batch.short_BL is not None:
            batch.short_BL.copy_(torch.from_numpy(self._short(batch, caption_B, bits_BK)))
        if batch.cached_BE is not None:
            crop_B = None if batch.crop_B is None else batch.crop_B.numpy()
            read = [cache.read(batch.rows_B.numpy(), caption_B, crop_B) for cache in self.caches]
            batch.cached_BE.copy_(torch.from_numpy(np.concatenate(read, axis=1)))

    def _short(self, batch: Batch, caption_B: np.ndarray, bits_BK: np.ndarray) -> np.ndarray:
        """A second caption: of the kind that was asked for, or how the drawn one begins."""
        how, words_B = (self.text_length, self.text_reduction), bits_BK[:, _TOKENS]
        if self.short_captions == FIRST_SENTENCE:
            length_B = self.tokens.first_sentence(caption_B)
            return self.tokens.encode(caption_B, *how, words_B, length_B)
        assert self.short_captions is not None
        uniform_B = as_uniform(bits_BK[:, _SHORT])
        own_B = self.tokens.choose(batch.rows_B.numpy(), uniform_B, {self.short_captions: 1.0})
        return self.tokens.encode(own_B, *how, words_B)


@dataclass(frozen=True)
class _Pending:
    """A batch that threads are filling."""

    batch: Batch
    futures: list[Future[None]]

    def result(self) -> Batch:
        """Wait for it; an error in a thread comes out here."""
        for future in self.futures:
            future.result()
        return self.batch


def _check_short(tokens: Tokens, kind: str) -> None:
    """Every sample must have a caption of the kind."""
    try:
        tokens.check_weights({kind: 1.0})
    except ConfigError as error:
        raise ConfigError(
            f"short_captions.kind = {kind}: {error}; or kind: {FIRST_SENTENCE}"
        ) from None


def _uniform(bits_BK: np.ndarray, pin: bool) -> Tensor:
    # 24 bits, or float32 would round some of them up to 1.
    uniform_BK = (bits_BK >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    return _tensor(uniform_BK, pin)


def _tensor(array: np.ndarray, pin: bool) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if pin else tensor
