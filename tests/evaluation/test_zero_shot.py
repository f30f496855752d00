"""Laws of zero-shot classification."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

from clipgraft.config import ConfigError
from clipgraft.evaluation import rows, zero_shot
from clipgraft.evaluation.zero_shot import check_templates, evaluate_zero_shot, zero_shot_weights


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_weights_are_normalised_means_of_normalised_prompts():
    table = {
        "a red x": [1.0, 0.0], "red y": [0.0, 1.0], "a blue x": [0.6, 0.8], "blue y": [0.6, -0.8]
    }  # fmt: skip
    weights = zero_shot_weights(
        lambda texts: torch.tensor([table[text] for text in texts]),
        ["red", "blue"],
        ["a {c} x", "{c} y"],
    )
    assert weights == pytest.approx(np.array([[2**-0.5, 2**-0.5], [1.0, 0.0]]), abs=1e-6)


def test_braces_of_other_kinds_are_left_alone():
    prompts = []

    def encode(texts: list[str]) -> torch.Tensor:
        prompts.extend(texts)
        return features(len(texts), 4)

    zero_shot_weights(encode, ["{0}"], ["a {c} {d}"])
    assert prompts == ["a {0} {d}"]


def test_scores_are_those_of_scikit_learn():
    images, weights = features(200, 5, seed=1), features(7, 5, seed=2)
    labels = torch.from_numpy(
        np.random.default_rng(0).choice(6, size=200)
    )  # class 6 does not occur
    predicted = (images.numpy() @ weights.numpy().T).argmax(1)
    result = evaluate_zero_shot(images, weights, labels, list("abcdefg"))
    assert result["acc1"] == pytest.approx(accuracy_score(labels, predicted), abs=1e-6)
    recall = recall_score(
        labels, predicted, labels=range(6), average="macro"
    )  # of those that occur
    assert result["mean_per_class_recall"] == pytest.approx(recall, abs=1e-6)
    assert result["confusion"] == confusion_matrix(labels, predicted, labels=range(7)).tolist()
    top5 = np.argsort(-images.numpy() @ weights.numpy().T)[:, :5]
    assert result["acc5"] == pytest.approx(
        (top5 == labels.numpy()[:, None]).any(1).mean(), abs=1e-6
    )
    assert result["majority"] == pytest.approx(np.bincount(labels).max() / 200)
    assert result["chance"] == 1 / 7


def test_constant_features_score_chance_whatever_the_first_class_is():
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 2, 3, 4, 5])
    same = torch.ones(10, 4) / 2
    result = evaluate_zero_shot(same, same[:6], labels, list("abcdef"))
    assert result["acc1"] == pytest.approx(1 / 6, abs=1e-6)
    assert result["mean_per_class_recall"] == pytest.approx(1 / 6, abs=1e-6)
    assert result["acc5"] == pytest.approx(5 / 6, abs=1e-6)
    assert (result["majority"], result["chance5"]) == (0.5, 5 / 6)


def test_a_tie_with_a_class_that_does_not_occur_is_half_a_hit():
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 0, 2])
    result = evaluate_zero_shot(weights[labels], weights, labels, list("abc"))
    assert result["acc1"] == pytest.approx((3 * 0.5 + 1) / 4)
    assert result["mean_per_class_recall"] == pytest.approx((0.5 + 1) / 2)
    assert result["confusion"] == [[3, 0, 0], [0, 0, 0], [0, 0, 1]]  # counts hold no halves


def test_blocks_change_nothing(monkeypatch):
    images, weights = features(40, 5, seed=1), features(7, 5, seed=2)
    labels = torch.arange(40) % 7
    whole = evaluate_zero_shot(images, weights, labels, list("abcdefg"))
    monkeypatch.setattr(rows, "BLOCK", 7)
    assert evaluate_zero_shot(images, weights, labels, list("abcdefg")) == whole


def test_of_many_classes_all_but_the_confusion_is_kept(monkeypatch):
    images, weights = features(40, 5, seed=1), features(7, 5, seed=2)
    labels = torch.arange(40) % 6  # class 6 does not occur
    whole = evaluate_zero_shot(images, weights, labels, list("abcdefg"))
    monkeypatch.setattr(zero_shot, "MAX_CONFUSION", 6)
    many = evaluate_zero_shot(images, weights, labels, list("abcdefg"))
    assert many == whole | {"confusion": None} and whole["confusion"] is not None


def test_images_without_the_label_do_not_count():
    images, weights = features(6, 4), features(3, 4, seed=1)
    labels = torch.tensor([0, -1, 2, -1, 1, -1])
    with_gaps = evaluate_zero_shot(images, weights, labels, list("abc"))
    assert with_gaps == evaluate_zero_shot(images[::2], weights, labels[::2], list("abc"))
    assert with_gaps["num_samples"] == 3
    assert with_gaps["acc5"] is None


def test_template_without_a_place_for_the_class_is_refused():
    with pytest.raises(ConfigError, match=r"tasks\.x.*'a photo'.*Hint:"):
        check_templates(["a {c}", "a photo"], "tasks.x")
