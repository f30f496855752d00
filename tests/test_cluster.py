"""Clustering and the accumulation of pseudo labels."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from clipgraft.cluster import accumulate, agreement, check_labels, cluster
from clipgraft.config import ConfigError
from clipgraft.data.labels import read_labels
from clipgraft.kmeans import Clusters, Points, merge_small, spherical_kmeans
from clipgraft.settings import ClusterJob


def blobs(num: int = 120, dim: int = 8, groups: int = 3, seed: int = 0, noise: float = 0.05):
    """Unit vectors around orthogonal directions, and which direction each is of."""
    rng = np.random.default_rng(seed)
    owner_N = rng.integers(groups, size=num)
    points_ND = np.eye(dim)[owner_N] + noise * rng.standard_normal((num, dim))
    return points_ND / np.linalg.norm(points_ND, axis=1, keepdims=True), owner_N


def points_of(folder: Path, *arrays: np.ndarray) -> Points:
    files = [folder / f"points_{number}.npy" for number in range(len(arrays))]
    for file, array in zip(files, arrays, strict=True):
        np.save(file, array.astype(np.float16))
    return Points.open(*files)


def kmeans(points: Points, num_clusters: int, seed: int = 0, **more) -> Clusters:
    settings = {"num_iterations": 20, "num_tries": 3} | more
    return spherical_kmeans(points, num_clusters, seed=seed, **settings)


def same_partition(a_N: np.ndarray, b_N: np.ndarray) -> bool:
    pairs = set(zip(a_N.tolist(), b_N.tolist(), strict=True))
    return len(pairs) == len(set(a_N.tolist())) == len(set(b_N.tolist()))


def lloyd(unit_ND: np.ndarray, centroids_CD: np.ndarray, num_iterations: int):
    """Lloyd's algorithm by hand in float64: assignments, centroids and inertia."""
    for _ in range(num_iterations):
        assigned_N = (unit_ND @ centroids_CD.T).argmax(1)
        sums_CD = np.stack([unit_ND[assigned_N == c].sum(0) for c in range(len(centroids_CD))])
        centroids_CD = sums_CD / np.linalg.norm(sums_CD, axis=1, keepdims=True)
    assigned_N = (unit_ND @ centroids_CD.T).argmax(1)
    return assigned_N, centroids_CD, ((unit_ND - centroids_CD[assigned_N]) ** 2).sum(1).mean()


def test_well_separated_groups_are_found_and_centroids_are_unit_vectors(tmp_path):
    points_ND, owner_N = blobs()
    found = kmeans(points_of(tmp_path, points_ND), 3)
    assert same_partition(found.assigned_N, owner_N)
    np.testing.assert_allclose(np.linalg.norm(found.centroids_CD, axis=1), 1, atol=1e-5)
    by_hand = ((points_ND - found.centroids_CD[found.assigned_N]) ** 2).sum(1).mean()
    assert found.inertia == pytest.approx(by_hand, rel=1e-3)
    np.testing.assert_array_equal(found.sizes_C, np.bincount(found.assigned_N))


def test_the_result_is_a_fixed_point_of_lloyds_algorithm(tmp_path):
    points_ND, _ = blobs(num=3000, groups=6, seed=1, noise=0.3)
    found = kmeans(points_of(tmp_path, points_ND), 4, num_iterations=200)
    unit_ND = points_ND.astype(np.float16).astype(float)
    unit_ND /= np.linalg.norm(unit_ND, axis=1, keepdims=True)
    _, _, inertia = lloyd(unit_ND, found.centroids_CD.astype(float), 50)
    assert found.inertia == pytest.approx(inertia, rel=1e-3)
    np.testing.assert_array_equal(
        found.assigned_N, (unit_ND @ found.centroids_CD.T.astype(float)).argmax(1)
    )


