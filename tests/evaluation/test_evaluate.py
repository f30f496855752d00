"""Laws of the stage `evaluate`, on a model with random weights."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer
from PIL import Image

from clipgraft.checkpoint import load_model, save_model
from clipgraft.config import ConfigError
from clipgraft.data.index import build_index
from clipgraft.data.samples import Samples
from clipgraft.data.shapes import ATTRIBUTES, draw_sample, zero_shot_templates
from clipgraft.data.tokens import Tokenizer
from clipgraft.evaluation.encode import encoder_of_texts
from clipgraft.evaluation.evaluate import evaluate, with_random_weights
from clipgraft.evaluation_settings import TaskSettings
from clipgraft.job import write_json
from clipgraft.models.build import build, describe
from clipgraft.models.moe import upcycle
from clipgraft.settings import IndexJob

SIZE, LENGTH, NUM = 16, 12, 24
TASK = {
    "data": "renders",
    "retrieval": True,
    "zero_shot": [{"label": "colour"}, {"label": "size", "templates": ["the {c} one"]}],
}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def samples():
    drawn = [draw_sample(0, "renders", i, image_size=SIZE, num_captions=2) for i in range(NUM)]
    drawn[5].captions[:] = drawn[2].captions[:1]  # one caption, and it is another sample's too
    return drawn


@pytest.fixture(scope="module")
def index(samples, tmp_path_factory) -> Path:
    download, out = tmp_path_factory.mktemp("download"), tmp_path_factory.mktemp("index")
    with tarfile.open(download / "0.tar", "w") as tar:
        for i, sample in enumerate(samples):
            kinds = ["long", "short"][: len(sample.captions)]
            about = {"captions": sample.captions, "caption_kinds": kinds, **sample.attributes}
            add(tar, f"{i:03d}.png", png(sample.image))
            add(tar, f"{i:03d}.json", json.dumps(about).encode())
    rows = [{"key": f"{i:03d}", "file": "0.tar", "status": "ok", "message": ""} for i in range(NUM)]
    pq.write_table(pa.Table.from_pylist(rows), download / "outcomes.parquet")
    classes = {**ATTRIBUTES, "blank": ["", "x"], "rare": ["never"]}
    (download / "classes.json").write_text(json.dumps(classes))
    build_index(IndexJob(min_side=8, tokenize=True), download, out, threads=1)
    return out


@pytest.fixture
def model(index, tiny_config, tmp_path) -> Path:
    about = json.loads((index / "tokens" / "tokens.json").read_text())
    text = {**tiny_config["text_cfg"], "context_length": LENGTH, "vocab_size": about["vocab_size"]}
    torch.manual_seed(0)
    config = {**tiny_config, "text_cfg": text}
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(folder, build(config), describe(config), index / "tokens" / "merges.txt.gz")
    return folder


def run(model: Path, index: Path, out: Path, task: dict, **options) -> tuple[dict, dict, dict]:
    out.mkdir()
    settings = TaskSettings.model_validate(task)
    facts = evaluate(settings, model, index, out, task_name="renders", **options)
    files = (json.loads((out / f"{name}.json").read_text()) for name in ("result", "examples"))
    return facts, *files


def unit(vectors: torch.Tensor) -> np.ndarray:
    vectors = vectors.detach().double().numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def by_hand(model: Path, index: Path, samples) -> tuple[np.ndarray, Callable]:
    """Features of all images, and a function from texts to theirs."""
    loaded = load_model(model)
    tower = loaded.model.eval()
    pixels = np.stack([np.asarray(sample.image) for sample in samples]) / 255
    mean, std = (np.array(loaded.spec["preprocess"][name]) for name in ("mean", "std"))
    inputs = torch.from_numpy(((pixels - mean) / std).transpose(0, 3, 1, 2)).float()
    tokenizer = SimpleTokenizer(bpe_path=str(index / "tokens" / "merges.txt.gz"))

    def texts(strings: list[str]) -> np.ndarray:
        return unit(tower.encode_text(tokenizer(strings, context_length=LENGTH)))

    return unit(tower.encode_image(inputs)), texts


def test_numbers_are_those_of_the_model_used_by_hand(model, index, samples, tmp_path):
    _, result, examples = run(model, index, tmp_path / "out", TASK)
    image_ND, texts = by_hand(model, index, samples)
    captions = [caption for sample in samples for caption in sample.captions]
    scores = image_ND @ texts(captions).T
    ranked = [[captions[m] for m in np.argsort(-row)] for row in scores]
    hits = [ranked[n][0] in samples[n].captions for n in range(NUM)]
    assert result["retrieval"]["image_to_text"]["R@1"] == pytest.approx(np.mean(hits), abs=1e-6)
    found = [captions[m] in samples[scores[:, m].argmax()].captions for m in range(len(captions))]
    assert result["retrieval"]["text_to_image"]["R@1"] == pytest.approx(np.mean(found), abs=1e-6)

    for query in examples["image_to_text"]:
        expected = list(dict.fromkeys(ranked[query["row"]]))[:5]
        assert [answer["text"] for answer in query["top"]] == expected
        right = [answer["text"] in samples[query["row"]].captions for answer in query["top"]]
        assert [answer["hit"] for answer in query["top"]] == right

    for label, templates in (("colour", zero_shot_templates("colour")), ("size", ["the {c} one"])):
        names = ATTRIBUTES[label]
        prompts = [texts([t.replace("{c}", name) for t in templates]).mean(0) for name in names]
        direction = np.stack([prompt / np.linalg.norm(prompt) for prompt in prompts])
        guess = (image_ND @ direction.T).argmax(1)
        truth = np.array([names.index(sample.attributes[label]) for sample in samples])
        assert result["zero_shot"][label]["acc1"] == pytest.approx(
            (guess == truth).mean(), abs=1e-6
        )


def test_batches_and_threads_change_nothing(model, index, tmp_path):
    whole = run(model, index, tmp_path / "a", TASK)
    parts = run(model, index, tmp_path / "b", TASK, batch_size=5, threads=3)
    assert parts[:2] == whole[:2]


def test_an_untrained_model_is_near_chance(model, index, tmp_path):
    facts, result, _ = run(model, index, tmp_path / "out", TASK)
    assert facts["metrics"]["colour_acc1"] == result["zero_shot"]["colour"]["acc1"] < 0.6
    assert facts["metrics"]["mean_R@1"] < 0.5


def test_probes_and_labels_given_are_those_of_the_functions(model, index, samples, tmp_path):
    task = {
        "data": "renders",
        "retrieval": True,
        "probe": ["size"],
        "given": [["size"], ["size", "background"]],
    }
    facts, result, _ = run(model, index, tmp_path / "out", {**TASK, **task}, batch_size=5)
    plain = run(model, index, tmp_path / "plain", TASK)[1]
    assert result["retrieval"] == plain["retrieval"] and plain["probe"] == plain["given"] == {}
    by_size = [
        [sample.attributes["size"] for sample in samples].count(s) for s in ("small", "large")
    ]
    assert result["given"]["size"]["num_images"] == sum(by_size) == NUM
    assert result["given"]["size"]["median_images"] == np.median(by_size)
    assert result["given"]["size+background"]["num_groups"] > 2
    assert result["probe"]["size"]["num_samples"] == NUM
    assert facts["metrics"]["size_probe"] == result["probe"]["size"]["acc"]
    assert result["choices"] == {} and not (tmp_path / "out" / "choices.json").exists()


def test_random_weights_are_of_the_seed_and_not_of_the_model(model, index, tmp_path):
    task = {"data": "renders", "probe": ["size"]}
    loaded = load_model(model)
    torch.manual_seed(4)
    expected = torch.randn(3)
    torch.manual_seed(4)
    one, same, other = (with_random_weights(loaded, seed).model.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.randn(3), expected)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["visual.conv1.weight"], other["visual.conv1.weight"])
    trained = loaded.model.state_dict()
    assert {name: t.shape for name, t in one.items()} == {
        name: t.shape for name, t in trained.items()
    }
    assert not torch.equal(one["visual.conv1.weight"], trained["visual.conv1.weight"])
    _, result, examples = run(model, index, tmp_path / "a", task, untrained=1)
    loaded.model.load_state_dict(one)
    save_model(model, loaded.model, loaded.spec, index / "tokens" / "merges.txt.gz")
    assert result == run(model, index, tmp_path / "b", task)[1]
    assert result["retrieval"] is None and examples["image_to_text"] == []


def make_mixture(model: Path, index: Path) -> None:
    loaded = load_model(model)
    state = [loaded.model.state_dict()] * 3
    layers = {"image_layers": [0], "text_layers": [0, 1]}
    moe = upcycle(
        loaded.model, state, top_k=1, generator=torch.Generator().manual_seed(0), **layers
    )
    save_model(model, loaded.model, {**loaded.spec, "moe": moe}, index / "tokens" / "merges.txt.gz")


@pytest.mark.parametrize("is_mixture", [False, True])
def test_tasks_on_the_same_samples_encode_them_once(model, index, tmp_path, is_mixture):
    if is_mixture:
        make_mixture(model, index)
    other = {**TASK, "retrieval": False, "probe": ["size"]}
    alone = run(model, index, tmp_path / "alone", other)
    write_json(index / "manifest.json", {"stage": "index", "id": "abc", "outputs": {}})
    run(model, index, tmp_path / "first", TASK, shared=tmp_path / "shared")
    download = index / json.loads((index / "samples.json").read_text())["download"]
    (download / "0.tar").rename(download / "away.tar")  # what cannot be read is not encoded again
    try:
        assert run(model, index, tmp_path / "b", other, shared=tmp_path / "shared") == alone
        with pytest.raises((ConfigError, FileNotFoundError)):
            run(model, index, tmp_path / "c", other, shared=tmp_path / "shared", untrained=1)
    finally:
        (download / "away.tar").rename(download / "0.tar")


def test_a_mixture_of_experts_says_what_its_tokens_choose(model, index, samples, tmp_path):
    make_mixture(model, index)
    out = tmp_path / "out"
    _, result, _ = run(model, index, out, {**TASK, "probe": ["size"]}, batch_size=5)
    image, text = result["choices"]["image"], result["choices"]["text"]
    assert (image["layers"], text["layers"], image["num_experts"]) == ([0], [0, 1], 3)
    assert set(image["information"]) == {"size", "patch"}
    assert set(text["information"]) == {"size", "token"}
    shown = json.loads((out / "choices.json").read_text())
    assert shown["grid"] == [2, 2] and shown["image"][0]["row"] == 0
    assert np.array(shown["image"][0]["experts"]).shape == (1, 4)
    assert " ".join(shown["text"][0]["words"]) in samples[0].captions
    assert run(model, index, tmp_path / "b", {**TASK, "probe": ["size"]})[1] == result


def test_zero_shot_alone_needs_no_retrieval(model, index, tmp_path):
    task = {"data": "renders", "zero_shot": [{"label": "shape"}]}
    facts, result, examples = run(model, index, tmp_path / "out", task)
    assert result["retrieval"] is None
    assert examples["image_to_text"] == examples["text_to_image"] == []
    assert list(facts["metrics"]) == ["shape_acc1"]


@pytest.mark.parametrize(
    ("zero_shot", "message"),
    [
        ({"label": "class"}, "this data set has colour, shape"),
        ({"label": "blank", "templates": ["a {c}"]}, "class 0 of 2 has no name"),
        ({"label": "rare", "templates": ["a {c}"]}, "no sample has a value"),
        ({"label": "rare"}, "no sample has a value"),
        ({"label": "size", "templates": ["a thing"]}, "has no {c}"),
    ],
)
def test_labels_that_cannot_work_are_refused(model, index, tmp_path, zero_shot, message):
    with pytest.raises(ConfigError, match=message):
        run(model, index, tmp_path / "out", {"data": "renders", "zero_shot": [zero_shot]})


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"probe": ["shade"]}, "tasks.renders.probe: the data has no label 'shade'"),
        ({"retrieval": True, "given": [["shade"]]}, "tasks.renders.given: the data has no label"),
        ({"probe": ["rare"]}, "renders.probe: label 'rare': 0 samples have the label"),
        ({"retrieval": True, "given": [["rare"]]}, "no two images with captions agree on rare"),
    ],
)
def test_labels_that_cannot_be_probed_are_refused(model, index, tmp_path, wanted, message):
    with pytest.raises(ConfigError, match=message):
        run(model, index, tmp_path / "out", {"data": "renders", **wanted})


@pytest.mark.parametrize("task", [TASK, {"data": "renders", "zero_shot": [{"label": "shape"}]}])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_diverged_model_is_named(model, index, tmp_path, tower, task):
    loaded = load_model(model)
    projections = {"image": loaded.model.visual.proj, "text": loaded.model.text.text_projection}
    with torch.no_grad():
        projections[tower].fill_(float("nan"))
    save_model(model, loaded.model, loaded.spec, index / "tokens" / "merges.txt.gz")
    with pytest.raises(ConfigError, match="not finite"):
        run(model, index, tmp_path / "out", task)


def test_kinds_of_captions_and_the_first_five_are_chosen(model, index, samples, tmp_path):
    def captions(retrieval: object) -> dict:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        return run(model, index, out, {"data": "renders", "retrieval": retrieval})[1]["retrieval"]

    whole = captions(True)
    assert whole["protocol"] == "all" and whole["num_texts"] == 2 * NUM - 1
    kinds = {kind for kinds in Samples.open(index).all_caption_kinds() for kind in kinds}
    assert kinds == {"long", "short"} and captions({"captions": sorted(kinds)}) == whole
    assert captions({"captions": ["short"]})["num_texts"] == NUM - 1
    found, own = captions({"captions": ["long"]}), [sample.captions[0] for sample in samples]
    image_ND, texts = by_hand(model, index, samples)
    score_NU = image_ND @ texts(own).T
    to_text = [own[best] == own[n] for n, best in enumerate(score_NU.argmax(1))]
    to_image = [own[best] == own[u] for u, best in enumerate(score_NU.argmax(0))]
    assert found["num_texts"] == NUM
    assert found["image_to_text"]["R@1"] == pytest.approx(np.mean(to_text), abs=1e-6)
    assert found["text_to_image"]["R@1"] == pytest.approx(np.mean(to_image), abs=1e-6)
    assert found["image_to_text"] != whole["image_to_text"]
    with pytest.raises(ConfigError, match=r"retrieval\.captions: .*'alt'.*Hint: the kinds"):
        captions({"captions": ["alt"]})
    with pytest.raises(ConfigError, match="24 of 24 images have fewer than five"):
        captions({"protocol": "five_captions"})


def test_neighbours_and_fewer_tokens_are_those_of_the_functions(model, index, tmp_path):
    knn = {"labels": ["size"], "num_neighbours": 3}
    robustness = {"image": ["grid", {"kind": "random", "keep": 0.5}], "text": [6, LENGTH]}
    task = {**TASK, "probe": ["size"], "knn": knn, "robustness": robustness}
    facts, result, _ = run(model, index, tmp_path / "out", task, batch_size=5)
    assert facts["metrics"]["size_knn"] == result["knn"]["size"]["acc"]
    assert result["knn"]["size"]["num_neighbours"] == 3
    points = result["robustness"]
    found = [(each["tower"], each["reduction"], each["num_tokens"]) for each in points]
    assert found == [
        ("image", "none", 4),
        ("image", "grid random", 1),
        ("image", "random 0.5", 2),
        ("text", "none", LENGTH),
        ("text", "cut 6", 6),
    ]
    keys = ["image_to_text_R@1", "text_to_image_R@1", "mean_R@1", "colour_acc1", "size_acc1"]
    for point in points:
        assert list(point["metrics"]) == keys
    assert points[0]["metrics"] == {key: facts["metrics"][key] for key in keys}
    plain = run(model, index, tmp_path / "plain", TASK, batch_size=5)[1]
    assert result["retrieval"] == plain["retrieval"] and result["zero_shot"] == plain["zero_shot"]


def test_cut_texts_are_those_of_a_tokenizer_that_cuts(model, index, samples, tmp_path):
    tower = load_model(model).model.eval()
    tokenizer = Tokenizer(index / "tokens" / "merges.txt.gz")
    texts = [caption for sample in samples for caption in sample.captions]
    encode = encoder_of_texts(tower, tokenizer, LENGTH, torch.device("cpu"), 7, cut=5)
    peer = SimpleTokenizer(bpe_path=str(index / "tokens" / "merges.txt.gz"))
    padded = F.pad(peer(texts, context_length=5), (0, LENGTH - 5))
    with torch.no_grad():
        found = encode(texts)
        expected = F.normalize(tower.encode_text(padded), dim=-1)
    assert torch.allclose(found, expected, atol=1e-6)


def test_an_image_that_has_changed_is_named(model, index, tmp_path):
    path, offset, size = Samples.open(index).place(9)
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:offset] + b"x" * size + whole[offset + size :])
        with pytest.raises(ConfigError, match=r"0\.tar is not what it was when .*Hint:"):
            run(model, index, tmp_path / "out", TASK)
    finally:
        path.write_bytes(whole)


def test_nothing_is_left_behind(model, index, tmp_path):
    run(model, index, tmp_path / "out", TASK)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "result.json",
        "examples.json",
        "answers.parquet",
    }
