"""Models side by side: their embeddings concatenated, measured as if they were those of one model.

MCL's own way to use its rounds (arXiv:2402.11816). Each embedding has unit norm and is divided by sqrt(N), so that the
product of an image and a text is the mean of the N models' cosines.
"""

# Shapes: B batch, L tokens, C channels, H side of an image, D embedding, N models

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.checkpoint import Loaded, load_model
from clipgraft.config import ConfigError
from clipgraft.models.moe import insert_experts


class Ensemble(nn.Module):
    """Several models that encode as one."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        """Put models side by side that take the same images and tokens."""
        super().__init__()
        self.models = nn.ModuleList(models)

    @property
    def text(self) -> nn.Module:
        """The first text tower: where padding goes, it goes in all."""
        return self.models[0].text

    def encode_image(self, images_BCHH: Tensor) -> Tensor:
        """Features [B, N * D] of unit norm."""
        return _side_by_side([model.encode_image(images_BCHH) for model in self.models])

    def encode_text(self, text_BL: Tensor) -> Tensor:
        """Features [B, N * D] of unit norm."""
        return _side_by_side([model.encode_text(text_BL) for model in self.models])


def _side_by_side(features: Sequence[Tensor]) -> Tensor:
    parts = [F.normalize(each.float(), dim=-1) for each in features]
    return torch.cat(parts, dim=-1) / len(parts) ** 0.5


def load_side_by_side(folders: Sequence[Path]) -> Loaded:
    """Read one model, or several as one.

    Args:
        folders: model folders of any kind; of several models the spec is that of the first.

    Raises:
        ConfigError: if they do not take the same images and tokens.
    """
    loaded = [load_model(folder, insert_experts=insert_experts) for folder in folders]
    first = loaded[0]
    for folder, each in zip(folders[1:], loaded[1:], strict=True):
        for name, own, other in (
            ("preprocess", first.spec["preprocess"], each.spec["preprocess"]),
            ("context_length", _context(first), _context(each)),
            ("tokenizer", first.tokenizer.read_bytes(), each.tokenizer.read_bytes()),
        ):
            if own != other:
                raise ConfigError(
                    f"{folder} and {folders[0]} differ in their {name}, and cannot be evaluated side by side. "
                    "Hint: give experts of one base"
                )
    if len(loaded) == 1:
        return first
    return Loaded(Ensemble([each.model for each in loaded]), first.spec, first.tokenizer)


def _context(loaded: Loaded) -> int:
    return int(loaded.spec["config"]["text_cfg"]["context_length"])
