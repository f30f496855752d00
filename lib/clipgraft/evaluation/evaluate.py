"""Stage `evaluate`: one model measured on one task.

Images are encoded once and serve retrieval, every zero-shot label, probes and neighbours; only `robustness` encodes
them anew, with fewer patches. Beside every number stands what guessing would give. Of a mixture of experts the routing
is recorded on the way.
"""

# Shapes: N images, U texts, D embedding, C classes

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from clipgraft.checkpoint import Loaded
from clipgraft.data.samples import Samples
from clipgraft.data.tokens import Tokenizer
from clipgraft.evaluation import choices
from clipgraft.evaluation.answers import answers_of
from clipgraft.evaluation.asked import Asked
from clipgraft.evaluation.encode import (
    Texts,
    check_finite,
    encode_images,
    encode_texts,
    encoder_of_texts,
    true_float32,
)
from clipgraft.evaluation.ensemble import load_side_by_side
from clipgraft.evaluation.examples import NUM_EXAMPLES, retrieval_examples
from clipgraft.evaluation.given import evaluate_given
from clipgraft.evaluation.retrieval import Captions, evaluate_retrieval
from clipgraft.evaluation.robustness import Ahead, robustness
from clipgraft.evaluation.rows import Rows, spread
from clipgraft.evaluation.stored import LARGEST, identity_of, key_of, stored
from clipgraft.evaluation.zero_shot import evaluate_zero_shot, zero_shot_weights
from clipgraft.evaluation_settings import TaskSettings
from clipgraft.models.build import build
from clipgraft.models.fused import fuse
from clipgraft.provenance import read_manifest

log = logging.getLogger(__name__)


