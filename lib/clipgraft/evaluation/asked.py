"""What a task asks of its data: labels, classes, captions, read and checked before any model is."""

# Shapes: N images

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipgraft.config import ConfigError
from clipgraft.data.samples import Samples
from clipgraft.data.shapes import ATTRIBUTES, zero_shot_templates
from clipgraft.evaluation.given import groups_of
from clipgraft.evaluation.retrieval import Captions, first_five
from clipgraft.evaluation.zero_shot import check_templates
from clipgraft.evaluation_settings import RetrievalSettings, TaskSettings, ZeroShotSettings


@dataclass(frozen=True)
class Asked:
    """What a task asks of its data.

    Attributes:
        samples: the data.
        captions_of: captions of each image; those that take part in retrieval.
        captions: the same as retrieval counts them; None without retrieval.
        classes: of each zero-shot label: class number of each sample, names, prompts.
        groups: rows of images that agree, by the labels given.
        labels: class numbers of each sample, for probes and neighbours.
        where: for messages.
    """

    samples: Samples
    captions_of: list[list[str]]
    captions: Captions | None
    classes: dict[str, tuple[Tensor, list[str], list[str]]]
    groups: dict[str, list[np.ndarray]]
    labels: dict[str, np.ndarray]
    where: str

    @classmethod
    def of(cls, task: TaskSettings, index_folder: Path, task_name: str) -> Asked:
        """Read the samples.

        Raises:
            ConfigError: if they lack a label, a name of a class, or captions.
        """
        samples, where = Samples.open(index_folder), f"evaluate.tasks.{task_name}"
        classes = {
            each.label: check_label(samples, each, f"{where}.zero_shot") for each in task.zero_shot
        }
        captions_of, captions = samples.all_captions(), None
        if task.retrieval is not None:
            captions_of = chosen_captions(samples, task.retrieval, f"{where}.retrieval")
            captions = Captions.of(captions_of, task.retrieval.protocol)
        groups = {
            "+".join(names): groups_of(
                _labels(samples, names, f"{where}.given"), captions_of, f"{where}.given"
            )
            for names in task.given
        }
        labels = _labels(samples, task.probe, f"{where}.probe")
        if task.knn is not None:
            labels |= _labels(samples, task.knn.labels, f"{where}.knn")
        return cls(samples, captions_of, captions, classes, groups, labels, where)


def chosen_captions(samples: Samples, settings: RetrievalSettings, where: str) -> list[list[str]]:
    """Captions of each image that take part in retrieval."""
    captions_of = samples.all_captions()
    if settings.captions:
        kinds_of = samples.all_caption_kinds()
        known = {kind for kinds in kinds_of for kind in kinds}
        for kind in settings.captions:
            if kind not in known:
                raise ConfigError(
                    f"{where}.captions: no caption is of kind {kind!r}. Hint: the kinds of these data: "
                    f"{', '.join(sorted(known)) or 'none'}; they get their names under `download`"
                )
        captions_of = [
            [text for text, kind in zip(texts, kinds, strict=True) if kind in settings.captions]
            for texts, kinds in zip(captions_of, kinds_of, strict=True)
        ]
    return first_five(captions_of, where) if settings.protocol == "five_captions" else captions_of


def _labels(samples: Samples, names: Sequence[str], where: str) -> dict[str, np.ndarray]:
    """Class numbers of each sample by label."""
    try:
        return {name: samples.labels(name) for name in names}
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def check_label(
    samples: Samples, settings: ZeroShotSettings, where: str
) -> tuple[Tensor, list[str], list[str]]:
    """Class numbers, class names and prompts of one zero-shot classification."""
    label = settings.label
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
    label_N = torch.from_numpy(samples.labels(label))
    if not (label_N >= 0).any():
        raise ConfigError(f"{where}: no sample has a value for the label {label!r}")
    templates = list(settings.templates)
    if not templates and label not in ATTRIBUTES:
        raise ConfigError(
            f"{where}: the label {label!r} has no templates, and only those of the built-in data "
            "set are known. Hint: templates: ['a photo of a {c}']"
        )
    templates = templates or zero_shot_templates(label)
    check_templates(templates, f"{where} ({label})")
    return label_N, classes, templates
