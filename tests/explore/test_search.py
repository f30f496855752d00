"""Laws of searching: faiss against float64, and what is kept."""

import os

import numpy as np
import pytest

from clipgraft.explore.search import Searchable, flat_index, kept

N, D = 500, 24


@pytest.fixture
def embeddings():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(N, D))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float16)


def searchable(embedding_ND, texts):
    index = flat_index(embedding_ND)
    return Searchable(None, np.arange(N) * 3, index, index, texts.__getitem__, len(texts), "")


def test_search_is_exact(embeddings, monkeypatch):
    monkeypatch.setattr("clipgraft.explore.search._BLOCK", 7)
    query = np.random.default_rng(1).normal(size=D)
    query /= np.linalg.norm(query)
    scores = embeddings.astype(np.float64) @ query
    found = searchable(embeddings, list(map(str, range(N)))).pictures_for(query, 10)
    assert [row for row, _ in found] == (3 * np.argsort(-scores)[:10]).tolist()
    assert [score for _, score in found] == pytest.approx(sorted(scores)[:-11:-1], abs=1e-5)


def test_equal_captions_are_found_once(embeddings):
    query = embeddings[5].astype(np.float32)
    texts = ["the same"] * (N - 2) + ["another", "a third"]
    found = searchable(embeddings, texts).captions_for(query, 3)
    assert {text for text, _ in found} == set(texts)
    assert found[0] == ("the same", pytest.approx(1, abs=1e-3))


def test_nothing_is_found_among_nothing(embeddings):
    empty = searchable(embeddings[:0], [])
    assert empty.captions_for(embeddings[0], 3) == empty.pictures_for(embeddings[0], 3) == []


def test_what_is_kept_is_made_once_and_again_where_it_is_not_whole(tmp_path):
    made = []

    def make():
        made.append(len(made))
        return {"x": np.full(2, len(made))}

    first = kept(tmp_path, {"of": "a"}, make)
    assert kept(tmp_path, {"of": "a"}, make)["x"].tolist() == first["x"].tolist() == [1, 1]
    assert kept(tmp_path, {"of": "b"}, make)["x"].tolist() == [2, 2]
    for about in tmp_path.glob("*/about.json"):
        about.unlink()  # as after a kill
    for folder in list(tmp_path.iterdir()):
        (tmp_path / f"{folder.name}.{os.getpid()}").mkdir()  # of a process that had this number
    assert kept(tmp_path, {"of": "a"}, make)["x"].tolist() == [3, 3]
    assert len(list(tmp_path.iterdir())) == 4 and made == [0, 1, 2]
