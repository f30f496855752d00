"""What the page answers: pictures of a query, captions and classes of a picture, and the experts behind both.

One model and what it has embedded is held at a time, and one question answered at a time: routing is read from the model
after its forward, which a second forward beside it would disturb.
"""

# Shapes: D embedding, C classes, K found, H height, W width

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from clipgraft.config import ConfigError
from clipgraft.data.samples import Samples
from clipgraft.evaluation.choices import TowerChoices
from clipgraft.evaluation.zero_shot import check_templates, zero_shot_weights
from clipgraft.explore.encoder import Encoder
from clipgraft.explore.finished import Classes, FinishedRun
from clipgraft.explore.search import Searchable, kept, made_embeddings, stored_embeddings
from clipgraft.provenance import read_manifest

log = logging.getLogger(__name__)

OWN = "own classes"


@dataclass(frozen=True)
class Found:
    """A picture that a query has found."""

    row: int
    score: float
    captions: list[str]


@dataclass(frozen=True)
class Answer:
    """What a model says of a query.

    Attributes:
        found: pictures, best first.
        words: pieces of the query.
        choices: which expert each piece chose; None without experts in the text tower.
    """

    found: list[Found]
    words: list[str]
    choices: TowerChoices | None


@dataclass(frozen=True)
class Look:
    """What a model says of a picture.

    Attributes:
        captions: the best ones of the data set with their cosines.
        classes: label to its classes with their probabilities, the likeliest first.
        square_HW3: the picture as the model sees it, but for its size.
        grid: rows and columns of patches.
        choices: which expert each patch chose; None without experts in the image tower.
    """

    captions: list[tuple[str, float]]
    classes: dict[str, list[tuple[str, float]]]
    square_HW3: np.ndarray
    grid: tuple[int, int]
    choices: TowerChoices | None


class Explorer:
    """Answers questions about one run."""

    def __init__(
        self, run: FinishedRun, cache: Path, num_samples: int = 5000, threads: int = 1
    ) -> None:
        """Begin with no model read.

        Args:
            run: to look at.
            cache: folder for embeddings that are made here.
            num_samples: at most so many samples are embedded here, of each data set.
            threads: for decoding, and on a CPU for encoding images.
        """
        self.run, self._cache, self._num, self._threads = run, cache, num_samples, threads
        self._lock = threading.Lock()
        self._held: tuple[str, Encoder] | None = None
        self._searchable: dict[str, Searchable] = {}
        self._weights: dict[str, np.ndarray] = {}

    def about(self, key: str, data: str) -> str:
        """One line on a model and on what is searched."""
        with self._lock:
            encoder, of = self._encoder(key), self._data(key, data)
            config, moe = encoder.spec["config"], encoder.spec["moe"]
            size, length = (
                config["vision_cfg"]["image_size"],
                config["text_cfg"]["context_length"],
            )
            kind = f"{moe['num_experts']} experts, top {moe['top_k']}" if moe else "dense"
            several = len(self.run.models[key])
            kind = f"{several} models side by side" if several > 1 else kind
            return (
                f"{key}: {kind}, images of {size} px, texts of {length} tokens; {data}: {of.origin}"
            )

    def search(self, key: str, data: str, query: str, num: int) -> Answer:
        """The pictures of a data set that a query describes best.

        Raises:
            ConfigError: if there is no query, or the run lacks the model or the data.
        """
        if not query.strip():
            raise ConfigError("the query is empty. Hint: type what shall be on the picture")
        with self._lock:
            encoder, of = self._encoder(key), self._data(key, data)
            feature_D, choices = encoder.read(query)
            found = [
                Found(row, score, of.samples.captions(row))
                for row, score in of.pictures_for(feature_D, num)
            ]
            pieces: list[int] = [] if choices is None else choices.shown[0][0].tolist()
            return Answer(found, [encoder.tokenizer.pieces[piece] for piece in pieces], choices)

    def look(
        self,
        key: str,
        data: str,
        pixels_HW3: np.ndarray,
        num: int,
        labels: Sequence[str] = (),
        own: Classes | None = None,
        side: int = 224,
    ) -> Look:
        """Captions and classes of a picture.

        Args:
            key: of the model.
            data: whose captions are searched.
            pixels_HW3: uint8 RGB.
            num: captions.
            labels: whose classes are asked for.
            own: classes that are asked for beside them.
            side: of the square that is handed back, in pixels.

        Raises:
            ConfigError: if the run lacks the model or the data, or a template has no place for the class.
        """
        if own is not None:
            check_templates(own.templates, OWN)
        with self._lock:
            encoder, of = self._encoder(key), self._data(key, data)
            feature_D, choices = encoder.see(pixels_HW3)
            asked = {name: (self.run.classes[name], self._weights_of(key, name)) for name in labels}
            if own is not None:
                asked[OWN] = own, self._directions(key, own)
            classes = {
                name: self._probabilities(key, feature_D, weight_CD, of_name)
                for name, (of_name, weight_CD) in asked.items()
            }
            return Look(
                of.captions_for(feature_D, num),
                classes,
                encoder.square(pixels_HW3, side),
                encoder.grid if choices is not None else (0, 0),
                choices,
            )

    def samples(self, data: str) -> Samples:
        """The samples of a data set."""
        held = self._searchable.get(data)
        return Samples.open(self.run.index(data)) if held is None else held.samples

    def _encoder(self, key: str) -> Encoder:
        if self._held is None or self._held[0] != key:
            folders = self.run.model_folders(key)
            self._held, self._searchable, self._weights = None, {}, {}  # memory first
            self._held = key, Encoder.open(folders)
            log.info("%s from %s", key, ", ".join(map(str, folders)))
        return self._held[1]

    def _data(self, key: str, data: str) -> Searchable:
        if data not in self._searchable:
            index = self.run.index(data)
            samples, stored = Samples.open(index), self.run.stored(key, data)
            if stored is not None:
                found = stored_embeddings(samples, stored)
            else:
                ids = [*self._ids(key), read_manifest(index)["id"]]
                found = made_embeddings(
                    samples, self._encoder(key), ids, self._cache, self._num, self._threads
                )
            self._searchable[data] = found
        return self._searchable[data]

    def _ids(self, key: str) -> list[str]:
        return [read_manifest(folder)["id"] for folder in self.run.models[key]]

    def _weights_of(self, key: str, label: str) -> np.ndarray:
        """Directions of a label's classes [C, D], kept: a thousand classes with many templates take minutes."""
        if label not in self._weights:
            classes = self.run.classes[label]
            about = {"of": self._ids(key), "classes": [classes.names, classes.templates]}
            made = kept(self._cache, about, lambda: {"weight": self._directions(key, classes)})
            self._weights[label] = np.asarray(made["weight"])
        return self._weights[label]

    def _directions(self, key: str, classes: Classes) -> np.ndarray:
        """One direction per class [C, D]."""
        with torch.inference_mode():
            encode = self._encoder(key).texts()
            return zero_shot_weights(encode, classes.names, classes.templates).cpu().numpy()

    def _probabilities(
        self, key: str, feature_D: np.ndarray, weight_CD: np.ndarray, classes: Classes
    ) -> list[tuple[str, float]]:
        """Classes by the softmax that training used, the likeliest first."""
        logits_C = torch.from_numpy(weight_CD @ feature_D) * self._encoder(key).scale
        found = zip(classes.names, logits_C.softmax(0).tolist(), strict=True)
        return sorted(found, key=lambda each: -each[1])
