"""What is measured on each kind of data set; every result has the public metrics and what guessing would give.

Classification and retrieval go through the functions of our own tasks, so a tie is worth what a coin would make of it;
where nothing is tied the numbers are those of CLIP_benchmark and DataComp. For retrieval every caption counts alone, as
there, also where two are equal.
"""

# Shapes: N images, C classes, D embedding, U texts, P right pairs

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from clipgraft.config import ConfigError
from clipgraft.evalset_tasks import (
    FACES,
    MMVP,
    WINOGAVIL,
    EvalsetTask,
    hub_files,
    mmvp_folder,
    the_tars,
    type_of,
)
from clipgraft.evaluation.evalset import scores
from clipgraft.evaluation.evalset.encoder import Encoder
from clipgraft.evaluation.evalset.hub import image_bytes, read_table
from clipgraft.evaluation.evalset.pictures import Pictures
from clipgraft.evaluation.evalset.tars import as_text, open_tars, read_lines
from clipgraft.evaluation.retrieval import Captions, evaluate_retrieval, recall_at
from clipgraft.evaluation.rows import Rows, blocks_of
from clipgraft.evaluation.zero_shot import best_classes, check_templates, evaluate_zero_shot

CLASSES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"


@dataclass(frozen=True)
class Measured:
    """The outcome of one task.

    Attributes:
        metrics: in the names of the public files.
        chance: what guessing gives of the main metric, if that is known.
        size: how many samples were measured.
        notes: what is not as it should be.
        zero_shot: as in the results of our own tasks.
        retrieval: likewise.
    """

    metrics: Mapping[str, float | None]
    chance: float | None
    size: int
    notes: list[str] = field(default_factory=list)
    zero_shot: dict[str, Any] = field(default_factory=dict)
    retrieval: dict[str, Any] | None = None


def measure(root: Path, task: EvalsetTask, encoder: Encoder) -> Measured:
    """Measure a model on one data set of an evaluation folder.

    Args:
        root: the folder.
        task: its data are there.
        encoder: the model.

    Raises:
        ConfigError: if the layout is another, data are damaged, or classes and labels do not belong together.
    """
    if task.key == WINOGAVIL:
        return _winogavil(root, encoder)
    if task.key == MMVP:
        return _mmvp(mmvp_folder(root), encoder)
    folder = the_tars(root, task.key)
    if folder is None:
        return _hub_retrieval(root, task, encoder)
    if task.key in FACES:
        return _faces(task, folder, encoder)
    kind = "retrieval" if task.key.startswith("retrieval/") else type_of(folder)
    if kind == "retrieval":
        data = open_tars(folder)
        return _retrieval(data.pictures, data.captions(), encoder)
    return (_multilabel if kind == "multilabel" else _classes)(task, folder, encoder)


def _classes(task: EvalsetTask, folder: Path, encoder: Encoder) -> Measured:
    data = open_tars(folder)
    classes, templates = _words(task, folder)
    label_N = data.labels(len(classes))
    # Before the images are encoded: that may take an hour.
    columns = _columns(task, data.metadata, str(folder)) if task.key in scores.FIELDS else {}
    image_ND = encoder.images(data.pictures)
    weight_CD = encoder.classifier(classes, templates)
    about = evaluate_zero_shot(image_ND, weight_CD, torch.from_numpy(label_N), classes)
    metrics = {key: about[key] for key in ("acc1", "acc5", "mean_per_class_recall")}
    if len(classes) == 5:
        metrics["acc5"] = 1.0
    if columns:
        hit_N, hit5_N = _hits(image_ND, weight_CD, label_N)
        predicted_N = best_classes(image_ND, weight_CD).numpy()
        metrics |= scores.group_metrics(task.key, hit_N, hit5_N, predicted_N, label_N, columns)
    chance = scores.chance_of(task.main_metric, len(classes), label_N, columns)
    zero_shot = {"class": {**about, "templates": templates}}
    return Measured(metrics, chance, len(label_N), data.pictures.notes, zero_shot)


def _words(task: EvalsetTask, folder: Path) -> tuple[list[str], list[str]]:
    """Class names and prompts.

    Raises:
        ConfigError: if they are not as many as the data set has.
    """
    classes, templates = (read_lines(folder, name) for name in (CLASSES, TEMPLATES))
    if task.num_classes not in (None, len(classes)):
        raise ConfigError(
            f"{folder / CLASSES} names {len(classes)} classes, but {task.name} has {task.num_classes}. Hint: download the "
            "file again; its lines are the labels, so none may be missing"
        )
    check_templates(templates, str(folder / TEMPLATES))
    return classes, templates


def _columns(task: EvalsetTask, metadata: Any, where: str) -> dict[str, np.ndarray]:
    num_columns = len(scores.FIELDS[task.key].split())
    return scores.columns_of(task.key, metadata(num_columns), where)