def test_passes_end_only_where_lloyds_algorithm_gains_nothing_more(tmp_path, monkeypatch):
    """From a start so bad that it takes a dozen passes."""
    points_ND, _ = blobs(num=3000, groups=8, seed=1, noise=0.3)
    points = points_of(tmp_path, points_ND)
    unit_ND, scale_N = points.read(0, points.num)
    unit_ND = unit_ND.astype(float) * scale_N[:, None]
    start_CD = unit_ND[:6]
    monkeypatch.setattr("clipgraft.kmeans._start", lambda *_: start_CD.astype(np.float32))
    found = kmeans(points, 6, num_tries=1, num_iterations=500)
    early, late = (lloyd(unit_ND, start_CD, num)[2] for num in (4, 500))
    assert early > 1.001 * late
    assert found.inertia == pytest.approx(late, rel=1e-4) and found.num_passes < 50


def test_the_best_try_is_kept(tmp_path):
    points = points_of(tmp_path, blobs(num=600, groups=8, seed=3, noise=0.2)[0])
    found = kmeans(points, 5, num_tries=8)
    assert len(found.tries) == 8 and max(found.tries) > 1.02 * min(found.tries)
    assert found.inertia == pytest.approx(min(found.tries), rel=1e-3)


def test_a_large_set_is_clustered_in_chunks_as_a_small_one_in_one(tmp_path, monkeypatch):
    points_ND, _ = blobs(num=2000, groups=6, seed=2, noise=0.3)
    points = points_of(tmp_path, points_ND)
    whole = kmeans(points, 4)
    monkeypatch.setattr("clipgraft.kmeans._CHUNK", 8 * 101)  # 101 points
    for threads in (1, 3):
        parts = kmeans(points, 4, threads=threads)
        np.testing.assert_array_equal(whole.assigned_N, parts.assigned_N)
        np.testing.assert_allclose(whole.centroids_CD, parts.centroids_CD, atol=1e-6)


