"""Stage `evaluate`: one model measured on one task.

Images are encoded once, in float32 (a table of results must not depend on which hardware has
bf16), and serve retrieval, every zero-shot label and every probe. Beside every number stands what guessing
would give. Of a mixture of experts the routing is recorded on the way.
"""

# Shapes: N images, H side of an image, U distinct captions, D embedding, C classes

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.checkpoint import Loaded
from clipgraft.config import ConfigError
from clipgraft.data.images import decode, prepare
from clipgraft.data.samples import Samples
from clipgraft.data.shapes import ATTRIBUTES, zero_shot_templates
from clipgraft.data.tokens import Tokenizer
from clipgraft.evaluation import choices
from clipgraft.evaluation.ensemble import load_side_by_side
from clipgraft.evaluation.given import evaluate_given, groups_of
from clipgraft.evaluation.probe import linear_probe
from clipgraft.evaluation.retrieval import Captions, best_candidates, evaluate_retrieval
from clipgraft.evaluation.zero_shot import check_templates, evaluate_zero_shot, zero_shot_weights
from clipgraft.evaluation_settings import TaskSettings, ZeroShotSettings
from clipgraft.lean import open_clip
from clipgraft.models.build import build, normalize, trimmed

log = logging.getLogger(__name__)

NUM_EXAMPLES = 8  # queries each way that the report shows, the same for every model
NUM_RETRIEVED = 5

Watch = Callable[[Any], None]  # told of every batch after its forward


