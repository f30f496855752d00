"""Pictures for the page: thumbnails as data URLs, and which pictures and words stand for a cluster."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from clipgraft.data.images import BadImage, decode, open_image
from clipgraft.data.samples import Samples
from clipgraft.data.tars import read_range

THUMBNAIL = 96  # pixels of the longer side
MAX_CLUSTERS = 12  # shown per round
PICTURES_PER_CLUSTER = 10
WORDS_PER_CLUSTER = 6
_MAX_MEGAPIXELS = 50.0  # of a rejected image that is shown
_MAX_CAPTIONS = 50_000  # whose words are counted
_BLOCK = 65_536


@dataclass(frozen=True)
class Picture:
    """A thumbnail with what is said of it."""

    url: str
    caption: str
    row: int


@dataclass(frozen=True)
class Reject:
    """An image that is not used, and why.

    Attributes:
        url: its thumbnail; empty if it cannot be decoded.
        uid: name of the sample.
        reason: as it is counted.
        detail: the particulars.
    """

    url: str
    uid: str
    reason: str
    detail: str


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


def rejects_sheet(index: Path, download: Path, num_pictures: int) -> list[Reject]:
    """Rejected samples, as many of each reason as there is room for, the most frequent reason first.

    Args:
        index: folder with `rejects.parquet`.
        download: folder that relative tar names refer to.
        num_pictures: at most so many.
    """
    counts: Counter[str] = Counter()
    rows_of: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    with pq.ParquetFile(index / "rejects.parquet") as file:
        for batch in file.iter_batches(_BLOCK):
            for place, reason in enumerate(batch["reason"].to_pylist()):
                counts[reason] += 1
                rows = rows_of.setdefault(reason, [])
                if len(rows) < num_pictures:
                    rows.append((counts.total(), batch.slice(place, 1).to_pylist()[0]))
    some = [rows_of[reason] for reason, _ in counts.most_common()]
    in_turn = [row for row in chain(*zip_longest(*some)) if row is not None][:num_pictures]
    return [
        Reject(_thumbnail_of(row, download), row["uid"], row["reason"], row["detail"])
        for rows in some
        for number, row in rows
        if (number, row) in in_turn
    ]


def _thumbnail_of(row: dict[str, Any], download: Path) -> str:
    """As much of a rejected image as can be decoded; empty if that is nothing."""
    if row["tar"] is None:
        return ""
    data = read_range(download / row["tar"], row["image_offset"], row["image_bytes"])
    try:
        open_image(data, _MAX_MEGAPIXELS)
        return thumbnail(Image.fromarray(decode(data)))
    except BadImage:
        return ""


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
