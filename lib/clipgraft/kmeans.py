"""Spherical k-means of more points than memory holds: Lloyd's algorithm, in passes over float16 files.

All tries go through the points together: a pass is bound by reading and converting them, and one matrix product serves
the centroids of all tries. Each try starts from faiss's k-means of a sample of its own, which leaves few passes to do;
what counts, centroids, assignments and inertia alike, is of all points. Sums are made of a fixed number of parts, so
that a result does not depend on the number of threads.
"""

# Shapes: N points, D dimensions, B points of a chunk, T tries, C clusters

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import faiss
import numpy as np
from threadpoolctl import threadpool_limits

from clipgraft.config import ConfigError

_CHUNK = 2**20  # numbers that are held as float32, per thread
_PARTS = 64
_SAMPLE = 2**15  # points to start from, at least, and
_PER_CLUSTER = 256  # for each cluster
_START_ITERATIONS = 50
_SCATTERED = 1024  # rows of a sample that are read at once
_TOLERANCE = 1e-5  # of the inertia: a try that gains less in a pass has converged


@dataclass(frozen=True)
class Points:
    """Rows of files; of several files, their rows side by side.

    Attributes:
        files: arrays [N, D] as `.npy`.
        num: points.
        dim: D of all files together.
        rows: which rows the points are, rising; None is all.
    """

    files: tuple[Path, ...]
    num: int
    dim: int
    rows: np.ndarray | None = None

    @classmethod
    def open(cls, *files: Path) -> Points:
        """All rows of the files."""
        shapes = [np.load(file, mmap_mode="r").shape for file in files]
        assert len({num for num, _ in shapes}) == 1, shapes
        return cls(files, shapes[0][0], sum(dim for _, dim in shapes))

    def subset(self, num: int, seed: list[int]) -> Points:
        """So many of the points, drawn at random; all, if there are no more."""
        if num >= self.num:
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(self.num, num, replace=False))
        rows = chosen if self.rows is None else self.rows[chosen]
        return replace(self, num=num, rows=rows)

    def read(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Points first .. stop - 1 as float32 [B, D], and 1 / length of each; float16 leaves unit vectors slightly off.

        Raises:
            ConfigError: if one has no direction.
        """
        rows = slice(first, stop) if self.rows is None else self.rows[first:stop]
        parts = [_read_rows(file, rows) for file in self.files]
        points_BD = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        length_B = np.sqrt(np.einsum("bd,bd->b", points_BD, points_BD))
        bad = np.flatnonzero(~(np.isfinite(length_B) & (length_B > 0)))
        if len(bad):
            row = first + bad[0] if self.rows is None else self.rows[first + bad[0]]
            raise ConfigError(
                f"{' and '.join(map(str, self.files))}: row {row:,} is zero or not finite, so the model that embedded "
                "it has diverged. Hint: look at its loss; a lower learning rate, or optim.max_grad_norm"
            )
        return points_BD, 1 / length_B


def _read_rows(file: Path, rows: slice | np.ndarray) -> np.ndarray:
    """Rows of a float16 array on disk, as float32.

    It is mapped anew each time, and for every few of scattered rows: what a mapping has touched, and what the system reads
    around it, counts as resident until it is dropped.
    """
    if isinstance(rows, slice):
        return _float32(np.load(file, mmap_mode="r")[rows])
    some = [rows[first : first + _SCATTERED] for first in range(0, len(rows), _SCATTERED)]
    return np.concatenate([_float32(np.load(file, mmap_mode="r")[each]) for each in some])


def _float32(half_BD: np.ndarray) -> np.ndarray:
    # 14 times as fast as astype, for which numpy does not use the processor's instruction.
    single_BD: np.ndarray = cv2.convertFp16(half_BD.view(np.int16))
    return single_BD


class Clusters(NamedTuple):
    """What k-means found.

    Attributes:
        assigned_N: cluster of each row of the files, int32.
        centroids_CD: unit vectors.
        sizes_C: rows in each cluster.
        inertia: mean squared distance of the rows to their centroid, 0..4.
        tries: inertia of each try over the points that it was trained on.
        num_passes: over the points.
        merged: sizes of the clusters that were too small.
    """

    assigned_N: np.ndarray
    centroids_CD: np.ndarray
    sizes_C: np.ndarray
    inertia: float
    tries: list[float]
    num_passes: int
    merged: list[int]


def spherical_kmeans(
    points: Points,
    num_clusters: int,
    *,
    num_iterations: int,
    num_tries: int,
    seed: int,
    min_size: int = 1,
    max_points: int | None = None,
    threads: int = 1,
) -> Clusters:
    """Cluster rows by cosine.

    Args:
        points: all rows.
        num_clusters: C.
        num_iterations: passes over the points, at most.
        num_tries: starts; the one with the best inertia is kept.
        seed: of the starts, and of which points are used.
        min_size: clusters with fewer rows are merged into the one with the nearest centroid; empty ones always are.
        max_points: train on a random part of the points; every row is assigned all the same.
        threads: that share a pass.
    Raises:
        ConfigError: with fewer points than clusters, or a point without direction.
    """
    used = points.subset(max_points or points.num, [seed, 0])
    if used.num < num_clusters:
        raise ConfigError(
            f"{num_clusters:,} clusters of {used.num:,} samples. Hint: fewer clusters, or a larger max_points"
        )
    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        starts = (_start(used, num_clusters, [seed, 1, number]) for number in range(num_tries))
        centroids_TCD = np.stack(list(starts))
        inertia_T, moving = np.full(num_tries, np.inf), np.arange(num_tries)
        num_passes = 0
        while len(moving) and num_passes < num_iterations:
            sums_TCD, sizes_TC = _sums(pool, used, centroids_TCD[moving])
            now_T = 2 - 2 * np.linalg.norm(sums_TCD, axis=2).sum(1) / used.num
            for place, number in enumerate(moving):
                centroids_TCD[number] = _centroids(sums_TCD[place], sizes_TC[place], seed)
            still = inertia_T[moving] - now_T > _TOLERANCE * now_T
            inertia_T[moving] = now_T
            moving, num_passes = moving[still], num_passes + 1
        best_CD = centroids_TCD[inertia_T.argmin()]
        assigned_N = np.empty(points.num, np.int32)
        sums_TCD, sizes_TC = _sums(pool, points, best_CD[None], assigned_N)
    become_C, centroids_CD, merged = merge_small(best_CD, sums_TCD[0], sizes_TC[0], min_size)
    assigned_N = become_C[assigned_N]
    sums_CD = np.zeros(centroids_CD.shape)
    np.add.at(sums_CD, become_C, sums_TCD[0])
    inertia = float(2 - 2 * (sums_CD * centroids_CD).sum() / points.num)
    sizes_C = np.bincount(assigned_N, minlength=len(centroids_CD))
    return Clusters(
        assigned_N, centroids_CD, sizes_C, inertia, inertia_T.tolist(), num_passes, merged
    )


def merge_small(
    centroids_CD: np.ndarray, sums_CD: np.ndarray, sizes_C: np.ndarray, min_size: int
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Merge clusters that are too small, the smallest first, each into the one with the nearest centroid.

    Opposite clusters whose points add up to nothing have no direction in common: the larger one's centroid stays.

    Args:
        centroids_CD: unit vectors.
        sums_CD: of the points of each cluster, as unit vectors.
        sizes_C: how many they are.
        min_size: smaller ones are merged.
    Returns:
        what each cluster is now called [C], int32; the centroids of those that are left; and the sizes of the others.
    """
    centroids_CD, sums_CD, sizes_C = centroids_CD.copy(), sums_CD.copy(), sizes_C.copy()
    left, become_C, merged = np.arange(len(sizes_C)), np.arange(len(sizes_C)), []
    while len(left) > 1 and sizes_C[left].min() < min_size:
        small = left[sizes_C[left].argmin()]
        left = left[left != small]
        target = left[(centroids_CD[left] @ centroids_CD[small]).argmax()]
        merged.append(int(sizes_C[small]))
        become_C[become_C == small] = target
        if sizes_C[small]:
            sizes_C[target] += sizes_C[small]
            sums_CD[target] += sums_CD[small]
            length = np.linalg.norm(sums_CD[target])
            if length > 0:
                centroids_CD[target] = sums_CD[target] / length
    return np.searchsorted(left, become_C).astype(np.int32), centroids_CD[left], merged


def _start(points: Points, num_clusters: int, seed: list[int]) -> np.ndarray:
    """Centroids [C, D] of a sample that fits into memory, by faiss."""
    sample = points.subset(max(_SAMPLE, _PER_CLUSTER * num_clusters), seed)
    points_BD, scale_B = sample.read(0, sample.num)
    points_BD *= scale_B[:, None]
    kmeans = faiss.Kmeans(
        points.dim,
        num_clusters,
        niter=_START_ITERATIONS,
        seed=int(np.random.default_rng(seed).integers(2**31)),
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=sample.num,
    )
    kmeans.train(points_BD)
    assert kmeans.centroids is not None
    return kmeans.centroids


def _centroids(sums_CD: np.ndarray, sizes_C: np.ndarray, seed: int) -> np.ndarray:
    """Directions of the sums; an empty cluster comes to lie beside the largest one and takes a part of it."""
    length_C1 = np.linalg.norm(sums_CD, axis=1, keepdims=True)
    centroids_CD = sums_CD / np.where(length_C1 > 0, length_C1, 1)
    empty = np.flatnonzero(length_C1[:, 0] == 0)
    noise = np.random.default_rng([seed, 2]).standard_normal((len(empty), sums_CD.shape[1]))
    beside = centroids_CD[sizes_C.argmax()] + 0.01 * noise / np.sqrt(sums_CD.shape[1])
    centroids_CD[empty] = beside / np.linalg.norm(beside, axis=1, keepdims=True)
    return centroids_CD.astype(np.float32)


def _sums(
    pool: ThreadPoolExecutor,
    points: Points,
    centroids_TCD: np.ndarray,
    assigned_N: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One pass: sums [T, C, D] and numbers [T, C] of the points that are nearest to each centroid.

    Args:
        pool: what shares the work.
        points: as unit vectors.
        centroids_TCD: of all tries.
        assigned_N: filled with the clusters of the first try.
    """
    edges = np.linspace(0, points.num, min(_PARTS, points.num) + 1).astype(int)

    def part(number: int) -> tuple[np.ndarray, np.ndarray]:
        sums_TCD, sizes_TC = np.zeros(centroids_TCD.shape), np.zeros(centroids_TCD.shape[:2], int)
        step, end = max(1, _CHUNK // points.dim), edges[number + 1]
        for first in range(edges[number], end, step):
            stop = min(first + step, end)
            nearest_BT, more_TCD = _sums_of_chunk(*points.read(first, stop), centroids_TCD)
            sums_TCD += more_TCD
            sizes_TC += [np.bincount(of, minlength=len(sizes_TC[0])) for of in nearest_BT.T]
            if assigned_N is not None:
                assigned_N[first:stop] = nearest_BT[:, 0]
        return sums_TCD, sizes_TC

    sums_TCD, sizes_TC = np.zeros(centroids_TCD.shape), np.zeros(centroids_TCD.shape[:2], int)
    for more_TCD, more_TC in pool.map(part, range(len(edges) - 1)):
        sums_TCD += more_TCD
        sizes_TC += more_TC
    return sums_TCD, sizes_TC


def _sums_of_chunk(
    points_BD: np.ndarray, scale_B: np.ndarray, centroids_TCD: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The cluster of each point in each try [B, T], and sums [T, C, D]."""
    num_tries, num_clusters, dim = centroids_TCD.shape
    similarity = points_BD @ centroids_TCD.reshape(-1, dim).T
    nearest_BT = similarity.reshape(-1, num_tries, num_clusters).argmax(2)
    member_BTC = np.zeros((len(points_BD), num_tries, num_clusters), np.float32)
    np.put_along_axis(member_BTC, nearest_BT[:, :, None], scale_B[:, None, None], axis=2)
    sums = member_BTC.reshape(len(points_BD), -1).T @ points_BD
    return nearest_BT, sums.reshape(centroids_TCD.shape)
