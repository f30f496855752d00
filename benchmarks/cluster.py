"""Clustering beside scikit-learn's MiniBatchKMeans as CLIP-MoE runs it, memory at 10 M rows, and the plan of an epoch.

Points are drawn to cluster weakly, as embeddings of real data do: a common direction, and noise with a falling
spectrum. The peer is handed float32 in memory (the published notebook's float16 it would turn into float64), ours reads
float16 from a file. Inertia is measured for both as each defines it: to unit centroids (spherical), and to means.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from _common import Row, arguments, faster, one_core, report, within  # first: sets threads
from sklearn.cluster import MiniBatchKMeans

from clipgraft.data.sampler import HomogeneousBatches
from clipgraft.kmeans import Points, spherical_kmeans

CLUSTERS = 3
EPOCH_SECONDS = 5.0
FIXED_MB, BYTES_PER_SAMPLE = 250, 40  # interpreter and libraries; labels, not vectors


def write_points(file: Path, num: int, dim: int, seed: int) -> None:
    """Unit vectors with a common direction, chunk by chunk."""
    rng = np.random.default_rng(seed)
    spread_D = np.arange(1, dim + 1) ** -0.7
    spread_D *= 0.7 / np.linalg.norm(spread_D)
    turn_DD = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
    common_D = 0.6 * turn_DD[0]
    array = np.lib.format.open_memmap(file, "w+", np.float16, (num, dim))
    for first in range(0, num, 65_536):
        count = min(65_536, num - first)
        noise_BD = rng.standard_normal((count, dim), np.float32) * spread_D.astype(np.float32)
        # Heavier tails than a normal distribution's in the first directions: something to find.
        noise_BD[:, :8] *= 1 + np.abs(noise_BD[:, :8]) / spread_D[:8].astype(np.float32)
        points_BD = common_D + noise_BD @ turn_DD
        array[first : first + count] = points_BD / np.linalg.norm(points_BD, axis=1, keepdims=True)
    array.flush()


def inertias(file: Path, assigned_N: np.ndarray) -> tuple[float, float]:
    """Mean squared distance of unit rows to the unit centroid and to the mean of their cluster."""
    sums_CD, sizes_C = (
        np.zeros((CLUSTERS, np.load(file, mmap_mode="r").shape[1])),
        np.zeros(CLUSTERS),
    )
    for first in range(0, len(assigned_N), 65_536):
        points_BD = np.load(file, mmap_mode="r")[first : first + 65_536].astype(np.float32)
        points_BD /= np.linalg.norm(points_BD, axis=1, keepdims=True)
        for c in range(CLUSTERS):
            is_own = assigned_N[first : first + 65_536] == c
            sums_CD[c] += points_BD[is_own].sum(0)
            sizes_C[c] += is_own.sum()
    length_C = np.linalg.norm(sums_CD, axis=1)
    num = len(assigned_N)
    return 2 - 2 * length_C.sum() / num, 1 - float((length_C**2 / sizes_C).sum()) / num


def ours(files: list[Path], seed: int) -> tuple[float, list[np.ndarray]]:
    """Seconds, and clusters of both sides, with the default settings."""
    started = time.perf_counter()
    found = [
        spherical_kmeans(Points.open(file), CLUSTERS, num_iterations=50, num_tries=3, seed=seed)
        for file in files
    ]
    return time.perf_counter() - started, [each.assigned_N for each in found]


def sklearns(files: list[Path], seed: int) -> tuple[float, list[np.ndarray]]:
    """The same with the published settings, which are these, without a seed; from vectors in memory."""
    seconds, assigned = 0.0, []
    for file in files:
        points_ND = np.load(file).astype(np.float32)
        started = time.perf_counter()
        kmeans = MiniBatchKMeans(
            CLUSTERS, batch_size=1_000_000, max_iter=500, tol=1e-5, n_init="auto", random_state=seed
        )
        assigned.append(kmeans.fit_predict(points_ND))
        seconds += time.perf_counter() - started
    return seconds, assigned


def clustering(folder: Path, num: int, dim: int, repeats: int) -> list[Row]:
    """Time and inertia of both sides together, in turns; a first round warms up and does not count."""
    files = [folder / "image.npy", folder / "text.npy"]
    for seed, file in enumerate(files):
        write_points(file, num, dim, seed)
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    means: dict[str, list[np.ndarray]] = {"ours": [], "peer": []}
    for number in range(repeats + 1):
        for name, side in (("ours", ours), ("peer", sklearns)):
            seconds, assigned = side(files, max(number - 1, 0))
            if number == 0:
                continue
            rates[name].append(num / seconds)
            pairs = zip(files, assigned, strict=True)
            means[name].append(np.mean([inertias(file, of) for file, of in pairs], axis=0))
    size = f"{num:,} x {dim} into {CLUSTERS} + {CLUSTERS}"
    note = "one core, files in the page cache; 3 tries, all points"
    rows = [faster(f"k-means, {size} clusters", rates["ours"], rates["peer"], "rows/s", 5.0, note)]
    for place, name in enumerate(("unit centroids", "means")):
        own, peer = ([each[place] for each in means[side]] for side in ("ours", "peer"))
        # Rounding of the last digits aside, neither side may be worse.
        ratio = float(np.median(np.divide(peer, own)))
        spread = (float(np.divide(peer, own).min()), float(np.divide(peer, own).max()))
        rows.append(
            Row(
                f"inertia to {name}, {size}",
                float(np.median(own)),
                float(np.median(peer)),
                "",
                ratio,
                1.0 if place == 0 else None,
                spread,
            )
        )
    return rows


def memory(folder: Path, num: int, dim: int) -> Iterator[Row]:
    """Resident memory of the whole stage in two rounds, each in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from clipgraft.cluster import cluster;"
        "from clipgraft.settings import ClusterJob; embed, out, *previous = map(Path, sys.argv[1:]);"
        "cluster(ClusterJob(seed=0), embed, previous[0] if previous else None, out);"
        # Of this program alone; getrusage would count what the process that started it held.
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    (folder / "embed.json").write_text('{"samples_id": "benchmark"}')
    bound = FIXED_MB + num * BYTES_PER_SAMPLE / 1e6
    previous: list[Path] = []
    for number in (1, 2):
        for seed, side in enumerate(("image", "text")):
            write_points(folder / f"{side}.npy", num, dim, 2 * number + seed)
        out = folder / f"round{number}"
        out.mkdir()
        started = time.perf_counter()
        command = [sys.executable, "-c", code, folder, out, *previous]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - started
        peak_mb = int(done.stdout) / 1024
        note = (
            f"the bound: {FIXED_MB} MB and {BYTES_PER_SAMPLE} bytes per sample; one side as float32 is "
            f"{4 * num * dim / 1e6:,.0f} MB; the stage took {seconds:,.0f} s"
        )
        name = f"resident memory, {num:,} x {dim}, both sides, round {number}"
        yield within(name, [peak_mb], bound, "MB", note)
        previous = [out]


