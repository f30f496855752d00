"""A model folder, ready to use: the model, how it sees images, and how it reads texts; and how one is written again.

What `clipgraft.load` returns, and `clipgraft.save` does. Images and texts take the same way as in stage `evaluate`, so
numbers found here are those of its results; both functions can be pickled, for the workers of a data loader.
"""

# Shapes: B batch, L text length, H side of an image

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from clipgraft.checkpoint import load_model, save_model
from clipgraft.config import ConfigError
from clipgraft.data.images import prepare, to_rgb
from clipgraft.data.tokens import Tokenizer
from clipgraft.models.build import normalize
from clipgraft.models.moe import insert_experts


@dataclass(frozen=True)
class Preprocess:
    """From a PIL image to what the model sees.

    Attributes:
        settings: `size`, `resize_mode`, `interpolation`, `mean` and `std`, as in `model.json`.
    """

    settings: dict[str, Any]

    def __call__(self, image: Image.Image) -> Tensor:
        """Float32 [3, H, H].

        Raises:
            BadImage: if its pixels cannot be decoded.
        """
        size, mode, interpolation, mean, std = (
            self.settings[key] for key in ("size", "resize_mode", "interpolation", "mean", "std")
        )
        pixels_HHC = prepare(np.asarray(to_rgb(image)), size, mode, interpolation)
        images_1CHH = torch.from_numpy(pixels_HHC.copy()).permute(2, 0, 1)[None]
        return normalize(images_1CHH, mean, std)[0]


class Tokenize:
    """From texts to token ids, cut to the length of the model."""

    def __init__(self, file: Path, text_length: int) -> None:
        """Read the vocabulary.

        Args:
            file: of the tokenizer.
            text_length: tokens of a text, with start and end.
        """
        self.text_length = text_length
        self._tokenizer = Tokenizer(file)

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Ids int64 [B, L] of one text or several, padded with zeros."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        return torch.from_numpy(self._tokenizer.encode_batch(texts, self.text_length))


@dataclass(frozen=True)
class Ready:
    """A model in evaluation mode, and what its inputs are made with."""

    model: nn.Module
    preprocess: Preprocess
    tokenizer: Tokenize
    spec: dict[str, Any]


def load_ready(folder: Path, device: str = "cpu") -> Ready:
    """Read a model folder of any kind.

    Raises:
        ConfigError: if it is no model folder, or not a whole one.
    """
    loaded = load_model(folder, insert_experts=insert_experts)
    loaded.model.eval().to(device)
    length = loaded.spec["config"]["text_cfg"]["context_length"]
    return Ready(
        loaded.model,
        Preprocess(loaded.spec["preprocess"]),
        Tokenize(loaded.tokenizer, length),
        loaded.spec,
    )


def save_like(model: nn.Module, folder: Path, like: Path) -> None:
    """Write a model into a new folder, with all else as in another model folder.

    Raises:
        ConfigError: if `folder` exists, `like` is no model folder, or the names and shapes of weights differ.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists. Hint: the name of a new folder")
    known = load_model(like, insert_experts=insert_experts)
    ours, theirs = (
        {name: list(tensor.shape) for name, tensor in each.state_dict().items()}
        for each in (model, known.model)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"{name} of the model to save: {ours.get(name, 'none')}, in {like}: {theirs.get(name, 'none')}. "
                "Hint: like: the folder that the model was loaded from; and the bare model, neither compiled nor in DDP"
            )
    folder.mkdir(parents=True)
    save_model(folder, model, known.spec, known.tokenizer)
