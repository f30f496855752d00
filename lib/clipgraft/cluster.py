"""Stage `cluster`: spherical k-means of both embeddings, and pseudo labels accumulated over the rounds.

Round k clusters the embeddings of expert k-1, images and texts apart; the pair of clusters is a sample's digit of
that round. The label is the row of digits of all rounds so far, made dense (CLIP-MoE: 9, 81, 729 labels at most).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from sklearn.metrics import normalized_mutual_info_score

from clipgraft.config import ConfigError
from clipgraft.data.labels import read_labels
from clipgraft.settings import ClusterJob

log = logging.getLogger(__name__)


def cluster(
    settings: ClusterJob, embed: Path, previous: Path | None, out: Path, *, threads: int = 1
) -> dict[str, Any]:
    """Write `clusters.npy`, `labels.npy`, the centroids and `clusters.json`.

    Args:
        settings: numbers of clusters, iterations and tries, seed.
        embed: folder with the embeddings of expert k-1.
        previous: cluster folder of round k-1; None in the first round.
        out: folder to write.
        threads: CPU threads.
    Returns:
        Facts for the manifest.
    """
    faiss.omp_set_num_threads(threads)
    samples_id = json.loads((embed / "embed.json").read_text())["samples_id"]
    about: dict[str, Any] = {"samples_id": samples_id}
    columns = []
    for side, num_clusters in (
        ("image", settings.image_clusters),
        ("text", settings.text_clusters),
    ):
        embeddings_ND = np.load(embed / f"{side}.npy").astype(np.float32)
        assigned_N, centroids_CD, inertia = spherical_kmeans(
            embeddings_ND, num_clusters, settings.num_iterations, settings.num_tries, settings.seed
        )
        np.save(out / f"{side}_centroids.npy", centroids_CD)
        sizes = np.bincount(assigned_N, minlength=num_clusters).tolist()
        about[side] = {"num_clusters": num_clusters, "sizes": sizes, "inertia": inertia}
        log.info("%s: %d clusters of %s, mean distance %.3f", side, num_clusters, sizes, inertia)
        columns.append(assigned_N)
    clusters_N2 = np.stack(columns, 1).astype(np.int32)
    digits_before = [] if previous is None else _digits(previous, samples_id)
    labels_N, digits = accumulate([*digits_before, clusters_N2])
    sizes_C = np.bincount(labels_N)
    about |= {
        "num_labels": len(digits),
        "sizes": sizes_C.tolist(),
        "digits": digits,
        "rounds": len(digits[0]),
        "agreement": _agreement(digits_before, clusters_N2),
    }
    np.save(out / "clusters.npy", clusters_N2)
    np.save(out / "labels.npy", labels_N.astype(np.int32))
    (out / "clusters.json").write_text(json.dumps(about) + "\n")
    log.info(
        "round %d: %d labels, smallest %d, largest %d",
        about["rounds"],
        len(sizes_C),
        sizes_C.min(),
        sizes_C.max(),
    )
    return {
        "num_labels": len(sizes_C),
        "smallest_label": int(sizes_C.min()),
        "round": about["rounds"],
    }


def spherical_kmeans(
    embeddings_ND: np.ndarray, num_clusters: int, num_iterations: int, num_tries: int, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Cluster unit vectors by cosine, on all points (faiss would silently take 256 per centroid).

    Args:
        embeddings_ND: float32; rows are normalised here, since float16 storage leaves them slightly off.
        num_clusters: C.
        num_iterations: of Lloyd's algorithm.
        num_tries: runs from different seeds; the best is kept.
        seed: of the first try.
    Returns:
        cluster of each row [N], unit centroids [C, D], and the mean squared distance to the own centroid, 0..4.
    Raises:
        ConfigError: with fewer rows than clusters, or rows that are not finite.
    """
    if len(embeddings_ND) < num_clusters:
        raise ConfigError(
            f"{num_clusters} clusters of {len(embeddings_ND)} samples. Hint: fewer clusters"
        )
    if not np.isfinite(embeddings_ND).all():
        bad = int((~np.isfinite(embeddings_ND)).any(1).sum())
        raise ConfigError(
            f"{bad} of {len(embeddings_ND)} embeddings are not finite: the model has diverged"
        )
    unit_ND = np.ascontiguousarray(embeddings_ND)
    faiss.normalize_L2(unit_ND)
    kmeans = faiss.Kmeans(
        unit_ND.shape[1],
        num_clusters,
        niter=num_iterations,
        nredo=num_tries,
        seed=seed + 1,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=len(unit_ND),
    )
    kmeans.train(unit_ND)
    similarity_N1, assigned_N1 = kmeans.index.search(unit_ND, 1)
    return assigned_N1[:, 0], kmeans.centroids, float(np.mean(2 - 2 * similarity_N1))


def accumulate(rounds: list[np.ndarray]) -> tuple[np.ndarray, list[list[list[int]]]]:
    """Dense labels of the digits of all rounds.

    Args:
        rounds: per round [N, 2], image and text cluster of each sample.
    Returns:
        labels [N] in 0..C-1, ordered by digits with the first round most significant; and for each label its
        (image, text) digits per round.
    """
    digits_NR = np.concatenate(rounds, axis=1)
    unique, labels_N = np.unique(digits_NR, axis=0, return_inverse=True)
    return labels_N.reshape(-1), unique.reshape(len(unique), len(rounds), 2).tolist()


def _digits(folder: Path, samples_id: str) -> list[np.ndarray]:
    labels_N = read_labels(folder, samples_id)
    digits_CR2 = np.array(json.loads((folder / "clusters.json").read_text())["digits"])
    return [digits_CR2[labels_N, r] for r in range(digits_CR2.shape[1])]


def _agreement(before: list[np.ndarray], now_N2: np.ndarray) -> dict[str, float] | None:
    """Normalised mutual information with the clusters of the round before: 1 = nothing new was found."""
    if not before:
        return None
    pairs = zip(("image", "text"), before[-1].T, now_N2.T, strict=True)
    return {side: float(normalized_mutual_info_score(old, new)) for side, old, new in pairs}
