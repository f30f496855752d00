"""Stage `cluster`: spherical k-means of the embeddings, and pseudo labels accumulated over the rounds.

Round k clusters the embeddings of expert k-1: images and texts apart, one of them, or both side by side. The clusters
are a sample's digit of that round, the label is the row of digits of all rounds so far, made dense (CLIP-MoE: 9, 81,
729 labels at most; MCL: images alone). When most labels have come down to one sample, there is nothing left to tell
apart, and the round ends with a message.
"""

# Shapes: N samples, S sides, C labels; in `agreement` A and B clusters

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from clipgraft.config import ConfigError
from clipgraft.data.labels import read_labels
from clipgraft.kmeans import Clusters, Points, spherical_kmeans
from clipgraft.settings import ClusterJob

log = logging.getLogger(__name__)

# What is clustered, in the order of the columns of clusters.npy.
FILES = {"image": ("image",), "text": ("text",), "joint": ("image", "text")}
_MIN_COMPARED = 0.5  # share of the samples that must have company in their label


def cluster(
    settings: ClusterJob, embed: Path, previous: Path | None, out: Path, *, threads: int = 1
) -> dict[str, Any]:
    """Write `clusters.npy`, `labels.npy`, the centroids and `clusters.json`.

    Args:
        settings: what is clustered into how many clusters, and how; seed.
        embed: folder with the embeddings of expert k-1.
        previous: cluster folder of round k-1; None in the first round.
        out: folder to write.
        threads: CPU threads.
    Returns:
        Facts for the manifest.
    Raises:
        ConfigError: if the labels have run out, with fewer samples than clusters, or with embeddings that diverged.
    """
    faiss.omp_set_num_threads(threads)
    samples_id = json.loads((embed / "embed.json").read_text())["samples_id"]
    before: dict[str, Any] = {"rounds": 0, "digits": [[]]}
    if previous is not None:
        before = json.loads((previous / "clusters.json").read_text())
        before_N = read_labels(previous, samples_id)
    about: dict[str, Any] = {"samples_id": samples_id, "by": settings.by, "seed": settings.seed}
    about["rounds"] = before["rounds"] + 1
    columns = []
    for side, num_clusters in settings.given.items():
        assert isinstance(num_clusters, int)  # a job has one round
        points = Points.open(*(embed / f"{name}.npy" for name in FILES[side]))
        found = spherical_kmeans(
            points,
            num_clusters,
            num_iterations=settings.num_iterations,
            num_tries=settings.num_tries,
            seed=settings.seed,
            min_size=settings.min_size,
            max_points=settings.max_points,
            threads=threads,
        )
        np.save(out / f"{side}_centroids.npy", found.centroids_CD)
        about[side] = _facts(found, min(points.num, settings.max_points or points.num))
        _announce(side, about[side], settings.min_size, points.num)
        columns.append(found.assigned_N)
    clusters_NS = np.stack(columns, 1)
    columns = list(clusters_NS.T)  # views: what was stacked goes
    labels_N, parent_C, digits_CS = accumulate(None if previous is None else before_N, clusters_NS)
    sizes_C = np.bincount(labels_N)
    check_labels(about["rounds"], sizes_C)
    about |= {
        "num_labels": len(sizes_C),
        "sizes": sizes_C.tolist(),
        "digits": [
            [*before["digits"][parent], digit]
            for parent, digit in zip(parent_C, digits_CS.tolist(), strict=True)
        ],
        "agreement": None if previous is None else _agreements(before, previous, about, columns),
    }
    np.save(out / "clusters.npy", clusters_NS)
    np.save(out / "labels.npy", labels_N)
    (out / "clusters.json").write_text(json.dumps(about) + "\n")
    log.info(
        "round %d: %s labels, smallest %s, largest %s",
        about["rounds"],
        *(f"{number:,}" for number in (len(sizes_C), sizes_C.min(), sizes_C.max())),
    )
    if len(sizes_C) == len(before["digits"]):
        log.warning("round %d splits no label of the rounds before", about["rounds"])
    return {
        "num_labels": len(sizes_C),
        "smallest_label": int(sizes_C.min()),
        "round": about["rounds"],
    }