def _hits(image_ND: Rows, weight_CD: Tensor, label_N: np.ndarray) -> tuple[np.ndarray, ...]:
    """How probably the right class is the best one, and among the best five."""
    rows, right = torch.arange(len(label_N)), torch.from_numpy(label_N)
    hit_NK = recall_at(image_ND, weight_CD, rows, right, cutoffs=(1, 5))
    return tuple(hit_NK.numpy().T)


def _multilabel(task: EvalsetTask, folder: Path, encoder: Encoder) -> Measured:
    data = open_tars(folder)
    classes, templates = _words(task, folder)
    is_in_NC = data.metadata(len(classes)) > 0
    image_ND = encoder.images(data.pictures)
    weight_CD = encoder.classifier(classes, templates)
    score_NC = torch.cat([(each @ weight_CD.T).cpu() for each in blocks_of(image_ND)]).numpy()
    mean, chance = scores.mean_average_precision(score_NC, is_in_NC)
    return Measured({"mean_average_precision": mean}, chance, len(is_in_NC), data.pictures.notes)


def _faces(task: EvalsetTask, folder: Path, encoder: Encoder) -> Measured:
    """FairFace and UTKFace: several questions about the same pictures, which are encoded once."""
    data = open_tars(folder)
    classes, templates = (_by_objective(folder, name) for name in (CLASSES, TEMPLATES))
    columns = _columns(task, data.metadata, str(folder))
    image_ND = encoder.images(data.pictures)
    predicted = {}
    for objective in scores.OBJECTIVES:
        check_templates(templates[objective], str(folder / TEMPLATES))
        weight_CD = encoder.classifier(classes[objective], templates[objective])
        predicted[objective] = best_classes(image_ND, weight_CD).numpy()
    metrics = scores.face_metrics(predicted, columns)
    return Measured(metrics, None, len(data.places), data.pictures.notes)


def _by_objective(folder: Path, name: str) -> dict[str, list[str]]:
    """Lines `objective:text`, by objective.

    Raises:
        ConfigError: if an objective is unknown, or has no line.
    """
    found: dict[str, list[str]] = {objective: [] for objective in scores.OBJECTIVES}
    for line in read_lines(folder, name):
        objective, colon, text = line.partition(":")
        if not colon or objective not in found:
            raise ConfigError(
                f"{folder / name}: {line!r} must begin with one of {', '.join(found)} and a colon"
            )
        found[objective].append(text)
    for objective, texts in found.items():
        if not texts:
            raise ConfigError(
                f"{folder / name} has no line for {objective}. Hint: {objective}:text"
            )
    return found


def _hub_retrieval(root: Path, task: EvalsetTask, encoder: Encoder) -> Measured:
    files = hub_files(root, task.key)
    table = read_table(files, ("image", "caption"))
    cells = table["caption"].to_pylist()
    captions = [[cell] if isinstance(cell, str) else list(cell or []) for cell in cells]
    names = [f"{files[0]}: row {row}" for row in range(len(table))]
    for name, own in zip(names, captions, strict=True):
        if not own:
            raise ConfigError(f"{name} has no caption")

    def read(row: int) -> bytes:
        return image_bytes(table["image"][row].as_py(), names[row], files)

    return _retrieval(Pictures(names, read), captions, encoder)


def _retrieval(
    pictures: Pictures, captions_of: Sequence[Sequence[str]], encoder: Encoder
) -> Measured:
    image_ND = encoder.images(pictures)
    captions = Captions.of(captions_of, "each")
    about = evaluate_retrieval(image_ND, encoder.captions(captions.texts), captions)
    # A text retrieves images, and is found by them: the public names say what is retrieved.
    ways = {"image_retrieval": "text_to_image", "text_retrieval": "image_to_text"}
    metrics = {
        f"{public}_recall@{k}": about[way][f"R@{k}"]
        for public, way in ways.items()
        for k in (1, 5, 10)
    }
    metrics["mean_recall@1"] = about["mean_R@1"]
    chance = about["chance"]["mean_R@1"]
    return Measured(metrics, chance, len(pictures), pictures.notes, {}, about)


