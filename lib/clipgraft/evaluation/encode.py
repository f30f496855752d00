"""Features of images and texts, for evaluation: in float32, batch by batch, in memory or in a file.

A table of results must not depend on which hardware has bf16. Batch sizes and threads change nothing but speed.
"""

# Shapes: N images, B batch, H side of an image, L tokens, U texts, D embedding

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.config import ConfigError
from clipgraft.data.images import prepare
from clipgraft.data.tokens import Tokenizer
from clipgraft.devices import float32_products
from clipgraft.evaluation.rows import Rows, collect
from clipgraft.lean import open_clip
from clipgraft.models.build import normalize, trimmed

log = logging.getLogger(__name__)

BATCH = {"cpu": 64, "cuda": 256}  # on a CPU, what is computed of a batch stays in its cache
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
    batch_size: int,
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
        threads: for decoding.
        batch_size: images at a time.
        watch: told how many images a batch had.
        ahead: told the rows of a batch before its forward.
        file: where features go if they are many.
    Raises:
        ConfigError: if an image cannot be decoded.
    """
    num = len(samples)

    def parts() -> Iterator[Tensor]:
        start = spoke = time.monotonic()
        for rows, pixels_BHHC in batches_of_pixels(samples, preprocess, threads, batch_size):
            if ahead is not None:
                ahead(rows)
            pixels = torch.from_numpy(pixels_BHHC).permute(0, 3, 1, 2).to(device)
            images = normalize(pixels, preprocess["mean"], preprocess["std"])
            yield F.normalize(model.encode_image(images).float(), dim=-1)
            if watch is not None:
                watch(len(images))
            if time.monotonic() - spoke > 10:
                spoke = time.monotonic()
                rate = rows.stop / (spoke - start)
                log.info("%s of %s images  %s/s", f"{rows.stop:,}", f"{num:,}", f"{rate:,.0f}")

    return torch.cat(list(parts())) if file is None else collect(parts(), num, file)


def encoder_of_texts(
    model: open_clip.CustomTextCLIP,
    tokenizer: Tokenizer,
    length: int,
    device: torch.device,
    batch_size: int,
    watch: Watch | None = None,
    cut: int | None = None,
) -> Texts:
    """A function from texts to L2-normalised float32 features on the device.

    Args:
        model: in evaluation mode, on the device.
        tokenizer: its own.
        length: tokens of a text.
        device: of the model.
        batch_size: texts at a time.
        watch: told the ids of a batch; batches are then in order.
        cut: texts lose what goes beyond so many tokens; they are still as long as `length`, with padding.
    """

    def encode(texts: list[str]) -> Tensor:
        text_UL = torch.from_numpy(tokenizer.encode_batch(texts, cut or length))
        text_UL = F.pad(text_UL, (0, length - text_UL.shape[1]))
        # Texts of one length side by side: less padding. 0 is padding at the end of a text only.
        length_U = (text_UL.flip(1) != 0).byte().argmax(1) if watch is None else torch.zeros(1)
        order = torch.argsort(-length_U, stable=True) if watch is None else torch.arange(len(texts))
        parts = []
        for start in range(0, len(texts), batch_size):
            text_BL = trimmed(model, text_UL[order[start : start + batch_size]])
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


def batches_of_pixels(
    samples: Pictures, preprocess: Mapping[str, Any], threads: int, batch_size: int
) -> Iterator[tuple[range, np.ndarray]]:
    """Rows, and their images decoded, resized and cropped, in row order; one batch is prepared ahead.

    Raises:
        ConfigError: if an image cannot be decoded.
    """
    how = [preprocess[key] for key in ("size", "resize_mode", "interpolation")]

    def load(rows: range) -> list[np.ndarray]:
        return [prepare(samples.pixels(row), *how) for row in rows]

    share = -(-batch_size // threads)  # an image is too little for a task of its own
    with ThreadPoolExecutor(threads) as pool:
        ahead: list[Any] = []
        for start in range(0, len(samples), batch_size):
            rows = range(start, min(start + batch_size, len(samples)))
            parts = [rows[first : first + share] for first in range(0, len(rows), share)]
            ahead.append((rows, [pool.submit(load, part) for part in parts]))
            if len(ahead) > 1:
                yield _waited(*ahead.pop(0))
        for batch in ahead:
            yield _waited(*batch)


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


def _waited(rows: range, futures: Sequence[Any]) -> tuple[range, np.ndarray]:
    return rows, np.stack([image for future in futures for image in future.result()])
