"""Model folders.

A model folder holds `model.safetensors`, `model.json` (what to build) and `merges.txt.gz` or
`vocab.txt` (its tokenizer), and is complete in itself; an expert's (kind `delta`) holds only the tensors it changed
and points to its base. Nothing is unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipgraft.aside import write_json
from clipgraft.config import ConfigError, local_path
from clipgraft.integrity import check_file
from clipgraft.job import WRITING
from clipgraft.lean import open_clip
from clipgraft.models.build import build, check_towers
from clipgraft.models.positions import LINEAR, TextResize, resize_positions
from clipgraft.models.public import Encode, load_public
from clipgraft.models.weights import check_fit

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
SPEC = "model.json"
TOKENIZERS = ("merges.txt.gz", "vocab.txt")  # byte pairs, WordPiece


@dataclass(frozen=True)
class Loaded:
    """A model read from its folder, what `model.json` says of it, and the file of its tokenizer."""

    model: open_clip.CustomTextCLIP
    spec: dict[str, Any]
    tokenizer: Path


@dataclass(frozen=True)
class Reference:
    """A model to look at: on the CPU, in evaluation mode, without gradients.

    Attributes:
        model: has `encode_image`, `encode_text` and `logit_scale`.
        spec: as in `model.json`: sizes under `config`, how images are prepared under `preprocess`.
        tokenizer: its file; a function from texts to int64 [B, L] where no file of the kinds we read describes it.
    """

    model: open_clip.CustomTextCLIP
    spec: dict[str, Any]
    tokenizer: Path | Encode


def save_model(
    folder: Path,
    model: nn.Module,
    spec: dict[str, Any],
    tokenizer: Path,
    only: Collection[str] | None = None,
    base: Path | None = None,
) -> None:
    """Write a model folder.

    Args:
        folder: exists; may be the one that a job's outputs are collected in.
        model: its parameters are saved.
        spec: `config`, `preprocess`, `moe` (or None), `samples_seen`; `format`, `kind` and `base`
            are set here.
        tokenizer: its file, copied; one of `TOKENIZERS`.
        only: names of the tensors to save, for an expert that changed only these.
        base: model folder that has the others; goes with `only`.
    """
    assert (only is None) == (base is None), "a delta names its tensors and its base"
    state = model.state_dict()
    names = state if only is None else only
    tensors = {name: state[name].detach().cpu().contiguous() for name in names}
    kind = "delta" if base else "moe" if spec.get("moe") else "dense"
    relative = os.path.relpath(base.resolve(), _home(folder)) if base else None
    save_tensors(tensors, folder / WEIGHTS)
    assert tokenizer.name in TOKENIZERS, tokenizer
    shutil.copyfile(tokenizer, folder / tokenizer.name)
    write_json(folder / SPEC, {"format": 1, "moe": None, **spec, "kind": kind, "base": relative})


def load_model(
    folder: Path,
    *,
    image_size: int | None = None,
    text_length: int | None = None,
    text_positions: TextResize = LINEAR,
    insert_experts: Callable[..., object] | None = None,
) -> Loaded:
    """Read a model folder of any kind.

    Args:
        folder: dense, moe or delta.
        image_size: another side of the image than the model has; positions are interpolated.
        text_length: another text length, likewise.
        text_positions: how its table gets there (`resize_positions`).
        insert_experts: that of `models.moe`, where a mixture of experts is welcome. (Given, not
            imported, so that stages of dense models do not depend on its code.)

    Returns:
        The model on the CPU, in training mode, its spec with the sizes it now has, its tokenizer.

    Raises:
        ConfigError: if a file is missing or damaged, or if weights and spec do not belong together.
    """
    folder = Path(folder)
    spec = _read_spec(folder)
    image_size = image_size or spec["config"]["vision_cfg"]["image_size"]
    text_length = text_length or spec["config"]["text_cfg"]["context_length"]
    weights = whole_weights(folder)
    check_towers(spec["config"])  # others are asked of a hub, or are code
    model = build(spec["config"], image_size, text_length)
    if spec["moe"] and insert_experts is None:
        raise ConfigError(f"{folder} is a mixture of experts; a dense model is needed here")
    if spec["moe"] and insert_experts is not None:
        insert_experts(model, **spec["moe"])
    check_fit(weights, model, str(folder / WEIGHTS))
    resize_positions(weights, model, text_positions)
    model.load_state_dict(weights)
    return Loaded(model, _resized(spec, image_size, text_length), _tokenizer(folder))


def load_reference(
    settings: Any,
    image_size: int | None = None,
    insert_experts: Callable[..., object] | None = None,
) -> Reference:
    """Read a model of any origin, to look at and not to train.

    Torch's global generator is left as it is, so that a model that is built next is the same with references and
    without.

    Args:
        settings: `model` and `pretrained` of a reference, and its `image_size`. Without `pretrained`, `model` is a model
            folder of any kind; else an architecture and its weights.
        image_size: instead of that of the settings; by default the model's own.
        insert_experts: as for `load_model`.

    Raises:
        ConfigError: if there is no such model, or it cannot be read.
    """
    size, pretrained = image_size or settings.image_size, settings.pretrained
    name = f"{settings.model}/{pretrained}" if pretrained else settings.model
    try:
        with torch.random.fork_rng(devices=[]):
            if pretrained:
                reference = Reference(*load_public(settings.model, pretrained, size))
            else:
                folder = _model_folder(settings.model)
                loaded = load_model(folder, image_size=size, insert_experts=insert_experts)
                reference = Reference(loaded.model, loaded.spec, loaded.tokenizer)
    except ConfigError as error:
        raise ConfigError(f"reference {name}: {error}") from None
    reference.model.eval().requires_grad_(False)
    return reference


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder, as saved.

    Raises:
        ConfigError: if the file is missing, damaged, or not as the manifest beside it says.
    """
    path = Path(folder) / WEIGHTS
    try:
        weights = dict(load_file(path))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist. Hint: is {folder} a model folder?") from None
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ConfigError(
            f"{path} ({size:,} bytes) is damaged or no safetensors file: {error}. Hint: remove the "
            "folder and run its job again"
        ) from None
    check_file(path)
    return weights


