"""Laws of answers, against the model used by hand and against what the stage `evaluate` has recorded."""

import json

import numpy as np
import pytest
import torch
from open_clip import SimpleTokenizer
from safetensors.torch import load_file
from tiny_run import LENGTH, planted

from clipgraft.checkpoint import load_model
from clipgraft.config import ConfigError
from clipgraft.data.samples import Samples
from clipgraft.explore.explorer import OWN, Explorer
from clipgraft.explore.finished import Classes, FinishedRun
from clipgraft.models.moe import insert_experts

QUERY = "a small red star"


@pytest.fixture
def run(store):
    return FinishedRun.open("tiny", store)


@pytest.fixture
def explorer(run, tmp_path):
    return Explorer(run, tmp_path / "explore")


class ByHand:
    """A model with nothing of ours around it; an expert as its base with other weights."""

    def __init__(self, folder):
        base = json.loads((folder / "model.json").read_text())["base"]
        loaded = load_model(folder / (base or "."), insert_experts=insert_experts)
        if base:
            loaded.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        self.model, self.spec = loaded.model.eval(), loaded.spec
        self.tokenizer = SimpleTokenizer(bpe_path=str(loaded.tokenizer))

    def texts(self, texts):
        with torch.no_grad():
            return unit(self.model.encode_text(self.tokenizer(texts, context_length=LENGTH)))

    def images(self, samples):
        mean, std = (np.array(self.spec["preprocess"][name]) for name in ("mean", "std"))
        pixels = np.stack([np.asarray(samples.image(row)) for row in range(len(samples))]) / 255
        inputs = torch.from_numpy(((pixels - mean) / std).transpose(0, 3, 1, 2)).float()
        with torch.no_grad():
            return unit(self.model.encode_image(inputs))


def unit(vectors):
    vectors = vectors.double().numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("key", ["base", "expert_1", "moe"])
def test_pictures_of_a_query_are_those_with_the_highest_cosines(explorer, run, key):
    by_hand, samples = ByHand(run.models[key][0]), Samples.open(run.indexes["renders"])
    scores = by_hand.images(samples) @ by_hand.texts([QUERY])[0]
    found = explorer.search(key, "renders", QUERY, 6).found
    assert [each.score for each in found] == pytest.approx(sorted(scores)[:-7:-1], abs=2e-3)
    assert [scores[each.row] for each in found] == pytest.approx(
        [each.score for each in found], abs=2e-3
    )
    assert [each.captions for each in found] == [samples.captions(each.row) for each in found]


def test_stored_embeddings_are_searched_where_there_are_some(explorer, run):
    assert "embeddings of the stage embed, all 40" in explorer.about("base", "train")
    assert "made for this page, 40 of 40" in explorer.about("moe", "train")
    query_D = ByHand(run.models["base"][0]).texts([QUERY])[0]
    scores = planted("image").astype(np.float16).astype(np.float64) @ query_D
    found = explorer.search("base", "train", QUERY, 5).found
    assert [each.row for each in found] == np.argsort(-scores)[:5].tolist()
    samples = Samples.open(run.indexes["train"])
    look = explorer.look("base", "train", np.asarray(samples.image(0)), 3)
    feature_D = ByHand(run.models["base"][0]).images(samples)[0]
    best = int(np.argmax(planted("text").astype(np.float16).astype(np.float64) @ feature_D))
    assert look.captions[0][0] == " / ".join(samples.captions(best))


