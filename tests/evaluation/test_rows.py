"""Laws of feature rows: whether they are in memory or in a file changes nothing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipgraft.evaluation import retrieval, rows
from clipgraft.evaluation.retrieval import Captions, best_candidates, evaluate_retrieval
from clipgraft.evaluation.rows import FileRows, collect
from clipgraft.evaluation.zero_shot import evaluate_zero_shot


def unit(num: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def in_file(features: torch.Tensor, file, monkeypatch) -> FileRows:
    monkeypatch.setattr(rows, "LARGE_BYTES", 0)
    found = collect(features.split(5), len(features), file)
    assert isinstance(found, FileRows)
    return found


def test_rows_of_a_file_are_those_of_the_tensor(tmp_path, monkeypatch):
    features = unit(23, 6, 0)
    stored = in_file(features, tmp_path / "rows", monkeypatch)
    assert (len(stored), stored.shape) == (23, (23, 6))
    for chosen in (slice(0, 23), slice(7, 9), slice(20, 99), slice(9, 9), [3, 1, 3]):
        assert torch.equal(stored[chosen], features[chosen])
    for chosen in (torch.tensor([4, 0]), np.array([22, 5])):
        assert torch.equal(stored[chosen], features[chosen])
    assert (tmp_path / "rows").stat().st_size == 23 * 6 * 4


def test_few_rows_stay_in_memory(tmp_path):
    features = unit(10, 4, 0)
    assert torch.equal(collect(features.split(3), 10, tmp_path / "rows"), features)
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize("protocol", ["all", "five_captions"])
def test_results_are_the_same_from_a_file(tmp_path, monkeypatch, protocol):
    captions_of = [[f"{i % 9}", *(f"{i}-{n}" for n in range(4))] for i in range(30)]
    captions = Captions.of(captions_of, protocol)
    image_ND, text_UD = unit(30, 8, 1), unit(len(captions.texts), 8, 2)
    monkeypatch.setattr(retrieval, "TILE", (11, 17))
    expected = evaluate_retrieval(image_ND, text_UD, captions)
    files = [
        in_file(of, tmp_path / name, monkeypatch)
        for name, of in (("image", image_ND), ("text", text_UD))
    ]
    assert evaluate_retrieval(*files, captions) == expected
    for own, other in zip(
        best_candidates(image_ND[:4], files[1], 3),
        best_candidates(image_ND[:4], text_UD, 3),
        strict=True,
    ):
        assert torch.equal(own, other)
    label_N = torch.arange(30) % 7 - 1
    scores = [
        evaluate_zero_shot(of, unit(6, 8, 3), label_N, list("abcdef"))
        for of in (image_ND, files[0])
    ]
    assert scores[0] == scores[1]
