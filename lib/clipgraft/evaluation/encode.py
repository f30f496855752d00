"""Features of images and texts, for evaluation: in float32, batch by batch, in memory or in a file.

A table of results must not depend on which hardware has bf16. Batch sizes and threads change nothing but speed.
On a CPU each thread has a batch of its own, from the file to the feature, and one thread of torch for it: no core waits
for another one's part of a product, nor a product for pictures. Where somebody looks into the model at each batch, and
on a GPU, batches come one after the other.
"""

# Shapes: N images, B batch, H side of an image, L tokens, U texts, D embedding

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.config import ConfigError
from clipgraft.data.images import BadImage, prepare
from clipgraft.data.tokens import Tokenizer
from clipgraft.devices import float32_products
from clipgraft.evaluation.rows import Rows, collect
from clipgraft.lean import open_clip
from clipgraft.models.build import normalize, trimmed

log = logging.getLogger(__name__)

BATCH = {"cpu": 64, "cuda": 256}  # on a CPU, what is computed of a batch stays in its cache
# Bytes of a picture: below, threads that decode at once hold one another up, as most of the work is Python's own.
SMALL = 3 * 96**2
SORTED = 16_384  # texts that are put in the order of their length before they become batches

Watch = Callable[[Any], None]  # told of every batch after its forward
Texts = Callable[[list[str]], Tensor]


class Pictures(Protocol):
    """Images in order: samples of an index, or of another form of data set."""

    def __len__(self) -> int:
        """How many."""

    def pixels(self, row: int) -> np.ndarray:
        """The decoded image, uint8 RGB [height, width, 3].

        Raises:
            ConfigError: names the image, if it cannot be decoded.
        """


def encode_images(
    model: open_clip.CustomTextCLIP,
    preprocess: Mapping[str, Any],
    samples: Pictures,
    device: torch.device,
    threads: int,
    batch_size: int | None = None,
    watch: Watch | None = None,
    *,
    ahead: Callable[[range], None] | None = None,
    file: Path | None = None,
) -> Rows:
    """L2-normalised float32 features of all images, `[N, D]`, on the device.

    Args:
        model: in evaluation mode, on the device.
        preprocess: how it wants images, as in its spec.
        samples: whose images.
        device: of the model.
        threads: for decoding; where each may have a batch of its own, for all that is done.
        batch_size: images at a time; None: what suits the device and the threads.
        watch: told how many images a batch had.
        ahead: told the rows of a batch before its forward.
        file: where features go if they are many.
    Raises:
        ConfigError: if an image cannot be decoded.
    """
    num = len(samples)
    how = [preprocess[key] for key in ("size", "resize_mode", "interpolation")]

    take_turns = threading.Lock()

    def load(rows: range) -> list[np.ndarray]:
        first = samples.pixels(rows[0])
        with take_turns if first.size < SMALL else nullcontext():
            others = (samples.pixels(row) for row in rows[1:])
            return [
                _prepared(pixels, row, how)
                for row, pixels in zip(rows, chain([first], others), strict=True)
            ]

    def encode(images: Sequence[np.ndarray]) -> Tensor:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)
        images_BCHH = normalize(pixels, preprocess["mean"], preprocess["std"])
        return F.normalize(model.encode_image(images_BCHH).float(), dim=-1)

    def one_by_one(size: int) -> Generator[Tensor, None, None]:
        for rows, images in _loaded(load, _batches(num, size), threads):
            if ahead is not None:
                ahead(rows)
            yield encode(images)
            if watch is not None:
                watch(len(rows))

    if watch is None and ahead is None and _takes_many(model, device):
        batches = _batches(num, batch_size or own_batch(threads))
        parts = _in_threads(lambda rows: encode(load(rows)), batches, threads)
    else:
        parts = one_by_one(batch_size or BATCH[device.type])
    with closing(parts):
        told = _told(parts, num)
        return torch.cat(list(told)) if file is None else collect(told, num, file)


def encoder_of_texts(
    model: open_clip.CustomTextCLIP,
    tokenizer: Tokenizer,
    length: int,
    device: torch.device,
    batch_size: int | None = None,
    watch: Watch | None = None,
    cut: int | None = None,
) -> Texts:
    """A function from texts to L2-normalised float32 features on the device.

    Args:
        model: in evaluation mode, on the device.
        tokenizer: its own.
        length: tokens of a text.
        device: of the model.
        batch_size: texts at a time; None: what suits the device.
        watch: told the ids of a batch; batches are then in order.
        cut: texts lose what goes beyond so many tokens; they are still as long as `length`, with padding.
    """
    size = batch_size or BATCH[device.type]

    def encode(texts: list[str]) -> Tensor:
        text_UL = torch.from_numpy(tokenizer.encode_batch(texts, cut or length))
        text_UL = F.pad(text_UL, (0, length - text_UL.shape[1]))
        # Texts of one length side by side: less padding. 0 is padding at the end of a text only.
        length_U = (text_UL.flip(1) != 0).byte().argmax(1) if watch is None else torch.zeros(1)
        order = torch.argsort(-length_U, stable=True) if watch is None else torch.arange(len(texts))
        parts = []
        for start in range(0, len(texts), size):
            text_BL = trimmed(model, text_UL[order[start : start + size]])
            features = model.encode_text(text_BL.to(device))
            parts.append(F.normalize(features.float(), dim=-1))
            if watch is not None:
                watch(text_BL)
        return torch.cat(parts)[torch.argsort(order).to(device)]

    return encode


