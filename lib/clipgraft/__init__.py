"""clipgraft: train a CLIP cheaply, grow experts from it, graft them into one CLIP-MoE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def load(folder: str | Path, device: str = "cpu") -> tuple[Any, Any, Any]:
    """A trained model, ready to use: dense, an expert, or a mixture of experts.

    Args:
        folder: a model folder, such as `results/runs/demo/finetune_router/moe`.
        device: where the model goes.

    Returns:
        The model, in evaluation mode, with `encode_image` and `encode_text`; a function from a PIL image to its input
        [3, H, W]; and one from texts to token ids [B, L].

    Raises:
        ConfigError: if it is no model folder, or not a whole one.
    """
    import importlib  # by name, so that no stage counts as reaching what it needs (`versions.fingerprint`)

    ready = importlib.import_module("clipgraft.loading").load_ready(Path(folder), device)
    return ready.model, ready.preprocess, ready.tokenizer


def save(model: Any, folder: str | Path, like: str | Path) -> None:
    """Write a model folder, for `load` and for every stage: a model that `load` gave, and you have changed.

    Args:
        model: its weights are saved, in the precision they have.
        folder: a new one.
        like: the model folder that it came from; sizes, preparation of images and tokenizer are taken from there.

    Raises:
        ConfigError: if `folder` exists, `like` is no model folder, or the model is built in another way.
    """
    import importlib

    importlib.import_module("clipgraft.loading").save_like(model, Path(folder), Path(like))
