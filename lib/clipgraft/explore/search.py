"""Search among the samples of a data set, as one model sees them: two faiss indexes over embeddings.

Embeddings that the stage `embed` has stored are read: of a large training set that is all there is. Of other data and
models they are made once, of at most so many samples evenly spread, and kept in `results/explore/`, which may be deleted
at any time. Both are float16, and the indexes hold them as such: two bytes per number, exact search.
"""

# Shapes: N samples, R searched samples, U texts, D embedding, K found

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from clipgraft.data.samples import Samples
from clipgraft.evaluation.encode import encode_images, true_float32
from clipgraft.evaluation.rows import spread
from clipgraft.explore.encoder import Encoder

log = logging.getLogger(__name__)

_BLOCK = 65_536  # rows that are held as float32 while an index is filled
ABOUT = "about.json"


@dataclass(frozen=True)
class Searchable:
    """A data set to search, as one model sees it.

    Attributes:
        samples: all of the data set.
        row_R: which of them are searched.
        images: index over their pictures, in the order of `row_R`.
        texts: index over captions.
        caption: the text of a number that `texts` finds.
        num_texts: how many captions there are.
        origin: for people: where the embeddings are from.
    """

    samples: Samples
    row_R: np.ndarray
    images: faiss.Index
    texts: faiss.Index
    caption: Callable[[int], str]
    num_texts: int
    origin: str

    def pictures_for(self, feature_D: np.ndarray, num: int) -> list[tuple[int, float]]:
        """Rows of the best samples and their cosines, best first."""
        return [
            (int(self.row_R[number]), score)
            for number, score in _found(self.images, feature_D, num)
        ]

    def captions_for(self, feature_D: np.ndarray, num: int) -> list[tuple[str, float]]:
        """The best captions, equal ones once, and their cosines, best first."""
        best: dict[str, float] = {}
        wanted = min(num, self.num_texts)
        while wanted and len(best) < num:
            best = {}
            for number, score in _found(self.texts, feature_D, wanted):
                best.setdefault(self.caption(number), score)
            if wanted == self.num_texts:
                break
            wanted = min(4 * wanted, self.num_texts)
        return list(best.items())[:num]


def stored_embeddings(samples: Samples, folder: Path) -> Searchable:
    """What the stage `embed` has stored of all samples; a caption stands for all that its sample has."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("image", "text")}
    return Searchable(
        samples,
        np.arange(len(samples)),
        flat_index(arrays["image"]),
        flat_index(arrays["text"]),
        lambda row: " / ".join(samples.captions(row)),
        len(samples),
        f"embeddings of the stage embed, all {len(samples):,} pictures",
    )


def made_embeddings(
    samples: Samples, encoder: Encoder, ids: Sequence[str], cache: Path, num: int, threads: int
) -> Searchable:
    """Embeddings made here, or made before and kept.

    Args:
        samples: the data set.
        encoder: the model.
        ids: what tells models and data sets apart: of their manifests.
        cache: folder of what is kept.
        num: at most so many samples, evenly spread.
        threads: for decoding, and on a CPU for encoding images.
    """
    row_R = spread(len(samples), num)
    texts = list(dict.fromkeys(text for row in row_R for text in samples.captions(row)))

    def make() -> dict[str, np.ndarray]:
        log.info("encoding %s pictures and %s captions", f"{len(row_R):,}", f"{len(texts):,}")
        about, part = encoder.spec["preprocess"], _Part(samples, row_R)
        with torch.inference_mode(), true_float32():
            image_RD = encode_images(encoder.model, about, part, encoder.device, threads)
            text_UD = encoder.texts()(texts) if texts else image_RD[:0]
        assert isinstance(image_RD, Tensor)  # no file was asked for
        made = {"image": image_RD, "text": text_UD}
        return {name: of.cpu().numpy().astype(np.float16) for name, of in made.items()}

    arrays = kept(cache, {"of": list(ids), "num_samples": len(row_R)}, make)
    return Searchable(
        samples,
        row_R,
        flat_index(arrays["image"]),
        flat_index(arrays["text"]),
        texts.__getitem__,
        len(texts),
        f"embeddings made for this page, {len(row_R):,} of {len(samples):,} pictures",
    )


def kept(
    cache: Path, about: Mapping[str, Any], make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Arrays that `about` alone decides: from the cache, or made and put there, all at once or not at all."""
    key = json.dumps(about, sort_keys=True)
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not (folder / ABOUT).is_file():
        arrays = make()
        cache.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=cache, prefix=f"{folder.name}."))
        for name, array in arrays.items():
            np.save(part / f"{name}.npy", array)
        (part / ABOUT).write_text(key + "\n")
        shutil.rmtree(folder, ignore_errors=True)  # left by a kill
        part.rename(folder)
    return {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}


def flat_index(embedding_ND: np.ndarray) -> faiss.Index:
    """Exact search by inner product, over rows kept as float16."""
    index = faiss.IndexScalarQuantizer(
        embedding_ND.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    for start in range(0, len(embedding_ND), _BLOCK):
        index.add(np.ascontiguousarray(embedding_ND[start : start + _BLOCK], np.float32))
    return index


def _found(index: faiss.Index, feature_D: np.ndarray, num: int) -> list[tuple[int, float]]:
    num = min(num, index.ntotal)
    if not num:
        return []
    scores, numbers = index.search(feature_D[None].astype(np.float32), num)
    return list(zip(numbers[0].tolist(), scores[0].tolist(), strict=True))


@dataclass(frozen=True)
class _Part:
    """Some samples, as `encode_images` wants them."""

    samples: Samples
    row_R: np.ndarray

    def __len__(self) -> int:
        return len(self.row_R)

    def pixels(self, number: int) -> np.ndarray:
        return self.samples.pixels(int(self.row_R[number]))
