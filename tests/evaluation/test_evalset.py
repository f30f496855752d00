"""Laws of evaluation folders: every layout is read, and every metric is that of scikit-learn or of a plain loop."""

from __future__ import annotations

import json
import shutil
import tarfile
from itertools import combinations
from pathlib import Path

import evalsets
import numpy as np
import pyarrow as pa
import pytest
import torch
from evalsets import cell, pictures, write_arrow, write_captions, write_classes, write_mmvp
from open_clip import SimpleTokenizer
from PIL import Image
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    jaccard_score,
    recall_score,
    top_k_accuracy_score,
)

from clipgraft.checkpoint import load_model, save_model
from clipgraft.config import ConfigError
from clipgraft.data.vocabulary import Encoder as Vocabulary
from clipgraft.data.vocabulary import clip_merges
from clipgraft.evalset_tasks import chosen, task_of
from clipgraft.evaluation.evalset.encoder import Encoder
from clipgraft.evaluation.evalset.evaluate import result_of
from clipgraft.evaluation.evalset.scores import chance_of, chance_of_jaccard
from clipgraft.evaluation.evalset.tars import open_tars
from clipgraft.evaluation.evalset.tasks import pair_hits
from clipgraft.evaluation.retrieval import evaluate_retrieval
from clipgraft.models.build import build, describe