def evaluate(
    task: TaskSettings,
    model_folder: Path,
    index_folder: Path,
    out: Path,
    *,
    task_name: str,
    beside: Sequence[Path] = (),
    untrained: int | None = None,
    threads: int = 1,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Measure a model and write `result.json` and `examples.json`; of a mixture of experts `choices.json`, too.

    Args:
        task: what is measured.
        model_folder: any model, dense, expert or MoE.
        index_folder: the samples.
        out: folder to write.
        task_name: name of the task, for messages and the result.
        beside: models whose embeddings stand beside those of the first (`ensemble`).
        untrained: seed of random weights, which take the place of those of the model.
        threads: for decoding.
        batch_size: images or texts encoded at a time; changes nothing but speed.
    Returns:
        Facts for the manifest.
    Raises:
        ConfigError: if the data have no such label or no captions, or features are not finite.
    """
    samples = Samples.open(index_folder)
    jobs = [_check_label(samples, zero_shot, task_name) for zero_shot in task.zero_shot]
    captions_of = samples.all_captions()
    captions = Captions.of(captions_of) if task.retrieval else None
    where = f"evaluate.tasks.{task_name}"
    groups = {
        "+".join(names): groups_of(
            _labels(samples, names, f"{where}.given"), captions_of, f"{where}.given"
        )
        for names in task.given
    }
    probes = _labels(samples, task.probe, f"{where}.probe")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_side_by_side([model_folder, *beside])
    loaded = loaded if untrained is None else with_random_weights(loaded, untrained)
    model = loaded.model
    model.to(device).eval()
    length = loaded.spec["config"]["text_cfg"]["context_length"]
    tokenizer = Tokenizer(loaded.tokenizer)
    recorder = choices.Recorder(model, (tokenizer.start_id, tokenizer.end_id))
    text_encoder = encoder_of_texts(model, tokenizer, length, device, batch_size)
    result: dict[str, Any] = {"task": task_name, "samples_id": samples.samples_id}
    result |= {"retrieval": None, "zero_shot": {}, "given": {}, "probe": {}, "choices": {}}
    examples: dict[str, Any] = {"samples_id": samples.samples_id}
    examples |= {"image_to_text": [], "text_to_image": []}

    with torch.inference_mode(), _true_float32():
        image_ND = encode_images(
            model,
            loaded.spec["preprocess"],
            samples,
            device,
            threads,
            batch_size,
            watch=recorder.see_images,
        )
        _check_finite(image_ND, model_folder)
        if captions is not None:
            text_UD = encoder_of_texts(
                model, tokenizer, length, device, batch_size, watch=recorder.see_texts
            )(captions.texts)
            _check_finite(text_UD, model_folder)
            result["retrieval"] = evaluate_retrieval(image_ND, text_UD, captions)
            examples |= retrieval_examples(image_ND, text_UD, captions)
            for names, rows in groups.items():
                result["given"][names] = evaluate_given(
                    image_ND, text_UD, captions, captions_of, rows
                )
        for label, classes, templates in jobs:
            weight_CD = zero_shot_weights(text_encoder, classes, templates)
            label_N = torch.from_numpy(np.asarray(samples.labels(label), dtype=np.int64))
            scores = evaluate_zero_shot(image_ND, weight_CD, label_N, classes)
            result["zero_shot"][label] = {**scores, "templates": templates}
    for label, label_N in probes.items():
        found = linear_probe(image_ND.cpu().numpy(), label_N, f"{where}.probe: label {label!r}")
        result["probe"][label] = found
    towers = recorder.towers()
    if towers:
        result["choices"] = _information(towers, probes, captions)
        shown = _spread(list(range(len(samples))))
        texts = [] if captions is None else _first_texts(captions, shown)
        grid = model.visual.grid_size
        maps = choices.examples(towers, shown, texts, grid, tokenizer.pieces)
        maps |= {key: loaded.spec["preprocess"][key] for key in ("resize_mode", "interpolation")}
        (out / "choices.json").write_text(json.dumps(maps) + "\n")

    (out / "result.json").write_text(json.dumps(result) + "\n")
    (out / "examples.json").write_text(json.dumps(examples, indent=1) + "\n")
    metrics = main_metrics(result)
    for name, value in metrics.items():
        log.info("%-28s %6.2f %%", name, 100 * value)
    return {"num_images": len(samples), "metrics": metrics}


def encode_images(
    model: open_clip.CustomTextCLIP,
    preprocess: Mapping[str, Any],
    samples: Samples,
    device: torch.device,
    threads: int,
    batch_size: int,
    watch: Watch | None = None,
) -> Tensor:
    """L2-normalised float32 features of all images, `[N, D]`, on the device; `watch` is told how many a batch had."""
    parts = []
    start = spoke = time.monotonic()
    for pixels_BHHC in _batches_of_pixels(samples, preprocess, threads, batch_size):
        pixels = torch.from_numpy(pixels_BHHC).permute(0, 3, 1, 2).to(device)
        images = normalize(pixels, preprocess["mean"], preprocess["std"])
        parts.append(F.normalize(model.encode_image(images).float(), dim=-1))
        if watch is not None:
            watch(len(images))
        if time.monotonic() - spoke > 10:
            spoke = time.monotonic()
            done = sum(map(len, parts))
            rate = done / (spoke - start)
            log.info("%s of %s images  %s/s", f"{done:,}", f"{len(samples):,}", f"{rate:,.0f}")
    return torch.cat(parts)


def encoder_of_texts(
    model: open_clip.CustomTextCLIP,
    tokenizer: Tokenizer,
    length: int,
    device: torch.device,
    batch_size: int,
    watch: Watch | None = None,
) -> Callable[[list[str]], Tensor]:
    """A function from texts to L2-normalised float32 features on the device; `watch` is told the ids of a batch."""

    def encode(texts: list[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), batch_size):
            ids = tokenizer.encode_batch(texts[start : start + batch_size], length)
            text_BL = trimmed(model, torch.from_numpy(ids))
            features = model.encode_text(text_BL.to(device))
            parts.append(F.normalize(features.float(), dim=-1))
            if watch is not None:
                watch(text_BL)
        return torch.cat(parts)

    return encode


def retrieval_examples(image_ND: Tensor, text_UD: Tensor, captions: Captions) -> dict[str, Any]:
    """A few queries each way, evenly spread over the data set, with what was retrieved."""
    right = set(zip(captions.image_P.tolist(), captions.text_P.tolist(), strict=True))
    texts_of: dict[int, list[int]] = {}
    images_of: dict[int, list[int]] = {}
    for image, text in sorted(right):
        texts_of.setdefault(image, []).append(text)
        images_of.setdefault(text, []).append(image)
    images = _spread(sorted(texts_of))
    scores, found = best_candidates(image_ND[images], text_UD, NUM_RETRIEVED)
    to_text = [
        {
            "row": image,
            "captions": [captions.texts[u] for u in texts_of[image]],
            "top": [
                {"text": captions.texts[u], "score": round(score, 4), "hit": (image, u) in right}
                for score, u in zip(scores[i].tolist(), found[i].tolist(), strict=True)
            ],
        }
        for i, image in enumerate(images)
    ]
    texts = _spread(sorted(images_of))
    scores, found = best_candidates(text_UD[texts], image_ND, NUM_RETRIEVED)
    to_image = [
        {
            "text": captions.texts[u],
            "rows": images_of[u][:NUM_RETRIEVED],
            "top": [
                {"row": row, "score": round(score, 4), "hit": (row, u) in right}
                for score, row in zip(scores[i].tolist(), found[i].tolist(), strict=True)
            ],
        }
        for i, u in enumerate(texts)
    ]
    return {"image_to_text": to_text, "text_to_image": to_image}


def main_metrics(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of a result that stand for it: R@1 both ways and their mean, accuracy per label."""
    metrics = {}
    retrieval = result["retrieval"]
    if retrieval is not None:
        metrics["image_to_text_R@1"] = retrieval["image_to_text"]["R@1"]
        metrics["text_to_image_R@1"] = retrieval["text_to_image"]["R@1"]
        metrics["mean_R@1"] = retrieval["mean_R@1"]
    metrics |= {f"{name}_acc1": about["acc1"] for name, about in result["zero_shot"].items()}
    given = {f"given {names}: R@1": each["mean_R@1"] for names, each in result["given"].items()}
    return (
        metrics | given | {f"{name}_probe": each["acc"] for name, each in result["probe"].items()}
    )


def with_random_weights(loaded: Loaded, seed: int) -> Loaded:
    """The same architecture before any training; torch's global generator is left as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return replace(loaded, model=build(loaded.spec["config"]))


def _labels(samples: Samples, names: Sequence[str], where: str) -> dict[str, np.ndarray]:
    """Class numbers of each sample by label."""
    try:
        return {name: samples.labels(name) for name in names}
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _information(
    towers: Mapping[str, choices.TowerChoices],
    labels: Mapping[str, np.ndarray],
    captions: Captions | None,
) -> dict[str, Any]:
    """What the choices of each tower say of the labels; captions have those of their images."""
    result: dict[str, Any] = {}
    for tower, of in towers.items():
        item_P, labels_P, key = np.arange(of.item_R.max(initial=-1) + 1), labels, "patch"
        if tower == "text":
            assert captions is not None
            item_P, image_P = captions.text_P.numpy(), captions.image_P.numpy()
            labels_P, key = {name: label_N[image_P] for name, label_N in labels.items()}, "token"
        about = {"layers": of.layers, "num_experts": of.num_experts}
        result[tower] = {**about, "information": choices.information(of, item_P, labels_P, key)}
    return result


def _first_texts(captions: Captions, images: Sequence[int]) -> list[int]:
    """The first caption of each image that has one."""
    rows, first = np.unique(captions.image_P.numpy(), return_index=True)
    text_of = dict(zip(rows.tolist(), captions.text_P.numpy()[first].tolist(), strict=True))
    return [text_of[image] for image in images if image in text_of]


def _check_label(
    samples: Samples, settings: ZeroShotSettings, task_name: str
) -> tuple[str, list[str], list[str]]:
    """Label, class names and prompts of one zero-shot classification."""
    label, where = settings.label, f"evaluate.tasks.{task_name}.zero_shot"
    if label not in samples.label_names:
        known = ", ".join(samples.label_names)
        hint = f"this data set has {known}" if known else "this data set has no labels at all"
        raise ConfigError(f"{where}: no label {label!r} in the data. Hint: {hint}")
    classes = list(samples.label_names[label])
    blank = [number for number, name in enumerate(classes) if not name.strip()]
    if blank or not classes:
        which = f"class {blank[0]} of {len(classes)} has" if blank else "there are"
        raise ConfigError(
            f"{where}: the label {label!r} cannot be put into words, {which} no name. "
            "Hint: give one name per class with `classes:` of the download"
        )
    if not (np.asarray(samples.labels(label)) >= 0).any():
        raise ConfigError(f"{where}: no sample has a value for the label {label!r}")
    templates = list(settings.templates)
    if not templates and label not in ATTRIBUTES:
        raise ConfigError(
            f"{where}: the label {label!r} has no templates, and only those of the built-in data "
            "set are known. Hint: templates: ['a photo of a {c}']"
        )
    templates = templates or zero_shot_templates(label)
    check_templates(templates, f"{where} ({label})")
    return label, classes, templates


def _batches_of_pixels(
    samples: Samples, preprocess: Mapping[str, Any], threads: int, batch_size: int
) -> Iterator[np.ndarray]:
    """Decoded, resized and cropped images in row order; one batch is prepared ahead."""

    def load(row: int) -> np.ndarray:
        pixels = decode(samples.image_bytes(row))
        return prepare(
            pixels, *(preprocess[key] for key in ("size", "resize_mode", "interpolation"))
        )

    with ThreadPoolExecutor(threads) as pool:
        ahead: list[Any] = []
        for start in range(0, len(samples), batch_size):
            rows = range(start, min(start + batch_size, len(samples)))
            ahead.append([pool.submit(load, row) for row in rows])
            if len(ahead) > 1:
                yield np.stack([future.result() for future in ahead.pop(0)])
        for batch in ahead:
            yield np.stack([future.result() for future in batch])


def _check_finite(features: Tensor, model_folder: Path) -> None:
    num_bad = int((~features.isfinite().all(dim=1)).sum())
    if num_bad:
        raise ConfigError(
            f"{model_folder}: {num_bad:,} of {len(features):,} features are not finite, the model "
            "has diverged. Hint: look at the loss in its metrics.jsonl; try a lower optim.lr"
        )


def _spread(items: list[int]) -> list[int]:
    places = np.linspace(0, len(items) - 1, min(NUM_EXAMPLES, len(items)))
    return [items[int(place)] for place in places]


def _true_float32() -> Any:
    # cuDNN rounds convolutions (the patch embedding) to TF32 unless told otherwise.
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