@pytest.mark.parametrize("key", ["base", "expert_1", "moe"])
def test_captions_and_classes_of_a_picture(explorer, run, key):
    by_hand, samples = ByHand(run.models[key][0]), Samples.open(run.indexes["renders"])
    feature_D = by_hand.images(samples)[2]
    own = Classes(["star", "circle"], ["a {c}", "one {c} here"])
    look = explorer.look(key, "renders", np.asarray(samples.image(2)), 4, ["colour"], own)

    texts = sorted({text for row in range(len(samples)) for text in samples.captions(row)})
    cosine = dict(zip(texts, by_hand.texts(texts) @ feature_D, strict=True))
    best = sorted(cosine.values())[:-5:-1]
    assert [score for _, score in look.captions] == pytest.approx(best, abs=2e-3)
    assert [cosine[text] for text, _ in look.captions] == pytest.approx(best, abs=4e-3)

    prompts = by_hand.texts(["a star", "one star here", "a circle", "one circle here"])
    direction_CD = prompts.reshape(2, 2, -1).mean(1)
    direction_CD /= np.linalg.norm(direction_CD, axis=1, keepdims=True)
    odds = np.exp(by_hand.model.logit_scale.exp().item() * direction_CD @ feature_D)
    found = dict(look.classes[OWN])
    assert [found["star"], found["circle"]] == pytest.approx(odds / odds.sum(), abs=1e-4)
    assert [p for _, p in look.classes["colour"]] == sorted(found_of(look, "colour"), reverse=True)
    assert sum(found_of(look, "colour")) == pytest.approx(1, abs=1e-5)


def found_of(look, label):
    return [p for _, p in look.classes[label]]


def test_experts_are_those_that_the_evaluation_has_recorded(explorer, run, store):
    lock = json.loads((store / "runs/tiny/versions.json").read_text())
    recorded = json.loads((store / lock["evaluate/moe/renders"] / "choices.json").read_text())
    samples = Samples.open(run.indexes["renders"])
    explorer.search("moe", "renders", "another question in between", 3)
    some = set()
    for each in recorded["image"]:
        look = explorer.look("moe", "renders", np.asarray(samples.image(each["row"])), 1)
        assert look.choices.shown[0][1].T.tolist() == each["experts"]
        assert look.grid == tuple(recorded["grid"]) and look.choices.layers == [0, 1]
        some |= set(np.ravel(each["experts"]).tolist())
    assert len(some) > 1  # else nothing was compared
    for row, each in zip(
        [each["row"] for each in recorded["image"]], recorded["text"], strict=True
    ):
        answer = explorer.search("moe", "renders", samples.captions(row)[0], 1)
        assert answer.words == each["words"]
        assert answer.choices.shown[0][1].T.tolist() == each["experts"]
        assert answer.choices.layers == [1]


def test_a_dense_model_has_no_experts_to_show(explorer, run):
    samples = Samples.open(run.indexes["renders"])
    assert explorer.search("base", "renders", QUERY, 1).choices is None
    assert explorer.look("base", "renders", np.asarray(samples.image(0)), 1).choices is None


def test_answers_do_not_depend_on_what_was_asked_before(explorer, run, tmp_path):
    first = [explorer.search(key, "renders", QUERY, 5).found for key in ("base", "expert_1", "moe")]
    explorer.search("base", "train", "blue", 5)
    again = [explorer.search(key, "renders", QUERY, 5).found for key in ("moe", "expert_1", "base")]
    assert again == first[::-1] and first[0] != first[1] != first[2]
    fresh = Explorer(run, tmp_path / "elsewhere")
    assert fresh.search("moe", "renders", QUERY, 5).found == first[2]


def test_at_most_so_many_samples_are_embedded_and_the_page_says_so(run, tmp_path):
    explorer = Explorer(run, tmp_path, num_samples=5)
    assert "5 of 24 pictures" in explorer.about("moe", "renders")
    found = explorer.search("moe", "renders", QUERY, 48).found
    assert sorted(each.row for each in found) == [0, 5, 11, 17, 23]


def test_a_mistake_has_one_clear_line(explorer, run):
    with pytest.raises(ConfigError, match=r"the query is empty\. Hint"):
        explorer.search("moe", "renders", "  ", 3)
    with pytest.raises(ConfigError, match="own classes: the template 'a photo' has no"):
        explorer.look(
            "moe", "renders", np.zeros((9, 9, 3), np.uint8), 3, [], Classes(["a"], ["a photo"])
        )
    with pytest.raises(ConfigError, match="no model 'expert_9'"):
        explorer.search("expert_9", "renders", QUERY, 3)
