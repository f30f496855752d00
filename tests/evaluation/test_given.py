"""Laws of retrieval among candidates that agree on labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipgraft.config import ConfigError
from clipgraft.evaluation.given import evaluate_given, groups_of
from clipgraft.evaluation.retrieval import Captions, evaluate_retrieval


def features(captions_of, seed=0, dim=5):
    captions = Captions.of(captions_of)
    generator = torch.Generator().manual_seed(seed)
    image_ND = F.normalize(torch.randn(len(captions_of), dim, generator=generator), dim=-1)
    text_UD = F.normalize(torch.randn(len(captions.texts), dim, generator=generator), dim=-1)
    return captions, image_ND, text_UD


def by_hand(image_ND, text_UD, captions, captions_of, label_N):
    """R@1 both ways with loops over strings."""
    number = {text: u for u, text in enumerate(captions.texts)}
    hits = {"image_to_text": [], "text_to_image": []}
    for i, texts in enumerate(captions_of):
        group = [j for j in range(len(captions_of)) if label_N[j] == label_N[i] and captions_of[j]]
        if len(group) < 2 or label_N[i] < 0 or not texts:
            continue
        candidates = sorted({text for j in group for text in captions_of[j]})
        best = max(candidates, key=lambda text: image_ND[i] @ text_UD[number[text]])
        hits["image_to_text"].append(best in texts)
        for text in texts:
            found = max(group, key=lambda j: text_UD[number[text]] @ image_ND[j])
            hits["text_to_image"].append(text in captions_of[found])
    return {way: np.mean(of) for way, of in hits.items()}


@pytest.fixture
def data():
    rng = np.random.default_rng(5)
    captions_of = [[f"text {n}", f"also {rng.integers(9)}"][: 1 + n % 2] for n in range(40)]
    captions_of[7] = []
    label_N = rng.integers(-1, 5, 40)
    label_N[11] = 9  # without company
    return captions_of, label_N


def test_numbers_are_those_of_loops_over_the_strings(data):
    captions_of, label_N = data
    captions, image_ND, text_UD = features(captions_of)
    groups = groups_of({"label": label_N}, captions_of, "x")
    found = evaluate_given(image_ND, text_UD, captions, captions_of, groups)
    for way, value in by_hand(image_ND, text_UD, captions, captions_of, label_N).items():
        assert found[f"{way}_R@1"] == pytest.approx(value, abs=1e-6)
    assert found["num_groups"] == len(groups) == 5


def test_one_group_of_all_is_plain_retrieval(data):
    captions_of, _ = data
    captions, image_ND, text_UD = features(captions_of)
    groups = groups_of({"label": np.zeros(40, int)}, captions_of, "x")
    found = evaluate_given(image_ND, text_UD, captions, captions_of, groups)
    plain = evaluate_retrieval(image_ND, text_UD, captions)
    assert found["text_to_image_R@1"] == pytest.approx(plain["text_to_image"]["R@1"], abs=1e-6)
    assert found["image_to_text_R@1"] == pytest.approx(plain["image_to_text"]["R@1"], abs=1e-6)
    # 39 images have captions: the one that has none is no candidate here
    assert found["num_images"] == 39


def test_chance_is_what_random_features_reach():
    captions_of = [[f"{n}"] for n in range(60)]
    label_N = np.repeat([0, 1, 2], [40, 15, 5])
    groups = groups_of({"label": label_N}, captions_of, "x")
    values = []
    for seed in range(60):
        captions, image_ND, text_UD = features(captions_of, seed)
        found = evaluate_given(image_ND, text_UD, captions, captions_of, groups)
        values.append(found["mean_R@1"])
    assert found["chance"]["mean_R@1"] == pytest.approx(3 / 60, abs=1e-6)  # one of each group
    assert np.mean(values) == pytest.approx(3 / 60, abs=0.012)


def test_a_model_that_knows_the_label_alone_is_at_chance():
    """Perfect on the label, blind for the rest: plain recall is far above its chance, this one is not."""
    captions_of = [[f"{n}"] for n in range(30)]
    label_N = np.repeat(np.arange(6), 5)
    captions = Captions.of(captions_of)
    image_ND = torch.eye(6)[label_N]
    groups = groups_of({"label": label_N}, captions_of, "x")
    found = evaluate_given(image_ND, image_ND, captions, captions_of, groups)
    assert found["mean_R@1"] == pytest.approx(found["chance"]["mean_R@1"]) == pytest.approx(0.2)
    assert evaluate_retrieval(image_ND, image_ND, captions)["mean_R@1"] > 5 / 30


def test_groups_agree_on_every_label_and_have_company(data):
    captions_of, label_N = data
    other_N = np.arange(40) % 2
    groups = groups_of({"a": label_N, "b": other_N}, captions_of, "x")
    rows = np.concatenate(groups)
    assert len(np.unique(rows)) == len(rows)
    for group in groups:
        assert len(group) > 1 and len(np.unique(label_N[group])) == 1
        assert len(np.unique(other_N[group])) == 1 and (label_N[group] >= 0).all()
    assert 7 not in rows and 11 not in rows


def test_labels_that_single_out_every_image_are_refused():
    with pytest.raises(ConfigError, match="no two images with captions agree on a, b"):
        groups_of({"a": np.arange(4), "b": np.zeros(4, int)}, [["x"]] * 4, "task")