def epoch_plan(num: int, num_labels: int, block: int | None, repeats: int) -> Row:
    """Seconds until the first batch of an epoch."""
    labels_N = np.random.default_rng(0).integers(num_labels, size=num).astype(np.int32)
    seconds = []
    for epoch in range(repeats + 1):
        sampler = HomogeneousBatches(labels_N, 4096, 0, shuffle_block=block)
        started = time.perf_counter()
        sampler.batch(epoch * sampler.num_batches)
        seconds.append(time.perf_counter() - started)
    blocks = "" if block is None else f", blocks of {block:,}"
    name = f"epoch plan, {num:,} samples, {num_labels:,} labels{blocks}"
    return within(name, seconds[1:], EPOCH_SECONDS, "s")


def rows_of(*, quick: bool) -> Iterator[Row]:
    """All rows, as they are measured."""
    num, dim, repeats = (50_000, 128, 1) if quick else (1_000_000, 512, 3)
    # The plan first: it is the row that other processes' memory traffic disturbs most.
    for plan in [(729, None), (100_000, None), (100_000, 1000)]:
        yield epoch_plan(10_000_000, *plan, repeats=1 if quick else 5)
    with tempfile.TemporaryDirectory() as name:
        yield from clustering(Path(name), num, dim, repeats)
        yield from memory(Path(name), *((500_000, 64) if quick else (10_000_000, 64)))


def main() -> None:
    """Measure and report."""
    args = arguments()
    one_core()
    report("cluster", rows_of(quick=args.quick))


if __name__ == "__main__":
    main()
