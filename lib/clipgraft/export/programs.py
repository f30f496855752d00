"""Both towers as programs without Python: torch.export's, and ONNX of those.

Batches may have any size; images and texts have that of the model. Experts run in the dense way, all of them on all
tokens, for how many tokens an expert gets is known only when it runs. Padding is routed, too, which nothing sees.
"""

# Shapes: B batch, H side of an image, L text length

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.aside import write_json
from clipgraft.checkpoint import Loaded
from clipgraft.config import ConfigError
from clipgraft.export.hugging_face import write_processor

TORCH_USAGE = """```python
import torch

image_tower = torch.export.load("FOLDER/image.pt2").module()
text_tower = torch.export.load("FOLDER/text.pt2").module()
image_features = image_tower(pixel_values)  # float32 [B, 3, SIDE, SIDE] to [B, EMBED], not normalised
text_features = text_tower(input_ids)  # int64 [B, LENGTH] to [B, EMBED]
```
"""
ONNX_USAGE = """```python
import onnxruntime

image_tower, text_tower = (onnxruntime.InferenceSession(f"FOLDER/{name}.onnx") for name in ("image", "text"))
image_features = image_tower.run(None, {"pixel_values": pixel_values})[0]  # float32 [B, 3, SIDE, SIDE] to [B, EMBED]
text_features = text_tower.run(None, {"input_ids": input_ids})[0]  # int64 [B, LENGTH] to [B, EMBED], not normalised
```
"""
_BATCH = 3  # of the example; smaller ones are special to the exporter


class _Tower(nn.Module):
    """One tower, without the hooks that tell its experts about padding: what they do depends on the texts."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.tower.forward(inputs)
        return features


def write_torch(loaded: Loaded, out: Path) -> None:
    """Write `image.pt2`, `text.pt2` and how their inputs are made."""
    for name, (program, _) in tower_programs(loaded).items():
        torch.export.save(program, out / f"{name}.pt2")
    _write_about(loaded, out)


def write_onnx(loaded: Loaded, out: Path) -> None:
    """Write `image.onnx`, `text.onnx` and how their inputs are made.

    Raises:
        ConfigError: if a package is missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        words = " ".join(missing)
        raise ConfigError(f"onnx: not installed: {words}. Hint: pip install {words}")
    for name, (program, input_name) in tower_programs(loaded).items():
        with _quiet():
            onnx = torch.onnx.export(
                program,
                input_names=[input_name],
                output_names=[f"{name}_features"],
                dynamo=True,
                verbose=False,
            )
        assert onnx is not None
        onnx.save(out / f"{name}.onnx")
    _write_about(loaded, out)


def tower_programs(loaded: Loaded) -> dict[str, tuple[torch.export.ExportedProgram, str]]:
    """`image` and `text`, each as a program with a batch of any size, and the name of its input."""
    model, config = loaded.model.eval(), loaded.spec["config"]
    side, length = config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"]
    images_BCHH = torch.zeros(_BATCH, 3, side, side)
    text_BL = torch.zeros(_BATCH, length, dtype=torch.int64)
    return {
        "image": (_program(model.visual, images_BCHH), "pixel_values"),
        "text": (_program(model.text, text_BL), "input_ids"),
    }


def _program(tower: Any, inputs: Tensor) -> torch.export.ExportedProgram:
    if hasattr(tower, "moe_state"):
        tower.moe_state.backend, tower.moe_state.real_T = "dense", None
    sizes = ({0: torch.export.Dim("batch")},)
    with _plain_attention(), torch.no_grad(), _quiet():
        return torch.export.export(_Tower(tower), (inputs,), dynamic_shapes=sizes)


def _write_about(loaded: Loaded, out: Path) -> None:
    """What a program does not say: how to compare features, and how inputs are made."""
    bias = loaded.model.logit_bias
    scale = {"logit_scale": float(loaded.model.logit_scale.exp())}
    scale["logit_bias"] = 0.0 if bias is None else float(bias)
    write_json(out / "scores.json", scale)
    write_processor(loaded, out, "CLIPProcessor")


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fused kernel of torch's attention, which no other program has."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of their own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