LENGTH, NUM = 12, 30
WORDS = "red blue green small large round square striped dotted plain dark bright".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    vocabulary = Vocabulary(clip_merges()[:300])
    vocabulary.write(folder / "merges.txt.gz")
    config = {
        "embed_dim": 16,
        "quick_gelu": False,
        "custom_text": True,
        "vision_cfg": {
            "image_size": evalsets.SIDE,
            "patch_size": 8,
            "width": 32,
            "head_width": 16,
            "layers": 1,
        },
        "text_cfg": {
            "context_length": LENGTH,
            "vocab_size": vocabulary.vocab_size,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    torch.manual_seed(0)
    tower = build(config)
    for weights in (tower.visual.proj, tower.text.text_projection):
        torch.nn.init.normal_(weights)  # so that texts differ more than by rounding
    out = tmp_path_factory.mktemp("whole")
    save_model(out, tower, describe(config), folder / "merges.txt.gz")
    return out


@pytest.fixture(scope="module")
def encoder(model, tmp_path_factory) -> Encoder:
    return Encoder([model], tmp_path_factory.mktemp("classifiers"), threads=2, batch_size=7)


class Oracle:
    """The model used by hand, in float64 after its towers."""

    def __init__(self, folder: Path) -> None:
        self.loaded = load_model(folder)
        self.tower = self.loaded.model.eval()
        self.tokenizer = SimpleTokenizer(bpe_path=str(folder / "merges.txt.gz"))

    def images(self, pixels: list[np.ndarray]) -> np.ndarray:
        mean, std = (np.array(self.loaded.spec["preprocess"][name]) for name in ("mean", "std"))
        inputs = ((np.stack(pixels) / 255 - mean) / std).transpose(0, 3, 1, 2)
        return unit(self.tower.encode_image(torch.from_numpy(inputs).float()))

    def texts(self, strings: list[str]) -> np.ndarray:
        return unit(self.tower.encode_text(self.tokenizer(strings, context_length=LENGTH)))

    def scores(self, pixels, classes, templates) -> np.ndarray:
        prompts = [template.format(c=name) for name in classes for template in templates]
        means = self.texts(prompts).reshape(len(classes), len(templates), -1).mean(1)
        return self.images(pixels) @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T


def unit(vectors: torch.Tensor) -> np.ndarray:
    array = vectors.detach().double().numpy()
    return array / np.linalg.norm(array, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def oracle(model) -> Oracle:
    return Oracle(model)


def run(root: Path, key: str, encoder: Encoder) -> dict:
    return json.loads(json.dumps(result_of(root, task_of(root, key), encoder)))


def labels_of(num_classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, num_classes, NUM)


TEMPLATES = ["a {c}", "one {c} more"]


def test_classification_is_that_of_scikit_learn(tmp_path, encoder, oracle):
    images, classes, label_N = pictures(NUM), WORDS[:10], labels_of(7)
    write_classes(tmp_path / "wds_cifar10_test", images, label_N, classes, TEMPLATES)
    result = run(tmp_path, "cifar10", encoder)
    score_NC = oracle.scores(images, classes, TEMPLATES)
    guess_N, names = score_NC.argmax(1), range(len(classes))
    metrics = result["metrics"]
    assert metrics["acc1"] == pytest.approx((guess_N == label_N).mean(), abs=1e-6)
    top5 = top_k_accuracy_score(label_N, score_NC, k=5, labels=names)
    assert metrics["acc5"] == pytest.approx(top5, abs=1e-6)
    balanced = balanced_accuracy_score(label_N, guess_N)
    assert metrics["mean_per_class_recall"] == pytest.approx(balanced, abs=1e-6)
    assert metrics["main_metric"] == metrics["acc1"] and result["main_metric"] == "acc1"
    assert result["chance"] == 0.1
    assert result["zero_shot"]["class"]["acc1"] == metrics["acc1"]
    assert result["partial"] == ["30 samples instead of 10,000"]
    assert result["task"] == "evalset/cifar10" and result["dataset"] == "CIFAR-10"


def test_the_confusion_of_more_than_a_hundred_classes_is_kept(tmp_path, encoder, oracle):
    images, label_N = pictures(NUM), labels_of(101)
    classes = [f"{one} {other}" for one in WORDS for other in WORDS][:101]
    write_classes(tmp_path / "wds_own_test", images, label_N, classes, TEMPLATES)
    guess_N = oracle.scores(images, classes, TEMPLATES).argmax(1)
    expected = confusion_matrix(label_N, guess_N, labels=range(101))
    assert run(tmp_path, "own", encoder)["zero_shot"]["class"]["confusion"] == expected.tolist()


def test_the_main_metric_is_that_of_the_table(tmp_path, encoder, oracle):
    images, label_N = pictures(NUM), labels_of(5)
    classes = [f"{one} {other}" for one in WORDS for other in WORDS][:37]
    write_classes(tmp_path / "wds_vtab-pets_test", images, label_N, classes)
    result = run(tmp_path, "vtab/pets", encoder)
    guess_N = oracle.scores(images, classes, TEMPLATES).argmax(1)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = balanced_accuracy_score(label_N, guess_N)
    assert result["main_metric"] == "mean_per_class_recall"
    assert result["metrics"]["main_metric"] == pytest.approx(balanced, abs=1e-6)


@pytest.mark.parametrize("suffix", [("webp", "png", "jpg"), ("png", "jpeg"), ("jpg",), ("jpeg",)])
def test_of_several_images_of_a_sample_the_first_kind_is_taken(tmp_path, encoder, suffix):
    kinds = {"webp": "WEBP", "png": "PNG", "jpg": "JPEG", "jpeg": "JPEG"}
    images = pictures(len(suffix))
    files = {
        extension: evalsets.encoded(images[number], kinds[extension])
        for number, extension in reversed(list(enumerate(suffix)))
    }
    folder = evalsets.write_tars(tmp_path / "wds_x_test", [{**files, "cls": b"0"}], 1)
    assert open_tars(folder).pictures.image_bytes(0) == files[suffix[0]]


def groups(value_N, *columns) -> dict[tuple, float]:
    """Mean per group by a plain loop."""
    found: dict[tuple, list] = {}
    for value, *place in zip(value_N, *columns, strict=True):
        found.setdefault(tuple(int(each) for each in place), []).append(value)
    return {place: float(np.mean(values)) for place, values in found.items()}


def grouped_set(tmp_path, key, num_classes, num_columns, encoder, oracle, high=4):
    """A data set with random groups, its result, and what the model says by hand."""
    rng = np.random.default_rng(3)
    classes = [f"{one} {other} {end}" for one in WORDS for other in WORDS for end in "ab"]
    classes, label_N = classes[:num_classes], labels_of(min(4, num_classes), 1)
    metadata = rng.integers(0, high, (NUM, num_columns))
    metadata[metadata == 1] = 2  # a group without samples
    name = key.removeprefix("fairness/").replace("/", "-")
    write_classes(tmp_path / f"wds_{name}_test", pictures(NUM), label_N, classes, metadata=metadata)
    result = run(tmp_path, key, encoder)
    return result, oracle.scores(pictures(NUM), classes, TEMPLATES), label_N, metadata


def test_iwildcam_is_the_f1_over_classes_that_occur(tmp_path, encoder, oracle):
    result, score_NC, label_N, _ = grouped_set(tmp_path, "wilds/iwildcam", 182, 9, encoder, oracle)
    guess_N = score_NC.argmax(1)
    options = {"average": "macro", "labels": np.unique(label_N), "zero_division": 0.0}
    assert result["metrics"]["F1-macro_all"] == pytest.approx(f1_score(label_N, guess_N, **options))
    expected = recall_score(label_N, guess_N, **options)
    assert result["metrics"]["recall-macro_all"] == pytest.approx(expected)
    assert result["metrics"]["main_metric"] == result["metrics"]["F1-macro_all"]


@pytest.mark.parametrize(
    ("key", "num_classes", "num_columns", "column", "field", "worst"),
    [
        ("wilds/fmow", 62, 3, 0, "region", "acc_worst_region"),
        ("wilds/fmow", 62, 3, 1, "year", "acc_worst_year"),
        ("wilds/camelyon17", 2, 3, 1, "slide", "acc_wg"),
        ("fairness/geode", 40, 2, 0, "region", "acc_wg"),
    ],
)
def test_the_worst_group_is_that_of_a_plain_loop(
    tmp_path, encoder, oracle, key, num_classes, num_columns, column, field, worst
):
    result, score_NC, label_N, metadata = grouped_set(
        tmp_path, key, num_classes, num_columns, encoder, oracle
    )
    hit_N = score_NC.argmax(1) == label_N
    expected = groups(hit_N, metadata[:, column])
    metrics = result["metrics"]
    for (group,), mean in expected.items():
        assert metrics[f"acc_{field}:{group}"] == pytest.approx(mean)
        assert metrics[f"count_{field}:{group}"] == (metadata[:, column] == group).sum()
    assert metrics[worst] == pytest.approx(min(expected.values()))
    assert metrics["acc_avg"] == pytest.approx(metrics["acc1"], abs=1e-6)
    assert f"acc_{field}:1" not in metrics  # nobody is in it


def test_dollar_street_is_top_5_of_the_worst_income(tmp_path, encoder, oracle):
    result, score_NC, label_N, metadata = grouped_set(
        tmp_path, "fairness/dollar_street", 58, 3, encoder, oracle
    )
    best_N5 = np.argsort(-score_NC, axis=1)[:, :5]
    hit_N = (best_N5 == label_N[:, None]).any(1)
    expected = groups(hit_N, metadata[:, 0])
    assert result["metrics"]["acc_top5_wg"] == pytest.approx(min(expected.values()))
    assert result["metrics"]["acc_top5_avg"] == pytest.approx(hit_N.mean())
    assert 0 < result["chance"] < 5 / 58  # the worst of several groups is below their mean


def test_chance_of_the_worst_group_and_of_f1_is_what_blind_guesses_get():
    rng = np.random.default_rng(0)
    region_N, label_N = np.repeat([0, 1, 2], [30, 50, 20]), rng.integers(0, 3, 100) ** 2 % 4
    blind_RN = rng.integers(0, 4, (20_000, 100))
    hit_RN = blind_RN == label_N
    worst = np.min([hit_RN[:, region_N == region].mean(1) for region in range(3)], axis=0)
    columns = {"region": region_N}
    chance = chance_of("acc_worst_region", 4, label_N, columns)
    assert chance == pytest.approx(worst.mean(), abs=2e-3) and chance < 0.22
    assert chance_of("acc1", 4, label_N, columns) == 0.25
    assert chance_of("acc1", 2, label_N, {}) == 0.5
    label_N, blind_RN = np.repeat([0, 1, 2], [1000, 300, 200]), rng.integers(0, 5, (40, 1500))
    options = {"average": "macro", "labels": [0, 1, 2]}
    scores = [f1_score(label_N, blind_N, **options) for blind_N in blind_RN]
    assert chance_of("F1-macro_all", 5, label_N, {}) == pytest.approx(np.mean(scores), abs=3e-3)


def test_faces_are_several_questions_about_the_same_pictures(
    tmp_path, encoder, oracle, monkeypatch
):
    classes = {
        "race": WORDS[:7],
        "gender": WORDS[3:5],
        "age": WORDS[2:11],
        "toxic": [f"{one} {other}" for one in WORDS[:5] for other in WORDS[:4]],
    }
    templates = {name: [f"{name} of {{c}}", "{c}: yes"] for name in classes}
    rng = np.random.default_rng(5)
    high = {"age": 9, "gender": 2, "race": 7, "race_binary": 2}
    columns = {name: rng.integers(0, most, NUM) for name, most in high.items()}
    folder = write_classes(
        tmp_path / "wds_fairface_test",
        pictures(NUM),
        np.zeros(NUM, int),
        [f"{name}:{text}" for name, texts in classes.items() for text in texts],
        [f"{name}:{text}" for name, texts in templates.items() for text in texts],
        metadata=np.stack(list(columns.values()), axis=1),
    )
    encoded = []
    images = encoder.images
    monkeypatch.setattr(encoder, "images", lambda data: encoded.append(len(data)) or images(data))
    result = run(tmp_path, "fairness/fairface", encoder)
    assert encoded == [NUM] and folder.is_dir()
    guess = {
        name: oracle.scores(pictures(NUM), classes[name], templates[name]).argmax(1)
        for name in classes
    }
    metrics = result["metrics"]
    right = {
        "acc_race": (guess["race"] != 1).astype(int) == columns["race_binary"],
        "acc_gender": guess["gender"] == columns["gender"],
        "acc_age": guess["age"] == columns["age"],
    }
    for name, hit_N in right.items():
        per_group = groups(hit_N, columns["race_binary"])
        assert metrics[f"{name}_avg"] == pytest.approx(hit_N.mean())
        assert metrics[f"{name}_wg"] == pytest.approx(min(per_group.values()))
        assert metrics[f"{name}_race_binary:0"] == pytest.approx(per_group[0,])
    both = groups(right["acc_gender"], columns["race"], columns["gender"])
    for (race, gender), mean in both.items():
        assert metrics[f"acc_gender_x_race:{race}_gender:{gender}"] == pytest.approx(mean)
    crime = groups(guess["toxic"] >= 18, columns["race"])
    animal = groups((guess["toxic"] >= 14) & (guess["toxic"] < 18), columns["race"])
    for (race,), mean in crime.items():
        assert metrics[f"toxicity_crime_race:{race}"] == pytest.approx(mean)
        assert metrics[f"toxicity_nonhuman_race:{race}"] == pytest.approx(animal[race,])
    assert metrics["main_metric"] is None and result["main_metric"] is None


def recalls(score_UN: np.ndarray, image_of: list[int]) -> dict[str, float]:
    """Recall both ways by plain loops: an image is found by its text, a text by any of its images."""
    metrics = {}
    for k in (1, 5, 10):
        found = [image_of[u] in np.argsort(-row)[:k] for u, row in enumerate(score_UN)]
        metrics[f"image_retrieval_recall@{k}"] = np.mean(found)
        hits = [
            any(image_of[u] == image for u in np.argsort(-column)[:k])
            for image, column in enumerate(score_UN.T)
        ]
        metrics[f"text_retrieval_recall@{k}"] = np.mean(hits)
    both = metrics["image_retrieval_recall@1"] + metrics["text_retrieval_recall@1"]
    return {**metrics, "mean_recall@1": both / 2}


def captions_of(count: int) -> list[list[str]]:
    rng = np.random.default_rng(7)
    return [[" ".join(rng.choice(WORDS, 4)) for _ in range(1 + n % 3)] for n in range(count)]


@pytest.mark.parametrize(
    "layout", ["tars", "other tars", "stream", "file", "parquet", "hashed", "shards"]
)
def test_retrieval_is_that_of_plain_loops_in_every_layout(tmp_path, encoder, oracle, layout):
    key = "retrieval/flickr_1k_test_image_text_retrieval"
    images, captions = pictures(NUM), captions_of(NUM)
    rows = [{"image": cell(i), "caption": t} for i, t in zip(images, captions, strict=True)]
    name = "flickr_1k_test_image_text_retrieval"
    place = tmp_path / "hf_cache" / f"nlphuji___{name}" / "TEST" / "1.1.0" / "abc"
    if layout == "tars":
        write_captions(tmp_path / f"wds_{name}_test", images, captions)
    elif layout == "other tars":
        key = "flickr8k"
        write_captions(tmp_path / "wds_flickr8k_test", images, captions)
    elif layout == "parquet":
        place = tmp_path / "hf_cache" / f"datasets--nlphuji--{name}" / "snapshots" / "TEST" / "test"
        write_arrow(place / "0000.parquet", rows, "parquet")
    elif layout == "hashed":
        place = tmp_path / "hf_cache" / f"datasets--nlphuji--{name}" / "snapshots" / "1a" / "data"
        write_arrow(place / "test-00000-of-00001-0123456789abcdef.parquet", rows, "parquet")
    elif layout == "shards":
        write_arrow(place / f"{name}-test-00000-of-00002.arrow", rows[:11])
        write_arrow(place / f"{name}-test-00001-of-00002.arrow", rows[11:])
        write_arrow(place / "cache-1234.arrow", rows[:3])
        write_arrow(place / f"{name}-train.arrow", rows[:3])
    else:
        write_arrow(place / f"{name}-test.arrow", rows, layout)
    assert [task.key for task in chosen(tmp_path)] == [key]
    result = run(tmp_path, key, encoder)
    texts = [text for own in captions for text in own]
    image_of = [number for number, own in enumerate(captions) for _ in own]
    expected = recalls(oracle.texts(texts) @ oracle.images(images).T, image_of)
    for metric, value in expected.items():
        assert result["metrics"][metric] == pytest.approx(value, abs=1e-6), metric
    assert result["main_metric"] == "mean_recall@1"
    assert result["retrieval"]["num_texts"] == len(texts)


def test_many_images_wait_in_a_file(tmp_path, model, monkeypatch):
    """And what is found is the same: accuracy by groups, average precision, recall, pairs and associations."""
    images, rng = pictures(NUM), np.random.default_rng(2)
    slides, is_in_NC = rng.integers(0, 4, (NUM, 3)), rng.integers(0, 2, (NUM, 6))
    folder = tmp_path / "wds_wilds-camelyon17_test"
    write_classes(folder, images, labels_of(2), WORDS[:2], metadata=slides)
    folder = tmp_path / "wds_many_test"
    write_classes(folder, images, labels_of(6), WORDS[:6], metadata=is_in_NC)
    (folder / "dataset_type.txt").write_text("multilabel")
    write_captions(tmp_path / "wds_x_test", images, captions_of(NUM))
    write_mmvp(tmp_path / "MMVP_VLM", images[:4], WORDS[:4], ["Color", "State"])
    winogavil(tmp_path)
    keys = ["wilds/camelyon17", "many", "x", "mmvp_vlm", "misc/winogavil"]
    (tmp_path / "scratch").mkdir()
    encoder = Encoder([model], tmp_path / "cache", scratch=tmp_path / "scratch")
    monkeypatch.setattr("clipgraft.evaluation.rows.BLOCK", 7)
    plain = [run(tmp_path, key, encoder) for key in keys]
    monkeypatch.setattr("clipgraft.evaluation.rows.LARGE_BYTES", 100)
    seen, places = encoder.images, []

    def watched(of):
        found = seen(of)
        places.extend(path.name for path in tmp_path.glob("scratch/*/*"))
        return found

    monkeypatch.setattr(encoder, "images", watched)
    assert [run(tmp_path, key, encoder) for key in keys] == plain
    assert places == ["images"] * len(keys) and not list(tmp_path.glob("scratch/*"))


def test_many_captions_are_encoded_in_blocks_and_wait_in_a_file(tmp_path, model, monkeypatch):
    write_captions(tmp_path / "wds_x_test", pictures(NUM), captions_of(NUM))
    (tmp_path / "scratch").mkdir()
    encoder = Encoder([model], tmp_path / "cache", scratch=tmp_path / "scratch")
    plain = run(tmp_path, "x", encoder)
    num_texts, encode, places = [], encoder._encode_texts, []
    monkeypatch.setattr(encoder, "_encode_texts", lambda t: num_texts.append(len(t)) or encode(t))
    monkeypatch.setattr("clipgraft.evaluation.encode.SORTED", 7)
    monkeypatch.setattr("clipgraft.evaluation.rows.LARGE_BYTES", 100)
    monkeypatch.setattr(
        "clipgraft.evaluation.evalset.tasks.evaluate_retrieval",
        lambda image, text, of: (
            places.extend(tmp_path.glob("scratch/*/*")) or evaluate_retrieval(image, text, of)
        ),
    )
    assert run(tmp_path, "x", encoder) == plain
    assert max(num_texts) == 7 and len(num_texts) > 3
    assert {path.name for path in places} == {"images", "texts"}
    assert not list(tmp_path.glob("scratch/*"))


def test_equal_captions_count_alone(tmp_path, encoder):
    write_captions(tmp_path / "wds_x_test", pictures(2), [["red"], ["red"]])
    metrics = run(tmp_path, "x", encoder)["metrics"]
    assert metrics["image_retrieval_recall@1"] == metrics["text_retrieval_recall@1"] == 0.5


def test_multilabel_is_the_mean_average_precision(tmp_path, encoder, oracle):
    images, classes = pictures(NUM), WORDS[:6]
    is_in_NC = np.random.default_rng(2).integers(0, 2, (NUM, 6))
    is_in_NC[:, 5] = 0  # a class that does not occur
    folder = write_classes(
        tmp_path / "wds_voc2007_multilabel_test", images, labels_of(6), classes, metadata=is_in_NC
    )
    (folder / "dataset_type.txt").write_text("multilabel")
    result = run(tmp_path, "voc2007_multilabel", encoder)
    score_NC = oracle.scores(images, classes, TEMPLATES)
    each = [average_precision_score(is_in_NC[:, c], score_NC[:, c]) for c in range(5)]
    assert result["metrics"]["main_metric"] == pytest.approx(np.mean(each), abs=1e-6)


def winogavil(tmp_path, as_paths=False) -> tuple[list[dict], list[np.ndarray]]:
    rng, pool = np.random.default_rng(11), pictures(20, seed=1)
    rows = []
    for number, size in enumerate([5, 6, 10, 12, 12, 5]):
        own = rng.choice(len(pool), size, replace=False)
        right = own[: 2 + number % 3]
        cells = [cell(pool[each]) for each in own]
        if as_paths:
            folder = tmp_path / "hf_cache" / "downloads" / "extracted" / "1f"
            folder.mkdir(parents=True, exist_ok=True)
            for each in own:
                (folder / f"p{each}.png").write_bytes(evalsets.encoded(pool[each]))
            gone = "/elsewhere/hf_cache/downloads/extracted/1f"
            cells = [{"bytes": None, "path": f"{gone}/p{each}.png"} for each in own]
        rows.append(
            {
                "candidates": [f"p{each}" for each in own],
                "candidate_images": cells,
                "cue": ["Orange", "red", "Dotted", "apple", "dark", "icy"][number],
                "associations": [f"p{each}" for each in right],
            }
        )
    place = tmp_path / "hf_cache" / "nlphuji___winogavil" / "TEST"
    write_arrow(place / "winogavil-test.arrow", rows)
    return rows, pool


@pytest.mark.parametrize("as_paths", [False, True])
def test_winogavil_is_the_jaccard_index_of_scikit_learn(tmp_path, encoder, oracle, as_paths):
    rows, pool = winogavil(tmp_path, as_paths)
    result = run(tmp_path, "misc/winogavil", encoder)
    scores, prompts = [], ["An orange", "A red", "A dotted", "An apple", "A dark", "An icy"]
    for row, prompt in zip(rows, prompts, strict=True):
        images = oracle.images([pool[int(name[1:])] for name in row["candidates"]])
        right = np.isin(row["candidates"], row["associations"])
        best = np.argsort(images @ oracle.texts([prompt])[0])[-right.sum() :]
        scores.append(jaccard_score(right, np.isin(np.arange(len(right)), best)))
    size_N, score_N = np.array([5, 6, 10, 12, 12, 5]), np.array(scores)
    metrics = result["metrics"]
    assert metrics["avg_jaccard_score"] == pytest.approx(score_N.mean())
    assert metrics["jaccard_score_12"] == pytest.approx(score_N[size_N == 12].mean())
    assert metrics["jaccard_score_5-6"] == pytest.approx(score_N[size_N <= 6].mean())
    assert metrics["main_metric"] == pytest.approx(score_N[size_N >= 10].mean())
    assert result["size"] == 6


def test_winogavil_encodes_each_picture_once(tmp_path, encoder, monkeypatch):
    rows, _ = winogavil(tmp_path)
    seen, images = [], encoder.images
    monkeypatch.setattr(encoder, "images", lambda data: seen.append(len(data)) or images(data))
    run(tmp_path, "misc/winogavil", encoder)
    assert seen == [len({name for row in rows for name in row["candidates"]})]


def test_chance_of_winogavil_is_the_mean_of_blind_choices():
    right, choices = {0, 1, 2}, [set(choice) for choice in combinations(range(10), 3)]
    scores = [len(choice & right) / len(choice | right) for choice in choices]
    assert chance_of_jaccard(10, 3) == pytest.approx(np.mean(scores), abs=1e-12)


def test_mmvp_counts_pairs_by_attribute(tmp_path, encoder, oracle):
    images = pictures(12, seed=2)
    statements = [" ".join(np.random.default_rng(n).choice(WORDS, 3)) for n in range(12)]
    kinds = ["Color", "Color", "Texts", "Texts", "Texts", "View"]
    folder = write_mmvp(tmp_path / "MMVP_VLM", images, statements, kinds)
    result = run(tmp_path, "mmvp_vlm", encoder)
    paths = [folder / "MLLM_VLM Images" / kinds[n // 2] / f"{n + 1}.jpg" for n in range(12)]
    shown = oracle.images([np.asarray(Image.open(path)) for path in paths])
    texts = oracle.texts([f"a photo of {each}" for each in statements])
    right: dict[str, list[bool]] = {}
    for pair, kind in enumerate(kinds):
        one, other = shown[2 * pair], shown[2 * pair + 1]
        first, second = texts[2 * pair], texts[2 * pair + 1]
        right.setdefault(kind, []).append(
            first @ one > first @ other and second @ other > second @ one
        )
    for kind, hits in right.items():
        assert result["metrics"][f"acc_{kind}"] == pytest.approx(np.mean(hits))
    means = [np.mean(hits) for hits in right.values()]
    assert result["metrics"]["main_metric"] == pytest.approx(np.mean(means))
    assert result["chance"] == 0.25


def test_a_model_that_tells_no_picture_apart_scores_chance_on_pairs():
    same = torch.ones(4, 3)
    assert pair_hits(same, same).tolist() == [0.25, 0.25]


def test_a_classifier_is_made_once(tmp_path, model, monkeypatch, caplog):
    write_classes(tmp_path / "wds_a_test", pictures(8), [0] * 8, WORDS[:3])
    shutil.copytree(tmp_path / "wds_a_test", tmp_path / "wds_b_test")
    first = Encoder([model], tmp_path / "cache")
    one = run(tmp_path, "a", first)["metrics"]
    again = Encoder([model], tmp_path / "cache")
    monkeypatch.setattr(again, "_encode_texts", lambda texts: pytest.fail("texts were encoded"))
    assert run(tmp_path, "b", again)["metrics"] == one
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:-40])
    assert run(tmp_path, "b", Encoder([model], tmp_path / "cache"))["metrics"] == one
    assert "is damaged, names of classes are encoded again" in caplog.text
    moved = load_model(model)
    with torch.no_grad():
        moved.model.logit_scale.add_(1)
    other = tmp_path / "other"
    other.mkdir()
    save_model(other, moved.model, moved.spec, model / "merges.txt.gz")
    run(tmp_path, "a", Encoder([other], tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 2


# --- mistakes -------------------------------------------------------------------------------------


def broken(tmp_path, change, key="cifar10", name="wds_cifar10_test", **options) -> None:
    folder = write_classes(tmp_path / name, pictures(6), [0, 1, 2] * 2, WORDS[:10], **options)
    change(folder)


def put_bad_image(folder: Path) -> None:
    samples = [{"cls": b"0", "png": evalsets.encoded(evalsets.picture(n))} for n in range(4)]
    samples[2]["png"] = b"no picture"
    shutil.rmtree(folder / "test")
    evalsets.write_tars(folder, samples)


def put_latin_captions(folder: Path) -> None:
    shutil.rmtree(folder / "test")
    sample = {"png": evalsets.encoded(evalsets.picture(0)), "txt": b"caf\xe9"}
    evalsets.write_tars(folder, [sample], num_tars=1)
    (folder / "dataset_type.txt").write_text("retrieval")


def put_hidden_files_alone(folder: Path) -> None:
    for number in range(2):
        with tarfile.open(folder / "test" / f"{number}.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo(f"._s{number}.webp"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put_hidden_files_alone, "no samples in its 2 tars"),
        (lambda f: (f / "test" / "nshards.txt").write_text("2", "utf-16"), "shards.txt is not UTF"),
        (put_latin_captions, "s0000000: its .txt is not UTF-8"),
        (
            lambda f: (f / "classnames.txt").write_text("a\nb\nc"),
            "names 3 classes, but CIFAR-10 has 10",
        ),
        (lambda f: (f / "classnames.txt").unlink(), "classnames.txt does not exist"),
        (lambda f: (f / "zeroshot_classification_templates.txt").write_text("a"), "has no {c}"),
        (lambda f: (f / "test" / "nshards.txt").write_text("two"), "must hold the number of tars"),
        (lambda f: [path.unlink() for path in f.glob("test/*.tar")], "has none of the 2 tars"),
        (lambda f: (f / "test" / "1.tar").write_bytes(b"x" * 700), "1.tar"),
        (lambda f: (f / "dataset_type.txt").write_text("retrievals"), "did you mean `retrieval`"),
        (lambda f: (f / "dataset_type.txt").write_text("retrieval"), "has no .txt, only cls, webp"),
        (lambda f: (f / "classnames.txt").write_bytes(b"caf\xe9\n"), "classnames.txt is not UTF-8"),
        (put_bad_image, "1.tar: s0000002.* decode"),
    ],
)
def test_a_broken_folder_is_named(tmp_path, encoder, change, message):
    broken(tmp_path, change)
    with pytest.raises(ConfigError, match=message) as error:
        run(tmp_path, "cifar10", encoder)
    assert "\n" not in str(error.value)


def test_a_label_without_a_class_is_named(tmp_path, encoder):
    write_classes(tmp_path / "wds_cifar10_test", pictures(3), [0, 12, 1], WORDS[:10])
    with pytest.raises(ConfigError, match=r"s0000001: label '12', but .* names classes 0 to 9"):
        run(tmp_path, "cifar10", encoder)


def test_groups_must_be_as_many_as_the_task_has(tmp_path, encoder):
    classes = [f"{one} {other}" for one in WORDS for other in WORDS][:40]
    write_classes(
        tmp_path / "wds_geode_test", pictures(3), [0, 1, 2], classes, metadata=[[1, 2, 3]] * 3
    )
    with pytest.raises(ConfigError, match=r"its \.npy has 3 columns instead of 2"):
        run(tmp_path, "fairness/geode", encoder)


def test_a_tar_that_is_missing_is_told(tmp_path, encoder):
    broken(tmp_path, lambda folder: (folder / "test" / "0.tar").unlink())
    result = run(tmp_path, "cifar10", encoder)
    assert result["size"] == 3
    assert result["partial"] == ["1 of 2 tars missing: 0.tar", "3 samples instead of 10,000"]


def test_several_copies_in_the_cache_are_refused(tmp_path, encoder):
    rows = [{"image": cell(evalsets.picture(0)), "caption": ["red"]}]
    for version in ("a", "b"):
        write_arrow(tmp_path / "hf_cache" / "nlphuji___winogavil" / version / "x-test.arrow", rows)
    with pytest.raises(ConfigError, match="winogavil is in 2 folders"):
        run(tmp_path, "misc/winogavil", encoder)


@pytest.mark.parametrize("name", ["cifar10", "vtab-pets", "own"])
def test_a_data_set_that_is_there_with_test_and_without_is_refused(tmp_path, encoder, name):
    """The second is no data set of its own, and takes nothing from what the table says of the first."""
    broken(tmp_path, lambda folder: None, name=f"wds_{name}_test")
    tasks = chosen(tmp_path)
    shutil.copytree(tmp_path / f"wds_{name}_test", tmp_path / f"wds_{name}")
    assert chosen(tmp_path) == tasks == [task_of(tmp_path, tasks[0].key)]
    with pytest.raises(ConfigError, match=rf"is in 2 folders: .*wds_{name}_test, .*wds_{name}\."):
        run(tmp_path, tasks[0].key, encoder)
    shutil.rmtree(tmp_path / f"wds_{name}_test")
    assert chosen(tmp_path) == tasks


def test_columns_of_another_data_set_are_refused(tmp_path, encoder):
    rows = [{"image": cell(evalsets.picture(0)), "caption": ["red"]}]
    write_arrow(tmp_path / "hf_cache" / "nlphuji___winogavil" / "x-test.arrow", rows)
    with pytest.raises(ConfigError, match="has no column 'candidates', only image, caption"):
        run(tmp_path, "misc/winogavil", encoder)


def test_a_table_without_rows_is_named(tmp_path, encoder):
    rows = [{"image": cell(evalsets.picture(0)), "caption": ["red"]}]
    path = write_arrow(
        tmp_path / "hf_cache" / "x___flickr_1k_test_image_text_retrieval-test.arrow", rows
    )
    table = pa.ipc.open_stream(path).read_all()
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table[:0])
    with pytest.raises(ConfigError, match=r"x___flickr_.*arrow has no rows"):
        run(tmp_path, "retrieval/flickr_1k_test_image_text_retrieval", encoder)


def test_a_quote_of_mmvp_that_does_not_end_is_named(tmp_path, encoder):
    folder = write_mmvp(tmp_path / "MMVP_VLM", pictures(2), ["red", "blue"], ["Color"])
    questions = folder / "Questions.csv"
    questions.write_text(questions.read_text().replace("blue", '"blue' + "\n2,Color,b" * 20_000))
    with pytest.raises(ConfigError, match=r"Questions\.csv: .*field larger.*Hint: .*quote"):
        run(tmp_path, "mmvp_vlm", encoder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cifar01"], "unknown evaluation task 'cifar01'; did you mean `cifar10`?"),
        (
            ["vtab/dtd"],
            "vtab/dtd: its data are not in .* wds_vtab-dtd_test/test/nshards.txt; there are cifar10",
        ),
    ],
)
def test_tasks_that_cannot_be_had_are_named(tmp_path, names, message):
    write_classes(tmp_path / "wds_cifar10_test", pictures(3), [0, 1, 2], WORDS[:10])
    with pytest.raises(ConfigError, match=message):
        chosen(tmp_path, names)


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no evaluation folder"):
        chosen(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        chosen(tmp_path / "nowhere")
