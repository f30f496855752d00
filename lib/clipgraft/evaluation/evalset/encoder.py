"""A model as evaluation sets use it: pictures and texts in, features out; classifiers are kept on disk.

ImageNet and its variants ask for the same 80,000 prompts, so a classifier is stored under a hash of all that makes it:
the files of the model, the code that this module reaches, the classes, the prompts and the kind of device. Nobody has to
throw one away because something has changed, and all may be thrown away at any time.
"""

# Shapes: N images, U texts, C classes, D embedding

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.data.tokens import Tokenizer
from clipgraft.evaluation.encode import (
    check_finite,
    encode_images,
    encode_texts,
    encoder_of_texts,
)
from clipgraft.evaluation.ensemble import load_side_by_side
from clipgraft.evaluation.evalset.pictures import Pictures
from clipgraft.evaluation.rows import Rows
from clipgraft.evaluation.stored import Arrays, identity_of, key_of, stored
from clipgraft.evaluation.zero_shot import zero_shot_weights
from clipgraft.models.fused import fuse


class Encoder:
    """One model, or several side by side, ready to encode.

    Attributes:
        identity: hash of the files of the model and of the code that uses it.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        cache: Path,
        *,
        threads: int = 1,
        batch_size: int | None = None,
        scratch: Path | None = None,
    ) -> None:
        """Load a model on the device that there is.

        Args:
            folders: model folders of any kind; of several the embeddings stand side by side.
            cache: folder of classifiers, made if need be.
            threads: for decoding, and on a CPU for encoding images.
            batch_size: images or texts encoded at a time; by default what suits the device and the threads.
            scratch: folder for features that are many; None: the system's.

        Raises:
            ConfigError: if a folder holds no whole model.
        """
        self.identity = identity_of(folders, Path(__file__))
        self._scratch, self._files = scratch, Path()
        self._where, self._cache = folders[0], cache
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._how = (self._device, threads, batch_size)
        loaded = load_side_by_side(folders)
        self._model = loaded.model.to(self._device).eval()
        fuse(self._model)
        self._preprocess: dict[str, Any] = loaded.spec["preprocess"]
        length = loaded.spec["config"]["text_cfg"]["context_length"]
        self._encode_texts = encoder_of_texts(
            self._model, Tokenizer(loaded.tokenizer), length, self._device, batch_size
        )

    @contextmanager
    def for_one_task(self) -> Iterator[None]:
        """A context in which `images` and `captions` may be asked once each; files of many features go after it."""
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            self._files = Path(folder)
            yield

    def images(self, pictures: Pictures) -> Rows:
        """L2-normalised float32 features of all pictures, [N, D]; if they are many, they go to a file.

        Raises:
            ConfigError: if one does not decode, or features are not finite.
        """
        assert len(pictures), "a data set without pictures"
        about, file = (self._model, self._preprocess, pictures), self._files / "images"
        image_ND = encode_images(*about, *self._how, file=file)
        check_finite(image_ND, self._where)
        return image_ND

    def texts(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised float32 features of texts."""
        return self._finite(self._encode_texts(list(texts)))

    def captions(self, texts: Sequence[str]) -> Rows:
        """The same of any number of texts; if they are many, they go to a file."""
        text_UD = encode_texts(self._encode_texts, texts, self._files / "texts")
        check_finite(text_UD, self._where)
        return text_UD

    def classifier(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """One direction per class, [C, D], from the cache where it is there."""

        def make() -> Arrays:
            weight_CD = zero_shot_weights(self._encode_texts, classes, templates)
            return {"weight_CD": self._finite(weight_CD).cpu().numpy()}

        key = key_of(self.identity, self._device.type, list(classes), list(templates))
        found = stored(self._cache / f"{key}.npz", make, "names of classes")
        return torch.from_numpy(found["weight_CD"]).to(self._device)

    def _finite(self, feature_ND: Tensor) -> Tensor:
        check_finite(feature_ND, self._where)
        return feature_ND