def accumulate(
    before_N: np.ndarray | None, clusters_NS: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dense labels of the digits of all rounds.

    Args:
        before_N: labels of the rounds before; None in the first.
        clusters_NS: this round's clusters of each side.
    Returns:
        labels [N] in 0..C-1, int32, ordered by digits with the first round most significant; the label that each was
        before [C]; and this round's digit of each [C, S].
    """
    shape = tuple(clusters_NS.max(0) + 1)
    key_N = np.zeros(len(clusters_NS), np.int64)
    if before_N is not None:
        key_N += before_N
    for cluster_N, num in zip(clusters_NS.T, shape, strict=True):
        key_N *= num  # in place: at these lengths temporaries count
        key_N += cluster_N
    is_used = np.zeros(key_N.max() + 1, bool)
    is_used[key_N] = True
    labels_N = (is_used.cumsum(dtype=np.int32) - 1)[key_N]
    parent_C, digit_C = np.divmod(np.flatnonzero(is_used), np.prod(shape))
    return labels_N, parent_C, np.stack(np.unravel_index(digit_C, shape), 1)


def check_labels(number: int, sizes_C: np.ndarray) -> None:
    """See that most samples have company.

    A sample that is alone in its label has no negatives, whatever the batch size is: its loss is zero and teaches
    nothing. Once that is the lot of most of them, an expert would be made of the few that are left. (Labels that have
    company, but nothing that could tell it apart, show in the loss instead.)

    Args:
        number: of the round.
        sizes_C: samples of each label.
    Raises:
        ConfigError: if they have not.
    """
    num = sizes_C.sum()
    share = sizes_C[sizes_C > 1].sum() / num
    if share >= _MIN_COMPARED:
        return
    stop = f"moe.num_experts: {number} ends before this round; or" if number > 1 else "use"
    raise ConfigError(
        f"round {number}: the labels have run out: {len(sizes_C):,} labels for {num:,} samples, and {1 - share:.0%} of "
        f"the samples are alone in theirs, with nothing to be compared with (at most {1 - _MIN_COMPARED:.0%}). "
        f"Hint: {stop} fewer clusters a round (cluster.*_clusters), by: image, or more data"
    )


def agreement(one_N: np.ndarray, other_N: np.ndarray) -> float:
    """Normalised mutual information of two clusterings, by the mean of their entropies: 1 = the same clusters."""
    num_A, num_B = one_N.max() + 1, other_N.max() + 1
    key_N = one_N.astype(np.int64)
    key_N *= num_B
    key_N += other_N
    counts = np.bincount(key_N, minlength=num_A * num_B)
    joint_AB = counts.reshape(num_A, num_B) / len(one_N)
    each = _entropy(joint_AB.sum(1)) + _entropy(joint_AB.sum(0))
    return 2 * (each - _entropy(joint_AB)) / each if each else 1.0


def _entropy(share: np.ndarray) -> float:
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())


def _agreements(
    before: dict[str, Any], previous: Path, about: dict[str, Any], columns: list[np.ndarray]
) -> dict[str, float]:
    """With the clusters of the round before, of the sides that both have."""
    old_NS = np.load(previous / "clusters.npy")
    old = dict(zip((side for side in FILES if side in before), old_NS.T, strict=True))
    new = dict(zip((side for side in FILES if side in about), columns, strict=True))
    return {side: agreement(old[side], new[side]) for side in new if side in old}


def _facts(found: Clusters, num_points: int) -> dict[str, Any]:
    return {
        "num_clusters": len(found.sizes_C),
        "sizes": found.sizes_C.tolist(),
        "inertia": found.inertia,
        "tries": found.tries,
        "num_passes": found.num_passes,
        "num_points": num_points,
        "merged": found.merged,
    }


def _announce(side: str, facts: dict[str, Any], min_size: int, num_samples: int) -> None:
    log.info(
        "%s: %d clusters of %s, mean squared distance %.3f, %d passes over %s points",
        side,
        facts["num_clusters"],
        facts["sizes"],
        facts["inertia"],
        facts["num_passes"],
        f"{facts['num_points']:,}",
    )
    if facts["num_points"] < num_samples:
        log.info(
            "%s: trained on a random part of %s samples (max_points)", side, f"{num_samples:,}"
        )
    if facts["merged"]:
        log.warning(
            "%s: clusters of %s samples had fewer than min_size = %d, and were merged into the nearest",
            side,
            facts["merged"],
            min_size,
        )