def encode_texts(encode: Texts, texts: Sequence[str], file: Path) -> Rows:
    """Features of any number of texts, `[U, D]`; if they are many, they go to a file."""
    starts = range(0, len(texts), SORTED)
    return collect((encode(list(texts[s : s + SORTED])) for s in starts), len(texts), file)


def own_batch(threads: int) -> int:
    """Images that a thread takes at a time: fewer of many threads, for all their batches are in memory."""
    return max(8, min(48, 384 // threads))


def check_finite(features_ND: Rows, model_folder: Path) -> None:
    """Find what a diverged model gives.

    Raises:
        ConfigError: if a feature is not finite.
    """
    num = len(features_ND)
    blocks = (features_ND[start : start + SORTED] for start in range(0, num, SORTED))
    num_bad = sum(int((~block.isfinite().all(dim=1)).sum()) for block in blocks)
    if num_bad:
        raise ConfigError(
            f"{model_folder}: {num_bad:,} of {num:,} features are not finite, the model "
            "has diverged. Hint: look at the loss in its metrics.jsonl; try a lower optim.lr"
        )


@contextmanager
def true_float32() -> Iterator[None]:
    """A context in which float32 is that."""
    # cuDNN rounds convolutions (the patch embedding) to TF32 unless told otherwise.
    with float32_products(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def _prepared(pixels: np.ndarray, row: int, how: Sequence[Any]) -> np.ndarray:
    try:
        return prepare(pixels, *how)
    except BadImage as error:
        raise ConfigError(f"picture {row} of the data set cannot be shown to the model: {error}") from None  # fmt: skip


def _takes_many(model: nn.Module, device: torch.device) -> bool:
    """Whether several threads may have a batch in a model at once."""
    # Towers with experts keep which forward they are in and what it chose: they take one batch after the other.
    has_experts = any(hasattr(tower, "moe_state") for tower in model.modules())
    return device.type == "cpu" and not has_experts


def _in_threads(
    encode: Callable[[range], Tensor], batches: Iterable[range], threads: int
) -> Generator[Tensor, None, None]:
    """Features of batches, in row order, by threads that have one each; as many wait for their turn."""

    def work(rows: range) -> Tensor:
        with torch.inference_mode():  # a thread has a mode of its own
            return encode(rows)

    with _pool(threads) as pool:
        begun: deque[Future[Tensor]] = deque()
        for rows in batches:
            begun.append(pool.submit(work, rows))
            if len(begun) == 2 * threads:
                yield begun.popleft().result()
        for future in begun:
            yield future.result()


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads with one thread of torch each; afterwards torch has as many as before. What has not begun is dropped."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # the last number that was set is that of all threads to come


def _batches(num: int, size: int) -> Iterator[range]:
    """All rows, so many at a time."""
    return (range(first, min(first + size, num)) for first in range(0, num, size))


def _loaded(
    load: Callable[[range], list[np.ndarray]], batches: Iterable[range], threads: int
) -> Iterator[tuple[range, list[np.ndarray]]]:
    """Rows and their images, in row order, loaded by all threads together; one batch is prepared ahead."""
    with ThreadPoolExecutor(threads) as pool:
        ahead: list[Any] = []
        for rows in batches:
            share = -(-len(rows) // threads)  # an image is too little for a task of its own
            parts = [rows[first : first + share] for first in range(0, len(rows), share)]
            ahead.append((rows, [pool.submit(load, part) for part in parts]))
            if len(ahead) > 1:
                yield _waited(*ahead.pop(0))
        for batch in ahead:
            yield _waited(*batch)


def _waited(rows: range, futures: Sequence[Any]) -> tuple[range, list[np.ndarray]]:
    return rows, [image for future in futures for image in future.result()]


def _told(parts: Iterable[Tensor], num: int) -> Iterator[Tensor]:
    """The same, with a line in the log every 10 s."""
    start = spoke = time.monotonic()
    done = 0
    for features_BD in parts:
        yield features_BD
        done += len(features_BD)
        if time.monotonic() - spoke > 10:
            spoke = time.monotonic()
            rate = done / (spoke - start)
            log.info("%s of %s images  %s/s", f"{done:,}", f"{num:,}", f"{rate:,.0f}")
