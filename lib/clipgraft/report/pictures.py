"""Pictures for the page: thumbnails as data URLs, and which pictures and words stand for a cluster."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from clipgraft.data.samples import Samples

THUMBNAIL = 96  # pixels of the longer side
MAX_CLUSTERS = 12  # shown per round
PICTURES_PER_CLUSTER = 10
WORDS_PER_CLUSTER = 6
_MAX_CAPTIONS = 50_000  # whose words are counted
_BLOCK = 65_536


@dataclass(frozen=True)
class Picture:
    """A thumbnail with what is said of it."""

    url: str
    caption: str
    row: int


@dataclass(frozen=True)
class ClusterSheet:
    """What one image cluster looks like.

    Attributes:
        number: of the cluster.
        size: samples in it.
        share: of all samples.
        words: caption words that set it apart, with the share of its captions that have them.
        pictures: the nearest to its centroid first.
    """

    number: int
    size: int
    share: float
    words: list[tuple[str, float]]
    pictures: list[Picture]


def picture(samples: Samples, row: int) -> Picture:
    """The thumbnail of a sample."""
    captions = samples.captions(row)
    return Picture(thumbnail(samples.image(row)), captions[0] if captions else "", row)


def thumbnail(image: Image.Image) -> str:
    """A picture as a `data:` URL, shrunk and never enlarged."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def sample_sheet(samples: Samples, num_pictures: int) -> list[Picture]:
    """Pictures evenly spread over a data set."""
    rows = np.linspace(0, len(samples) - 1, min(num_pictures, len(samples))).astype(int)
    return [picture(samples, int(row)) for row in rows]


def cluster_sheets(
    samples: Samples, image_ND: np.ndarray, centroid_CD: np.ndarray, cluster_N: np.ndarray
) -> list[ClusterSheet]:
    """The largest image clusters of a round.

    Args:
        samples: the training set.
        image_ND: image embeddings that were clustered.
        centroid_CD: of the image clusters.
        cluster_N: image cluster of each sample.
    """
    sizes = np.bincount(cluster_N, minlength=len(centroid_CD))
    shown = np.sort(np.argsort(-sizes, kind="stable")[:MAX_CLUSTERS])
    words = telling_words(samples, cluster_N, shown)
    sheets = []
    for c in shown:
        rows = nearest(image_ND, centroid_CD[c], np.flatnonzero(cluster_N == c))
        pictures = [picture(samples, int(row)) for row in rows]
        share = float(sizes[c] / len(cluster_N))
        sheets.append(ClusterSheet(int(c), int(sizes[c]), share, words[int(c)], pictures))
    return sheets


def nearest(image_ND: np.ndarray, centroid_D: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The rows whose embedding is nearest to a centroid, by cosine, nearest first."""
    centroid_D = centroid_D.astype(np.float32)
    blocks = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
    parts = [np.asarray(image_ND[block], dtype=np.float32) @ centroid_D for block in blocks]
    similarity = np.concatenate(parts) if parts else np.zeros(0)
    return rows[np.argsort(-similarity, kind="stable")[:PICTURES_PER_CLUSTER]]


def telling_words(
    samples: Samples, cluster_N: np.ndarray, shown: np.ndarray
) -> dict[int, list[tuple[str, float]]]:
    """Words that are more frequent in the captions of a cluster than elsewhere.

    They are ranked by p log(p / q), p and q being the shares of captions with the word in the
    cluster and in all: their part of the divergence, which leaves out "a" and "of" by itself.
    """
    step = -(-len(samples) // _MAX_CAPTIONS)
    counts: dict[int, Counter[str]] = {int(c): Counter() for c in np.unique(cluster_N)}
    totals: Counter[int] = Counter()
    for row in range(0, len(samples), step):
        cluster = int(cluster_N[row])
        captions = samples.captions(row)
        counts[cluster].update(words_of(captions[0] if captions else ""))
        totals[cluster] += 1
    everywhere = sum(counts.values(), Counter())
    found = {}
    for c in map(int, shown):
        counted = counts.get(c, Counter())
        share = {word: n / totals[c] for word, n in counted.items()}
        gain = {w: p * np.log(p * totals.total() / everywhere[w]) for w, p in share.items()}
        best = sorted((w for w in gain if gain[w] > 0), key=lambda w: (-gain[w], w))
        found[c] = [(word, share[word]) for word in best[:WORDS_PER_CLUSTER]]
    return found


def words_of(caption: str) -> set[str]:
    """Distinct words, lower case."""
    return set(re.findall(r"[^\W\d_]+", caption.lower()))


def retrieval_pictures(
    samples: Samples, examples: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Retrieval examples with thumbnails in place of row numbers."""
    cache: dict[int, Picture] = {}

    def of(row: int) -> Picture:
        if row not in cache:
            cache[row] = picture(samples, row)
        return cache[row]

    to_text = [{**example, "picture": of(example["row"])} for example in examples["image_to_text"]]
    to_image = [
        {
            **example,
            "top": [{**found, "picture": of(found["row"])} for found in example["top"]],
            "wanted": [of(row) for row in example["rows"][:1]],
        }
        for example in examples["text_to_image"]
    ]
    return {"image_to_text": to_text, "text_to_image": to_image}
