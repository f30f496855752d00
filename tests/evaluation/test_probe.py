"""Laws of the linear probe."""

import itertools

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from clipgraft.config import ConfigError
from clipgraft.evaluation import probe
from clipgraft.evaluation.probe import STRENGTHS, halves, linear_probe


def blobs(num: int, num_classes: int, distance: float, dim: int = 12):
    rng = np.random.default_rng(7)
    label_N = rng.integers(0, num_classes, num)
    centre_CD = distance * rng.normal(size=(num_classes, dim))
    return (centre_CD[label_N] + rng.normal(size=(num, dim))).astype(np.float32), label_N


def test_what_is_linear_is_read_and_noise_is_not():
    image_ND, label_N = blobs(400, 4, 3.0)
    assert linear_probe(image_ND, label_N, "x")["acc"] > 0.97
    noise = np.random.default_rng(1).integers(0, 4, 400)
    found = linear_probe(image_ND, noise, "x")
    assert abs(found["acc"] - found["chance"]) < 0.1
    assert 0.2 < found["chance"] < 0.35


def test_accuracy_is_that_of_scikit_learn_used_by_hand():
    image_ND, label_N = blobs(600, 3, 0.5)
    found = linear_probe(image_ND, label_N, "x")
    accs = []
    for seed in range(20):  # other halves, so equal within what halves differ by
        a, b, y, z = train_test_split(image_ND, label_N, test_size=0.5, random_state=seed)
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        accs.append(pipeline.fit(a, y).score(b, z))
    assert 0.45 < np.mean(accs) < 0.95  # neither trivial nor hopeless
    assert found["acc"] == pytest.approx(np.mean(accs), abs=4 * np.std(accs))
    assert found["spread"] < 4 * np.std(accs)


def test_scale_and_offset_of_a_feature_do_not_matter():
    image_ND, label_N = blobs(200, 3, 1.0)
    scale_D = np.logspace(-2, 2, image_ND.shape[1])
    other = linear_probe(image_ND * scale_D + 5.0, label_N, "x")
    assert other["acc"] == pytest.approx(linear_probe(image_ND, label_N, "x")["acc"], abs=0.02)


def test_the_judging_half_decides_nothing(monkeypatch):
    """Neither the strength, which a quarter of the others chooses, nor the scale, whatever lies among what is judged."""
    image_ND, label_N = blobs(200, 3, 1.0)
    image_ND[7] = 1e4
    fitted = []
    fit = LogisticRegression.fit
    monkeypatch.setattr(
        LogisticRegression, "fit", lambda self, x, y: fitted.append(x) or fit(self, x, y)
    )
    linear_probe(image_ND, label_N, "x")
    assert [len(x) for x in fitted] == ([75] * len(STRENGTHS) + [100]) * 3
    for x in fitted:
        np.testing.assert_allclose(x.mean(0), 0, atol=1e-9)
        np.testing.assert_allclose(x.std(0), 1, atol=1e-9)


def test_every_halving_is_another_one_of_all_rows():
    drawn = [(set(train), set(test)) for train, test in halves(201)]
    assert [(len(train), len(test)) for train, test in drawn] == [(101, 100)] * 3
    assert all(train | test == set(range(201)) for train, test in drawn)
    for (one, _), (other, _) in itertools.combinations(drawn, 2):
        assert 30 < len(one & other) < 70
    image_ND, label_N = blobs(200, 3, 0.5)
    assert linear_probe(image_ND, label_N, "x")["spread"] > 0


def test_choosing_the_strength_pays_where_features_outnumber_samples(monkeypatch):
    rng = np.random.default_rng(0)
    label_N = rng.integers(0, 2, 400)
    image_ND = rng.normal(size=(400, 300))
    image_ND[:, :3] += 1.2 * label_N[:, None]
    chosen = linear_probe(image_ND, label_N, "x")["acc"]
    monkeypatch.setattr(probe, "STRENGTHS", STRENGTHS[-1:])
    assert chosen > linear_probe(image_ND, label_N, "x")["acc"] + 0.02


def test_samples_without_the_label_are_left_out():
    image_ND, label_N = blobs(200, 3, 1.0)
    has = np.random.default_rng(0).random(200) < 0.6
    found = linear_probe(image_ND, np.where(has, label_N, -1), "x")
    assert found == linear_probe(image_ND[has], label_N[has], "x")
    assert found["num_samples"] == has.sum()


def test_a_class_that_halves_may_miss_is_no_obstacle():
    image_ND, label_N = blobs(60, 2, 1.0)
    label_N[:] = 0
    label_N[3] = 1
    found = linear_probe(image_ND, label_N, "x")
    assert found["acc"] > 0.9 and found["chance"] > 0.9


@pytest.mark.parametrize("labels", [[0] * 40, [-1] * 40, [0, 1] * 5 + [-1] * 30])
def test_labels_that_cannot_be_probed_are_refused(labels):
    image_ND, _ = blobs(40, 2, 1.0)
    with pytest.raises(ConfigError, match=r"task: .* a probe needs"):
        linear_probe(image_ND, np.array(labels), "task")
