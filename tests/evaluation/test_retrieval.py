"""Laws of retrieval; the oracle ranks by sorting, and averages over all orders of equal scores."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipgraft.config import ConfigError
from clipgraft.evaluation import retrieval
from clipgraft.evaluation.retrieval import (
    Captions,
    best_candidates,
    chance_at,
    evaluate_retrieval,
    first_five,
    recall_at,
    recalls,
)


def recall_by_enumeration(scores: np.ndarray, right: set[int], k: int) -> float:
    """Share of all rankings compatible with the scores that have a right candidate in the first k."""
    hits = []
    for order in itertools.permutations(range(len(scores))):
        ranked = [scores[c] for c in order]
        if all(a >= b for a, b in itertools.pairwise(ranked)):
            hits.append(bool(right & set(order[:k])))
    return float(np.mean(hits))


def recall_of_captions(scores_NM: np.ndarray, captions: list[list[str]], k: int) -> dict:
    """Both directions by sorting all captions, duplicates and all; no ties between unlike texts."""
    flat = [(row, text) for row, texts in enumerate(captions) for text in texts]
    to_text = [
        any(flat[m][1] in captions[row] for m in np.argsort(-scores_NM[row], kind="stable")[:k])
        for row in range(len(captions))
    ]
    to_image = [
        any(text in captions[n] for n in np.argsort(-scores_NM[:, m], kind="stable")[:k])
        for m, (_, text) in enumerate(flat)
    ]
    return {"image_to_text": np.mean(to_text), "text_to_image": np.mean(to_image)}


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(
        torch.randn(*shape, generator=generator, dtype=torch.float64).float(), dim=-1
    )


def test_recall_is_the_mean_over_all_orders_of_equal_scores():
    rng = np.random.default_rng(0)
    for trial in range(30):
        scores = rng.integers(0, 3, size=6).astype(float)  # three values for six: ties for sure
        right = set(rng.choice(6, size=1 + trial % 3, replace=False).tolist())
        query_P, right_P = torch.zeros(len(right), dtype=torch.long), torch.tensor(sorted(right))
        candidates = torch.tensor(scores)[:, None].float()
        found = recall_at(torch.ones(1, 1), candidates, query_P, right_P, cutoffs=(1, 2, 5, 6))
        expected = [recall_by_enumeration(scores, right, k) for k in (1, 2, 5, 6)]
        assert found[0].tolist() == pytest.approx(expected)


def test_constant_features_score_chance():
    captions = Captions.of([["a", "b"], ["a"], ["c"], ["d", "e", "f"]])
    constant = torch.ones(1, 3) / 3**0.5
    images = constant.expand(4, -1)
    texts = constant.expand(len(captions.texts), -1)
    result = evaluate_retrieval(images, texts, captions)
    for way, k in itertools.product(("image_to_text", "text_to_image"), (1, 5, 10)):
        assert result[way][f"R@{k}"] == pytest.approx(result["chance"][f"{way}_R@{k}"])
    # By hand: 7 captions, of which 3, 2, 1, 3 are right; 4 images, of which 2, 1, 2, 1 x 4 are.
    assert result["chance"]["image_to_text_R@1"] == pytest.approx(
        (3 + 2 + 1 + 3) / (4 * 7), abs=1e-6
    )
    assert result["chance"]["text_to_image_R@1"] == pytest.approx(
        (2 + 1 + 2 + 4) / (7 * 4), abs=1e-6
    )


def test_chance_is_what_random_features_score_on_average():
    captions = Captions.of([["a", "b"], ["c"], ["d"], ["e", "f", "g"]])
    runs = [
        evaluate_retrieval(features(4, 8, seed=s), features(7, 8, seed=10_000 + s), captions)
        for s in range(2000)
    ]
    for way, k in itertools.product(("image_to_text", "text_to_image"), (1, 5)):
        mean = np.mean([run[way][f"R@{k}"] for run in runs])
        assert mean == pytest.approx(runs[0]["chance"][f"{way}_R@{k}"], abs=0.02)


def test_equal_captions_are_hits_and_counts_agree_with_sorting():
    captions = [["red", "ball"], ["red"], ["blue", "cup"], ["cup"], ["dog"], ["red", "red"]]
    counted = Captions.of(captions)
    image_ND, text_UD = features(6, 4, seed=1), features(len(counted.texts), 4, seed=2)
    text_of = dict(zip(counted.texts, text_UD, strict=True))
    flat_MD = torch.stack([text_of[text] for texts in captions for text in texts])
    expected = {k: recall_of_captions((image_ND @ flat_MD.T).numpy(), captions, k) for k in (1, 5)}
    result = evaluate_retrieval(image_ND, text_UD, counted)
    for k, way in itertools.product((1, 5), ("image_to_text", "text_to_image")):
        assert result[way][f"R@{k}"] == pytest.approx(expected[k][way], abs=1e-6)
    assert (result["num_texts"], result["num_distinct_texts"]) == (9, 5)
    half = (result["image_to_text"]["R@1"] + result["text_to_image"]["R@1"]) / 2
    assert result["mean_R@1"] == pytest.approx(half, abs=1e-6)


def test_perfect_features_score_one():
    eye = torch.eye(12)
    result = evaluate_retrieval(eye, eye, Captions.of([[str(i)] for i in range(12)]))
    assert result["image_to_text"] == result["text_to_image"] == {"R@1": 1, "R@5": 1, "R@10": 1}


def test_blocks_change_nothing(monkeypatch):
    captions = Captions.of([[f"{i % 7}", f"{i}x"] for i in range(40)])
    image_ND, text_UD = features(40, 6), features(len(captions.texts), 6, seed=3)
    whole = evaluate_retrieval(image_ND, text_UD, captions)
    best = best_candidates(image_ND, text_UD, 3)[1]
    monkeypatch.setattr(retrieval, "TILE", (7, 9))
    assert evaluate_retrieval(image_ND, text_UD, captions) == whole
    assert torch.equal(best_candidates(image_ND, text_UD, 3)[1], best)


@pytest.mark.parametrize("tile", [(1, 2), (2, 3), (100, 100)])
def test_ties_that_lie_in_several_tiles_count_as_in_one(tile, monkeypatch):
    """Of scores with few values: right candidates that are equal, beaten by later ones, or tied with wrong ones."""
    monkeypatch.setattr(retrieval, "TILE", tile)
    rng = np.random.default_rng(0)
    score_QC = rng.integers(0, 3, (20, 6)).astype(float)
    score_QC[:2] = [[1, 1, 0, 2, 2, 0], [0, 1, 1, 2, 0, 2]]
    right = [{0, 1, 3}, {1, 2, 3}]
    right += [set(rng.choice(6, size=1 + q % 4, replace=False).tolist()) for q in range(18)]
    pairs = torch.tensor([(q, c) for q, chosen in enumerate(right) for c in sorted(chosen)])
    candidate_CD, query_QD = torch.eye(6), torch.from_numpy(score_QC).float()
    found = recall_at(query_QD, candidate_CD, *pairs.T, cutoffs=(1, 2, 4))
    for q, chosen in enumerate(right):
        expected = [recall_by_enumeration(score_QC[q], chosen, k) for k in (1, 2, 4)]
        assert found[q].tolist() == pytest.approx(expected), q


def test_images_without_a_caption_are_candidates_but_no_queries():
    captions = Captions.of([["a"], [], ["b"]])
    images = torch.eye(3)
    texts = torch.stack([images[1], images[2]])  # "a" looks like the image without a caption
    result = evaluate_retrieval(images, texts, captions)
    assert result["text_to_image"]["R@1"] == 0.5
    assert result["chance"]["text_to_image_R@1"] == pytest.approx(1 / 3, abs=1e-6)
    assert result["chance"]["image_to_text_R@1"] == pytest.approx(1 / 2)


def test_a_query_without_right_candidates_never_hits():
    nothing = torch.zeros(0, dtype=torch.long)
    assert recall_at(features(2, 4), features(20, 4), nothing, nothing, cutoffs=(1,)).sum() == 0
    assert chance_at(2, 20, nothing, nothing).sum() == 0


def test_no_caption_at_all_is_refused_with_a_hint():
    with pytest.raises(ConfigError, match="Hint:"):
        Captions.of([[], []])


def test_five_captions_are_each_right_for_their_own_image_alone():
    captions_of = [["ball", "a", "b", "c", "d", "sixth"], ["ball", "e", "f", "g", "h"]]
    chosen = first_five(captions_of, "x")
    counted = Captions.of(chosen, "five_captions")
    assert counted.texts == [*captions_of[0][:5], *captions_of[1]]
    # Both images show the second one's picture best: its own "ball" is right, the first one's is not.
    image_ND = F.normalize(torch.tensor([[1.0, 0.2], [1.0, 0.0]]), dim=-1)
    text_UD = torch.tensor([[1.0, 0.0]]).expand(10, -1)
    result = evaluate_retrieval(image_ND, text_UD, counted)
    assert result["protocol"] == "five_captions" and result["num_texts"] == 10
    assert result["num_distinct_texts"] == 9
    assert result["text_to_image"]["R@1"] == 0.5
    shared = Captions.of(chosen)
    shared_UD = text_UD[: len(shared.texts)]
    # As `all`, the second image is right for "ball" of both: 6 of 10 captions.
    assert evaluate_retrieval(image_ND, shared_UD, shared)["text_to_image"]["R@1"] == 0.6


@pytest.mark.parametrize("tile", [(3, 4), (7, 50), (100, 100)])
def test_both_ways_are_those_of_sorting_every_score(tile, monkeypatch):
    monkeypatch.setattr(retrieval, "TILE", tile)
    captions = [[f"{i}.{n}" for n in range(5)] for i in range(13)]
    counted = Captions.of(captions, "five_captions")
    image_ND, text_UD = features(13, 6, seed=4), features(65, 6, seed=5)
    score_NU = image_ND.double().numpy() @ text_UD.double().numpy().T
    owner = np.repeat(np.arange(13), 5)
    pairs, weight_U = (counted.image_P, counted.text_P), counted.count_U.double()
    hits, text_hits = recalls(image_ND, text_UD, *pairs, weight_U)
    for place, k in enumerate((1, 5, 10)):
        best = np.argsort(-score_NU, axis=1)[:, :k]
        expected = [(owner[best[n]] == n).any() for n in range(13)]
        assert hits[:, place].tolist() == expected
        best = np.argsort(-score_NU.T, axis=1)[:, :k]
        assert text_hits[:, place].tolist() == [owner[u] in best[u] for u in range(65)]


def test_images_with_fewer_than_five_captions_are_refused():
    with pytest.raises(ConfigError, match=r"x\.protocol.* 1 of 2 images .*sample 1 has 4.*Hint:"):
        first_five([["a"] * 5, ["a"] * 4], "x")


def test_features_of_different_sizes_are_refused():
    captions = Captions.of([["a"], ["b"]])
    with pytest.raises(ConfigError, match=r"images in 4 numbers and texts in 6.*Hint:"):
        evaluate_retrieval(features(2, 4), features(2, 6), captions)