def test_a_start_from_a_sample_ends_with_all_points(tmp_path, monkeypatch):
    points_ND, owner_N = blobs(num=4000, groups=4, seed=4, noise=0.15)
    monkeypatch.setattr("clipgraft.kmeans._SAMPLE", 40)
    monkeypatch.setattr("clipgraft.kmeans._PER_CLUSTER", 10)
    found = kmeans(points_of(tmp_path, points_ND), 4, num_tries=5)
    assert same_partition(found.assigned_N, owner_N)
    means = np.stack([points_ND[found.assigned_N == c].sum(0) for c in range(4)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(found.centroids_CD, means, atol=1e-3)


def test_max_points_trains_on_a_part_and_assigns_all(tmp_path):
    points_ND, owner_N = blobs(num=1000, seed=5)
    found = kmeans(points_of(tmp_path, points_ND), 3, max_points=100)
    assert same_partition(found.assigned_N, owner_N)
    part = Points.open(tmp_path / "points_0.npy").subset(100, [0, 0])
    read_BD, _ = part.read(10, 30)
    assert len(set(part.rows)) == 100 and part.rows.max() > 900
    np.testing.assert_array_equal(read_BD, points_ND[part.rows[10:30]].astype(np.float16))
    # The centroids are those of the part, not of all.
    means = np.stack(
        [points_ND[part.rows][found.assigned_N[part.rows] == c].sum(0) for c in range(3)]
    )
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(found.centroids_CD, means, atol=2e-3)


def test_joint_points_are_both_vectors_side_by_side(tmp_path):
    (one_ND, one_N), (other_ND, other_N) = blobs(seed=6, groups=2), blobs(seed=7, groups=2)
    points = points_of(tmp_path, one_ND, other_ND)
    read_BD, scale_B = points.read(3, 9)
    np.testing.assert_allclose(read_BD[:, 8:], other_ND[3:9], atol=1e-3)
    np.testing.assert_allclose(scale_B, 0.5**0.5, rtol=1e-3)
    found = kmeans(points, 4, num_tries=8)
    assert same_partition(found.assigned_N, 2 * one_N + other_N)


def test_the_same_seed_gives_the_same_clusters(tmp_path):
    points = points_of(tmp_path, blobs(num=1000, groups=6, seed=2, noise=0.3)[0])
    first, second, other = (kmeans(points, 4, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.assigned_N, second.assigned_N)
    np.testing.assert_array_equal(first.centroids_CD, second.centroids_CD)
    assert (first.assigned_N != other.assigned_N).any()


def test_more_clusters_than_samples_and_diverged_embeddings_are_refused(tmp_path):
    points_ND, _ = blobs(num=4)
    with pytest.raises(ConfigError, match="5 clusters of 4 samples"):
        kmeans(points_of(tmp_path, points_ND), 5)
    for bad in (np.nan, 0):
        points_ND[2] = bad
        with pytest.raises(ConfigError, match=r"points_0.npy: row 2 is zero or not finite.*Hint"):
            kmeans(points_of(tmp_path, points_ND), 2)


def test_empty_clusters_are_left_out(tmp_path):
    two_ND = np.repeat(np.eye(4)[:2], 10, axis=0)
    found = kmeans(points_of(tmp_path, two_ND), 4)
    assert found.sizes_C.tolist() == [10, 10] and found.merged == [0, 0]
    assert found.inertia == pytest.approx(0, abs=1e-6)


def test_an_empty_cluster_takes_a_part_of_the_largest(tmp_path, monkeypatch):
    points_ND, _ = blobs(num=900, groups=2, seed=8)
    start_CD = np.eye(8)[[0, 0, 1]]  # the second one stays empty
    monkeypatch.setattr("clipgraft.kmeans._start", lambda *_: start_CD.astype(np.float32))
    found = kmeans(points_of(tmp_path, points_ND), 3, num_tries=1)
    assert len(found.sizes_C) == 3 and found.merged == []


def test_small_clusters_join_their_nearest():
    centroids_CD = np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 0, 1], [0, 1, 0]])
    sizes_C = np.array([50, 3, 40, 5])
    become_C, left_CD, merged = merge_small(
        centroids_CD, centroids_CD * sizes_C[:, None], sizes_C, 8
    )
    # 1 is nearest to 3; together they have 8, which is enough.
    assert become_C.tolist() == [0, 2, 1, 2] and merged == [3]
    joined = 3 * centroids_CD[1] + 5 * centroids_CD[3]
    np.testing.assert_allclose(left_CD[2], joined / np.linalg.norm(joined))
    become_C, _, merged = merge_small(centroids_CD, centroids_CD * sizes_C[:, None], sizes_C, 1000)
    assert become_C.tolist() == [0] * 4 and merged == [3, 8, 40]


def test_opposite_clusters_that_add_up_to_nothing_keep_the_direction_of_one(tmp_path):
    one_D = np.eye(8)[0]
    found = kmeans(points_of(tmp_path, np.repeat([one_D, -one_D], 20, axis=0)), 2, min_size=30)
    assert found.sizes_C.tolist() == [40] and found.merged == [20]
    np.testing.assert_allclose(np.abs(found.centroids_CD), one_D[None], atol=1e-6)
    assert found.inertia == pytest.approx((20 * 0 + 20 * 4) / 40)


def test_merged_clusters_keep_their_rows_and_inertia(tmp_path):
    rng = np.random.default_rng(0)
    owner_N = np.repeat([0, 1, 2], [100, 90, 4])
    points_ND = np.eye(8)[owner_N] + 0.05 * rng.standard_normal((194, 8))
    points_ND[owner_N == 2] += np.eye(8)[1]  # between 1 and 2
    points_ND /= np.linalg.norm(points_ND, axis=1, keepdims=True)
    found = kmeans(points_of(tmp_path, points_ND), 3, min_size=5)
    assert found.merged == [4] and sorted(found.sizes_C) == [94, 100]
    assert same_partition(found.assigned_N, np.minimum(owner_N, 1))
    by_hand = ((points_ND - found.centroids_CD[found.assigned_N]) ** 2).sum(1).mean()
    assert found.inertia == pytest.approx(by_hand, rel=1e-3)