def evaluate(
    task: TaskSettings,
    model_folder: Path,
    index_folder: Path,
    out: Path,
    *,
    task_name: str,
    beside: Sequence[Path] = (),
    untrained: int | None = None,
    shared: Path | None = None,
    threads: int = 1,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Measure a model and write `result.json`, `examples.json` and `answers.parquet`; of a MoE `choices.json`, too.

    Args:
        task: what is measured.
        model_folder: any model, dense, expert or MoE.
        index_folder: the samples.
        out: folder to write.
        task_name: name of the task, for messages and the result.
        beside: models whose embeddings stand beside those of the first (`ensemble`).
        untrained: seed of random weights, which take the place of those of the model.
        shared: folder in which tasks of one model on the same samples share the features of images.
        threads: for decoding, and on a CPU for encoding images.
        batch_size: images or texts encoded at a time; by default what suits the device and the threads.
    Returns:
        Facts for the manifest.
    Raises:
        ConfigError: if the data have no such label or no captions, if an image cannot be decoded, or if the features of
            the model are not finite or not comparable.
    """
    asked = Asked.of(task, index_folder, task_name)
    loaded = load_side_by_side([model_folder, *beside])
    loaded = loaded if untrained is None else with_random_weights(loaded, untrained)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        subject = _Subject.of(loaded, Path(scratch), threads, batch_size)
        if shared is not None:
            models = identity_of([model_folder, *beside], Path(__file__))
            samples = read_manifest(index_folder)["id"]
            key = key_of(models, samples, untrained, subject.device.type)
            subject = replace(subject, shared=shared / f"{key}.npz")
        result, files, answers = _measure(task, asked, subject, model_folder)
    files["result.json"] = {"task": task_name, **result}
    for name, content in files.items():
        (out / name).write_text(json.dumps(content) + "\n")
    pq.write_table(answers, out / "answers.parquet")
    metrics = main_metrics(result)
    for name, value in metrics.items():
        log.info("%-28s %6.2f %%", name, 100 * value)
    return {"num_images": len(asked.samples), "metrics": metrics}


@dataclass(frozen=True)
class _Subject:
    """A model that is measured, on its device, and how it is fed; `shared` is where features of its images are kept."""

    loaded: Loaded
    tokenizer: Tokenizer
    device: torch.device
    scratch: Path
    threads: int
    batch_size: int | None
    shared: Path | None = None

    @classmethod
    def of(cls, loaded: Loaded, scratch: Path, threads: int, batch_size: int | None) -> _Subject:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded.model.to(device).eval()
        fuse(loaded.model)
        return cls(loaded, Tokenizer(loaded.tokenizer), device, scratch, threads, batch_size)

    @property
    def text_length(self) -> int:
        return int(self.loaded.spec["config"]["text_cfg"]["context_length"])

    def whole_images(self, samples: Samples, recorder: choices.Recorder) -> Rows:
        """Features of all images, and the recorded routing, from the file where another task has left them."""
        dim = self.loaded.spec["config"]["embed_dim"] * len(
            getattr(self.loaded.model, "models", [1])
        )

        def encoded() -> Rows:
            watch = recorder.see_images if self.loaded.spec["moe"] else None
            return self.images(samples, "images", watch=watch)

        def arrays() -> dict[str, np.ndarray]:
            return {"image_ND": encoded()[:].cpu().numpy(), **recorder.of_images()}

        if self.shared is None or 4 * len(samples) * dim > LARGEST:
            return encoded()
        found = stored(self.shared, arrays)
        recorder.see_again(found)
        return torch.from_numpy(found["image_ND"]).to(self.device)

    def images(self, samples: Samples, name: str, **more: Any) -> Rows:
        """Features of all images; `name` is of the file for many."""
        how = (self.device, self.threads, self.batch_size)
        preprocess, file = self.loaded.spec["preprocess"], self.scratch / name
        return encode_images(self.loaded.model, preprocess, samples, *how, file=file, **more)

    def texts(self, **more: Any) -> Texts:
        """A function from texts to features."""
        how = (self.tokenizer, self.text_length, self.device, self.batch_size)
        return encoder_of_texts(self.loaded.model, *how, **more)

    def captions(self, encode: Texts, captions: Captions, name: str) -> Rows:
        """Features of all captions; `name` is of the file for many."""
        return encode_texts(encode, captions.texts, self.scratch / name)


def _measure(
    task: TaskSettings, asked: Asked, subject: _Subject, model_folder: Path
) -> tuple[dict[str, Any], dict[str, Any], pa.Table]:
    """The result, what else is to be written, by file, and the model's answers."""
    captions, spec, model = asked.captions, subject.loaded.spec, subject.loaded.model
    images = spread(len(asked.samples), NUM_EXAMPLES).tolist()
    texts = [] if captions is None else _first_texts(captions, images)
    shown = {"image": images, "text": texts}
    num_items = {"image": len(asked.samples), "text": len(captions.texts) if captions else 0}
    special_ids = (subject.tokenizer.start_id, subject.tokenizer.end_id)
    recorder = choices.Recorder(model, special_ids, num_items, shown)
    result: dict[str, Any] = {"samples_id": asked.samples.samples_id}
    examples: dict[str, Any] = {"samples_id": asked.samples.samples_id}
    examples |= {"image_to_text": [], "text_to_image": []}
    with torch.inference_mode(), true_float32():
        image_ND = subject.whole_images(asked.samples, recorder)
        check_finite(image_ND, model_folder)
        text_UD = None
        if captions is not None:
            encode = subject.texts(watch=recorder.see_texts if spec["moe"] else None)
            text_UD = subject.captions(encode, captions, "texts")
            check_finite(text_UD, model_folder)
        weights = _directions(subject.texts(), asked)
        for weight_CD in weights.values():
            check_finite(weight_CD, model_folder)
        plain = _scores(asked, image_ND, text_UD, weights)
        result |= {**plain, "given": {}, "robustness": []}
        if captions is not None and text_UD is not None:
            examples |= retrieval_examples(image_ND, text_UD, captions)
            for names, rows in asked.groups.items():
                result["given"][names] = evaluate_given(
                    image_ND, text_UD, captions, asked.captions_of, rows
                )
        label_Ns = {label: label_N.numpy() for label, (label_N, *_) in asked.classes.items()}
        answers = answers_of(image_ND, text_UD, captions, weights, label_Ns)
        if task.robustness is not None:
            whole = (image_ND, text_UD, weights)
            result["robustness"] = _with_fewer_tokens(task, asked, subject, plain, whole)
    result |= {**_read_off(task, asked, image_ND), "choices": {}}
    files = {"examples.json": examples}
    towers = recorder.towers()
    if towers:
        probes = {label: asked.labels[label] for label in task.probe}
        result["choices"] = _information(towers, probes, captions)
        pieces = subject.tokenizer.pieces
        maps = choices.examples(towers, images, texts, model.visual.grid_size, pieces)
        maps |= {key: spec["preprocess"][key] for key in ("resize_mode", "interpolation")}
        files["choices.json"] = maps
    return result, files, answers


def _read_off(task: TaskSettings, asked: Asked, image_ND: Rows) -> dict[str, Any]:
    """What a linear classifier and the nearest images tell of labels."""
    found: dict[str, Any] = {"probe": {}, "knn": {}}
    if not asked.labels:
        return found
    # Here, since tasks without them need not wait for scikit-learn.
    from clipgraft.evaluation.neighbours import nearest_neighbours
    from clipgraft.evaluation.probe import linear_probe

    features_ND = image_ND[:].cpu().numpy()
    for label in task.probe:
        where = f"{asked.where}.probe: label {label!r}"
        found["probe"][label] = linear_probe(features_ND, asked.labels[label], where)
    if task.knn is not None:
        for label in task.knn.labels:
            where = f"{asked.where}.knn: label {label!r}"
            found["knn"][label] = nearest_neighbours(
                features_ND, asked.labels[label], task.knn.num_neighbours, where
            )
    return found


def _directions(encode: Texts, asked: Asked) -> dict[str, Tensor]:
    """Directions of the classes of each label."""
    return {
        label: zero_shot_weights(encode, classes, templates)
        for label, (_, classes, templates) in asked.classes.items()
    }


def _scores(
    asked: Asked, image_ND: Rows, text_UD: Rows | None, weights: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Retrieval and zero-shot classification of any features of these data."""
    result: dict[str, Any] = {"retrieval": None, "zero_shot": {}}
    if asked.captions is not None and text_UD is not None:
        result["retrieval"] = evaluate_retrieval(image_ND, text_UD, asked.captions)
    for label, (label_N, classes, templates) in asked.classes.items():
        scores = evaluate_zero_shot(image_ND, weights[label], label_N, classes)
        result["zero_shot"][label] = {**scores, "templates": templates}
    return result


def _with_fewer_tokens(
    task: TaskSettings,
    asked: Asked,
    subject: _Subject,
    plain: Mapping[str, Any],
    whole: tuple[Rows, Rows | None, Mapping[str, Tensor]],
) -> list[dict[str, Any]]:
    """The main metrics of retrieval and zero-shot classification with fewer tokens of one side."""
    image_ND, text_UD, weights = whole

    def of_images(ahead: Ahead) -> dict[str, float]:
        fewer_ND = subject.images(asked.samples, "fewer", ahead=ahead)
        return main_metrics(_scores(asked, fewer_ND, text_UD, weights))

    def of_texts(cut: int) -> dict[str, float]:
        encode = subject.texts(cut=cut)
        fewer_UD = None
        if asked.captions is not None:
            fewer_UD = subject.captions(encode, asked.captions, "cut_texts")
        return main_metrics(_scores(asked, image_ND, fewer_UD, _directions(encode, asked)))

    assert task.robustness is not None
    about = (subject.loaded.model, subject.text_length, subject.device, main_metrics(plain))
    return robustness(task.robustness, *about, of_images, of_texts)


def main_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a result that stand for it: R@1 both ways and their mean, accuracy per label."""
    metrics = {}
    retrieval = result["retrieval"]
    if retrieval is not None:
        metrics["image_to_text_R@1"] = retrieval["image_to_text"]["R@1"]
        metrics["text_to_image_R@1"] = retrieval["text_to_image"]["R@1"]
        metrics["mean_R@1"] = retrieval["mean_R@1"]
    metrics |= {f"{name}_acc1": about["acc1"] for name, about in result["zero_shot"].items()}
    for names, each in result.get("given", {}).items():
        metrics[f"given {names}: R@1"] = each["mean_R@1"]
    for kind in ("probe", "knn"):
        found = result.get(kind, {})
        metrics |= {f"{name}_{kind}": each["acc"] for name, each in found.items()}
    return metrics


def with_random_weights(loaded: Loaded, seed: int) -> Loaded:
    """The same architecture before any training; torch's global generator is left as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return replace(loaded, model=build(loaded.spec["config"]))


def _information(
    towers: Mapping[str, choices.TowerChoices],
    labels: Mapping[str, np.ndarray],
    captions: Captions | None,
) -> dict[str, Any]:
    """What the choices of each tower say of the labels; captions have those of their images."""
    result: dict[str, Any] = {}
    for tower, of in towers.items():
        item_P, labels_P, key = np.arange(len(of.count_IME)), labels, "patch"
        if tower == "text":
            assert captions is not None
            item_P, image_P = captions.text_P.numpy(), captions.image_P.numpy()
            labels_P, key = {name: label_N[image_P] for name, label_N in labels.items()}, "token"
        about = {"layers": of.layers, "num_experts": of.num_experts}
        result[tower] = {**about, "information": choices.information(of, item_P, labels_P, key)}
    return result


def _first_texts(captions: Captions, images: Sequence[int]) -> list[int]:
    """The first caption of each image that has one."""
    own = [captions.text_P[captions.image_P == image] for image in images]
    return [int(text_C[0]) for text_C in own if len(text_C)]