def _winogavil(root: Path, encoder: Encoder) -> Measured:
    """Which of several pictures go with a word; each picture is encoded once, though several items show it."""
    files = hub_files(root, WINOGAVIL)
    table = read_table(files, ("candidates", "candidate_images", "cue", "associations"))
    identities = _identities(table["candidate_images"])
    cells: list[tuple[int, int]] = []
    place_of: dict[Any, int] = {}
    rows: list[Any] = []
    for number, item in enumerate(table.select(["candidates", "cue", "associations"]).to_pylist()):
        names = item["candidates"]
        images = table["candidate_images"][number]
        right = np.isin(names, item["associations"])
        if len(images) != len(names) or not right.any() or not item["cue"]:
            raise ConfigError(
                f"{files[0]}: row {number} has {len(images)} images for {len(names)} candidates, of which {right.sum()} "
                f"are right for {item['cue']!r}"
            )
        pictures = [(name, next(identities)) for name in names]
        for place, picture in enumerate(pictures):
            if picture not in place_of:
                place_of[picture] = len(cells)
                cells.append((number, place))
        rows.append((item["cue"], [place_of[picture] for picture in pictures], right))

    labels = [f"{files[0]}: row {number}, candidate {place}" for number, place in cells]

    def read(row: int) -> bytes:
        number, place = cells[row]
        return image_bytes(table["candidate_images"][number][place].as_py(), labels[row], files)

    image_ND = encoder.images(Pictures(labels, read))
    text_ND = encoder.texts([cue_prompt(cue) for cue, _, _ in rows])
    score_N, guess_N = [], []
    for (_, places, right), text_D in zip(rows, text_ND, strict=True):
        best = (image_ND[places] @ text_D).topk(int(right.sum())).indices.cpu().numpy()
        score_N.append(scores.jaccard(np.isin(np.arange(len(places)), best), right))
        guess_N.append(scores.chance_of_jaccard(len(places), int(right.sum())))
    size_N = np.array([len(places) for _, places, _ in rows])
    by_size = partial(scores.jaccard_metrics, num_candidates_N=size_N)
    chance = by_size(np.array(guess_N))["jaccard_score_10-12"]
    return Measured(by_size(np.array(score_N)), chance, len(rows))


def _identities(images: pa.ChunkedArray) -> Iterator[object]:
    """What tells pictures of one name apart without reading them: path and number of bytes, one list after another."""
    cells = pc.list_flatten(images)
    if not pa.types.is_struct(cells.type):
        return iter(pc.binary_length(cells).to_pylist())
    paths = pc.struct_field(cells, "path").to_pylist()
    return zip(paths, pc.binary_length(pc.struct_field(cells, "bytes")).to_pylist(), strict=True)


def cue_prompt(cue: str) -> str:
    """As DataComp words it."""
    word = cue.lower()
    return f"An {word}" if word[0] in "aeiou" else f"A {word}"


def _mmvp(folder: Path, encoder: Encoder) -> Measured:
    """MMVP-VLM: pairs of pictures that CLIP takes for alike, and a statement for each (arXiv:2401.06209).

    A pair counts if both statements go to their own picture. The public script counts 15 pairs per attribute by their
    place in the file; here the file says which attribute a pair has.
    """
    questions = folder / "Questions.csv"
    if not questions.is_file():
        raise ConfigError(
            f"{questions} does not exist. Hint: the data set MMVP/MMVP_VLM as it is published"
        )
    text = as_text(questions.read_bytes(), str(questions))
    try:
        rows = [row for row in list(csv.reader(io.StringIO(text, newline="")))[1:] if row]
    except csv.Error as error:
        raise ConfigError(
            f"{questions}: {error}. Hint: is there a quote that does not end?"
        ) from None
    if not rows or len(rows) % 2 or any(len(row) != 3 for row in rows):
        raise ConfigError(
            f"{questions} must have pairs of rows with a number, an attribute and a statement"
        )
    paths = [folder / "MLLM_VLM Images" / kind / f"{number}.jpg" for number, kind, _ in rows]
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise ConfigError(
            f"{absent[0]} does not exist ({len(absent)} of {len(paths)} images are missing)"
        )
    image_ND = encoder.images(Pictures(list(map(str, paths)), lambda row: paths[row].read_bytes()))
    text_ND = encoder.texts([f"a photo of {statement}" for _, _, statement in rows])
    right_N = pair_hits(image_ND[:], text_ND)
    kinds = np.array([kind for _, kind, _ in rows[::2]])
    per_kind = {
        f"acc_{kind}": float(right_N[kinds == kind].mean())
        for kind in dict.fromkeys(kinds.tolist())
    }
    metrics = {**per_kind, "pair_accuracy": float(np.mean(list(per_kind.values())))}
    return Measured(metrics, 0.25, len(rows))


def pair_hits(image_ND: Tensor, text_ND: Tensor) -> np.ndarray:
    """How probably both texts of a pair go to their own image; neighbours are pairs, and a coin decides a tie."""
    score_PTI = text_ND.unflatten(0, (-1, 2)) @ image_ND.unflatten(0, (-1, 2)).mT
    ahead_PT = torch.stack(
        [score_PTI[:, 0, 0] - score_PTI[:, 0, 1], score_PTI[:, 1, 1] - score_PTI[:, 1, 0]], dim=1
    )
    hit_PT = (ahead_PT.sign().double() + 1) / 2
    return hit_PT.prod(dim=1).cpu().numpy()