def whole_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder; an expert's with those of its base."""
    spec, weights = _read_spec(Path(folder)), read_weights(folder)
    if spec["kind"] != "delta":
        return weights
    return {**whole_weights(Path(folder).resolve() / spec["base"]), **weights}


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write safetensors that may be read by whoever may read the folder; safetensors itself lets nobody else.

    Raises:
        OSError: if they cannot be written.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(path.parent.stat().st_mode & 0o666)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def _model_folder(name: str) -> Path:
    folder = local_path(name)
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is no folder. Hint: the path of a model folder; or an architecture of open_clip, and "
            "`pretrained`: one of its tags, or a checkpoint"
        )
    return folder


def _tokenizer(folder: Path) -> Path:
    for name in TOKENIZERS:
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(
        f"{folder} has no tokenizer, neither {' nor '.join(TOKENIZERS)}. Hint: is it a whole model folder?"
    )


def _home(folder: Path) -> Path:
    """Where the files of a folder will be: a job collects its outputs one level below, folders among them."""
    parts = folder.resolve().parts
    return Path(*(part for part in parts if part != WRITING))


def _read_spec(folder: Path) -> dict[str, Any]:
    path = folder / SPEC
    try:
        spec = json.loads(path.read_text())
        if spec["format"] != 1:
            raise ConfigError(f"{path} has format {spec['format']!r}; this version reads format 1")
        missing = {"kind", "config", "preprocess", "moe", "base"} - spec.keys()
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist. Hint: is {folder} a model folder?") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no model spec: {type(error).__name__} {error}") from None
    if missing:
        raise ConfigError(f"{path} is no model spec: it lacks {', '.join(sorted(missing))}")
    return dict(spec)


def _resized(spec: dict[str, Any], image_size: int, text_length: int) -> dict[str, Any]:
    config = spec["config"]
    vision, text = config["vision_cfg"], config["text_cfg"]
    config = {
        **config,
        "vision_cfg": {**vision, "image_size": image_size},
        "text_cfg": {**text, "context_length": text_length},
    }
    return {**spec, "config": config, "preprocess": {**spec["preprocess"], "size": image_size}}