def test_the_points_are_never_in_memory_as_a_whole(tmp_path):
    num, dim = 200_000, 64
    points_ND = np.random.default_rng(0).standard_normal((num, dim), np.float32)
    points = points_of(tmp_path, points_ND)
    tracemalloc.start()
    try:
        kmeans(points, 3, num_iterations=2, num_tries=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < points_ND.nbytes / 2


def test_labels_accumulate_as_numbers_in_base_of_the_cluster_pairs():
    rng = np.random.default_rng(0)
    rounds = [rng.integers(3, size=(200, 2)) for _ in range(3)]
    labels_N, published_N, digits = None, np.zeros(200, int), [[]]
    for clusters_N2 in rounds:
        labels_N, parent_C, digits_C2 = accumulate(labels_N, clusters_N2)
        # The published rule: y = 3 * image + text per round, Y <- 9 * Y + y; dense labels keep its order.
        published_N = 9 * published_N + 3 * clusters_N2[:, 0] + clusters_N2[:, 1]
        np.testing.assert_array_equal(labels_N, np.unique(published_N, return_inverse=True)[1])
        digits = [
            [*digits[parent], digit]
            for parent, digit in zip(parent_C, digits_C2.tolist(), strict=True)
        ]
    for row, label in enumerate(labels_N):
        assert digits[label] == [clusters_N2[row].tolist() for clusters_N2 in rounds]


def test_labels_and_agreement_take_little_more_than_a_number_per_sample():
    num = 200_000
    clusters_N2 = np.random.default_rng(0).integers(3, size=(num, 2), dtype=np.int32)
    before_N = clusters_N2[:, 0].copy()
    for most, work in (  # bytes per sample: an int64, and labels int32
        (8 + 4, lambda: accumulate(before_N, clusters_N2)),
        (8, lambda: agreement(*clusters_N2.T)),
    ):
        tracemalloc.start()
        try:
            work()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 1.1 * most * num


def test_agreement_is_sklearns_normalised_mutual_information():
    rng = np.random.default_rng(0)
    one_N = rng.integers(5, size=300)
    other_N = np.where(rng.random(300) < 0.5, one_N, rng.integers(7, size=300))
    expected = normalized_mutual_info_score(one_N, other_N)
    assert 0.1 < expected < 0.9 and agreement(one_N, other_N) == pytest.approx(expected)
    assert agreement(one_N, one_N) == pytest.approx(1)
    assert agreement(np.zeros(9, int), np.arange(9) % 2) == pytest.approx(0)


def embeddings(folder: Path, seed: int, samples_id: str = "abc") -> Path:
    folder.mkdir()
    for side in ("image", "text"):
        np.save(folder / f"{side}.npy", blobs(seed=seed)[0].astype(np.float16))
        seed += 100
    about = {"samples_id": samples_id, "num_samples": 120, "dim": 8}
    (folder / "embed.json").write_text(json.dumps(about))
    return folder


def test_two_rounds_chain_their_labels(tmp_path):
    settings = ClusterJob(seed=0, image_clusters=3, text_clusters=3)
    out = [tmp_path / "round1", tmp_path / "round2"]
    for folder in out:
        folder.mkdir()
    cluster(settings, embeddings(tmp_path / "e0", 0), None, out[0])
    facts = cluster(settings, embeddings(tmp_path / "e1", 7), out[0], out[1])
    assert facts["round"] == 2
    first = json.loads((out[0] / "clusters.json").read_text())
    second = json.loads((out[1] / "clusters.json").read_text())
    assert first["num_labels"] == 9 and first["agreement"] is None
    assert sum(second["sizes"]) == 120 and len(second["sizes"]) == second["num_labels"]
    labels_N = read_labels(out[1], "abc")
    clusters_N2 = [np.load(folder / "clusters.npy") for folder in out]
    for row in range(120):
        digits = second["digits"][labels_N[row]]
        assert digits == [clusters_N2[0][row].tolist(), clusters_N2[1][row].tolist()]


def test_rounds_may_cluster_other_sides_and_numbers(tmp_path):
    embed, out = embeddings(tmp_path / "e0", 0), [tmp_path / name for name in "abcd"]
    settings = [
        ClusterJob(seed=0, by="joint", joint_clusters=4),
        ClusterJob(seed=0, by="image", image_clusters=2),
        ClusterJob(seed=0, image_clusters=3, text_clusters=2),
        ClusterJob(seed=0, by="text", text_clusters=3),
    ]
    previous = None
    for job, folder in zip(settings, out, strict=True):
        folder.mkdir()
        cluster(job, embed, previous, folder)
        previous = folder
    about = [json.loads((folder / "clusters.json").read_text()) for folder in out]
    assert [each["by"] for each in about] == ["joint", "image", "image_x_text", "text"]
    assert [np.load(folder / "clusters.npy").shape[1] for folder in out] == [1, 1, 2, 1]
    assert np.load(out[0] / "joint_centroids.npy").shape == (4, 16)
    assert [list(each["agreement"] or ()) for each in about] == [[], [], ["image"], ["text"]]
    digits = [[1], [1, 1], [1, 1, 2], [1, 1, 2, 1]]
    assert [list(map(len, each["digits"][0])) for each in about] == digits
    text = kmeans(Points.open(embed / "text.npy"), 3)
    np.testing.assert_array_equal(np.load(out[3] / "clusters.npy")[:, 0], text.assigned_N)


def test_what_was_left_out_and_merged_is_said(tmp_path, caplog):
    out, embed = tmp_path / "round1", embeddings(tmp_path / "e0", 0)
    out.mkdir()
    job = ClusterJob(seed=0, by="image", image_clusters=5, max_points=60, min_size=25)
    with caplog.at_level("INFO"):
        cluster(job, embed, None, out)
    assert "60 points" in caplog.text and "random part of 120 samples (max_points)" in caplog.text
    assert "fewer than min_size = 25, and were merged" in caplog.text
    about = json.loads((out / "clusters.json").read_text())["image"]
    assert about["num_points"] == 60 and about["merged"] and min(about["sizes"]) >= 25
    assert sum(about["sizes"]) == 120 and len(about["tries"]) == 3


def test_a_round_whose_samples_are_mostly_alone_is_refused(tmp_path):
    check_labels(3, np.array([2, 2, 1, 1, 1, 1]))  # half have company
    with pytest.raises(
        ConfigError,
        match=r"round 3: .* 5 labels for 6 samples, and 67% .*Hint: moe.num_experts: 3 ",
    ):
        check_labels(3, np.array([2, 1, 1, 1, 1]))
    with pytest.raises(ConfigError, match=r"round 1: .*Hint: use fewer clusters"):
        check_labels(1, np.array([1, 1]))
    out, embed = tmp_path / "round1", embeddings(tmp_path / "e0", 0)
    out.mkdir()
    with pytest.raises(ConfigError, match="round 1: the labels have run out"):
        cluster(ClusterJob(seed=0, image_clusters=40, text_clusters=40), embed, None, out)


def test_identical_rounds_agree_fully_split_nothing_and_say_so(tmp_path, caplog):
    settings = ClusterJob(seed=0, image_clusters=3, text_clusters=3)
    embed = embeddings(tmp_path / "e0", 0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    cluster(settings, embed, None, tmp_path / "a")
    cluster(settings, embed, tmp_path / "a", tmp_path / "b")
    assert "round 2 splits no label" in caplog.text
    second = json.loads((tmp_path / "b/clusters.json").read_text())
    assert second["agreement"] == {"image": pytest.approx(1), "text": pytest.approx(1)}
    np.testing.assert_array_equal(
        np.load(tmp_path / "a/labels.npy"), np.load(tmp_path / "b/labels.npy")
    )


def test_labels_of_other_samples_are_refused(tmp_path):
    out = tmp_path / "round1"
    out.mkdir()
    cluster(ClusterJob(seed=0), embeddings(tmp_path / "e0", 0), None, out)
    with pytest.raises(ConfigError, match="labels of samples abc, the data are xyz"):
        read_labels(out, "xyz")
