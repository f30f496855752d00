"""Laws of nearest neighbours; the oracle sorts cosines in float64 and counts votes."""

import numpy as np
import pytest

from clipgraft.config import ConfigError
from clipgraft.evaluation.neighbours import nearest_neighbours


def heaps(num: int, num_classes: int, distance: float):
    rng = np.random.default_rng(3)
    label_N = rng.integers(0, num_classes, num)
    centre_CD = distance * rng.normal(size=(num_classes, 8))
    return (centre_CD[label_N] + rng.normal(size=(num, 8))).astype(np.float32), label_N


def by_hand(image_ND: np.ndarray, label_N: np.ndarray, k: int) -> list[float]:
    unit_ND = image_ND / np.linalg.norm(image_ND.astype(np.float64), axis=1, keepdims=True)
    accs = []
    for seed in range(3):
        train, test = np.array_split(np.random.default_rng(seed).permutation(len(label_N)), 2)
        hits = 0
        for row in test:
            nearest = train[np.argsort(-(unit_ND[train] @ unit_ND[row]))[:k]]
            hits += np.bincount(label_N[nearest]).argmax() == label_N[row]  # first of equals
        accs.append(hits / len(test))
    return accs


@pytest.mark.parametrize("k", [1, 3, 10])
def test_accuracy_is_that_of_sorting_and_voting(k):
    image_ND, label_N = heaps(120, 4, 0.8)
    found = nearest_neighbours(image_ND, label_N, k, "x")
    accs = by_hand(image_ND, label_N, k)
    assert 0.3 < np.mean(accs) < 0.97  # neither trivial nor hopeless
    assert found["acc"] == pytest.approx(np.mean(accs), abs=1e-6)
    assert found["spread"] == pytest.approx(np.std(accs, ddof=1), abs=1e-6)
    assert (found["num_neighbours"], found["num_classes"]) == (k, 4)


def test_lengths_do_not_count_and_samples_without_the_label_are_left_out():
    image_ND, label_N = heaps(80, 3, 1.0)
    plain = nearest_neighbours(image_ND, label_N, 5, "x")
    assert nearest_neighbours(image_ND * np.arange(1, 81)[:, None], label_N, 5, "x") == plain
    more_ND = np.concatenate([image_ND, np.ones((9, 8), np.float32)])
    assert nearest_neighbours(more_ND, np.append(label_N, [-1] * 9), 5, "x") == plain


@pytest.mark.parametrize(
    ("labels", "k", "message"),
    [
        ([0, 1] * 20, 21, "x: num_neighbours = 21, but half of 40 samples vote"),
        ([0] * 40, 3, "x: 40 samples have the label, in 1 classes"),
    ],
)
def test_what_cannot_be_told_is_refused(labels, k, message):
    with pytest.raises(ConfigError, match=message):
        nearest_neighbours(heaps(40, 2, 1.0)[0], np.array(labels), k, "x")
