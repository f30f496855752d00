"""Small model folders of every kind, with random weights and a vocabulary of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import model_config, write_vocabulary

from clipgraft.checkpoint import save_model
from clipgraft.models.build import build, describe
from clipgraft.models.moe import upcycle

ModelFolder = Callable[..., Path]


@pytest.fixture
def model_folder(tmp_path: Path) -> ModelFolder:
    """Makes a model folder: changes of the config, the vocabulary, and the number of experts, 0 for none."""

    def make(
        changes: dict[str, Any] | None = None,
        vocabulary: str = "corpus",
        num_experts: int = 0,
        text_layers: Any = (1,),
        top_k: int = 2,
    ) -> Path:
        file, vocab_size = write_vocabulary(tmp_path, vocabulary)
        config = model_config(vocab_size, changes or {})
        torch.manual_seed(0)
        model = build(config)
        for parameter in model.parameters():  # biases and scales, too, must matter
            torch.nn.init.normal_(parameter, std=0.3)
        moe = None
        if num_experts:
            expert = {name: torch.randn_like(t) / 3 for name, t in model.state_dict().items()}
            experts = [model.state_dict(), *[expert] * (num_experts - 1)]
            layers = {"image_layers": "all", "text_layers": text_layers}
            moe = upcycle(model, experts, top_k=top_k, generator=torch.Generator(), **layers)
        folder = tmp_path / "model"
        folder.mkdir()
        save_model(folder, model, {**describe(config), "moe": moe}, file)
        return folder

    return make


@pytest.fixture
def picture() -> Image.Image:
    """No side is that of the model, and what is cut off is even, so that all agree where the middle is."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, with a folder of its own for code that it loads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("transformers")
        from transformers import dynamic_module_utils

        library.utils.logging.disable_progress_bar()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return library
