"""Clustering and the accumulation of pseudo labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clipgraft.cluster import accumulate, cluster, spherical_kmeans
from clipgraft.config import ConfigError
from clipgraft.data.labels import read_labels
from clipgraft.settings import ClusterJob


def blobs(
    num: int = 120, dim: int = 8, groups: int = 3, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around orthogonal directions, and which direction each is of."""
    rng = np.random.default_rng(seed)
    owner_N = rng.integers(groups, size=num)
    points_ND = np.eye(dim, dtype=np.float32)[owner_N] + 0.05 * rng.standard_normal((num, dim))
    return (points_ND / np.linalg.norm(points_ND, axis=1, keepdims=True)).astype(
        np.float32
    ), owner_N


def same_partition(a_N: np.ndarray, b_N: np.ndarray) -> bool:
    pairs = set(zip(a_N.tolist(), b_N.tolist(), strict=True))
    return len(pairs) == len(set(a_N.tolist())) == len(set(b_N.tolist()))


def test_well_separated_groups_are_found_and_centroids_are_unit_vectors():
    points_ND, owner_N = blobs()
    assigned_N, centroids_CD, inertia = spherical_kmeans(points_ND, 3, 20, 3, seed=0)
    assert same_partition(assigned_N, owner_N)
    np.testing.assert_allclose(np.linalg.norm(centroids_CD, axis=1), 1, atol=1e-5)
    by_hand = np.mean(((points_ND - centroids_CD[assigned_N]) ** 2).sum(1))
    assert inertia == pytest.approx(by_hand, rel=1e-3)


def test_each_point_is_with_its_nearest_centroid():
    points_ND, _ = blobs(groups=6, seed=1)
    assigned_N, centroids_CD, _ = spherical_kmeans(points_ND, 4, 20, 1, seed=3)
    np.testing.assert_array_equal(assigned_N, (points_ND @ centroids_CD.T).argmax(1))


def test_the_same_seed_gives_the_same_clusters():
    points_ND, _ = blobs(groups=6, seed=2)
    first = spherical_kmeans(points_ND.copy(), 4, 20, 2, seed=5)
    second = spherical_kmeans(points_ND.copy(), 4, 20, 2, seed=5)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_more_clusters_than_samples_and_diverged_embeddings_are_refused():
    points_ND, _ = blobs(num=4)
    with pytest.raises(ConfigError, match="5 clusters of 4 samples"):
        spherical_kmeans(points_ND, 5, 5, 1, seed=0)
    points_ND[2, 0] = np.nan
    with pytest.raises(ConfigError, match="1 of 4 embeddings are not finite"):
        spherical_kmeans(points_ND, 2, 5, 1, seed=0)


def test_labels_accumulate_as_numbers_in_base_of_the_cluster_pairs():
    rng = np.random.default_rng(0)
    rounds = [rng.integers(3, size=(200, 2)) for _ in range(2)]
    labels_N, digits = accumulate(rounds)
    # The published rule: y = 3 * image + text per round, Y <- 9 * Y + y; dense labels keep its order.
    published_N = np.zeros(200, int)
    for clusters_N2 in rounds:
        published_N = 9 * published_N + 3 * clusters_N2[:, 0] + clusters_N2[:, 1]
    np.testing.assert_array_equal(labels_N, np.unique(published_N, return_inverse=True)[1])
    for row, label in enumerate(labels_N):
        assert digits[label] == [rounds[0][row].tolist(), rounds[1][row].tolist()]


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


def test_identical_rounds_agree_fully_and_split_nothing(tmp_path):
    settings = ClusterJob(seed=0, image_clusters=3, text_clusters=3)
    embed = embeddings(tmp_path / "e0", 0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    cluster(settings, embed, None, tmp_path / "a")
    cluster(settings, embed, tmp_path / "a", tmp_path / "b")
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
