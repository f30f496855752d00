"""Model folders and training state.

A model folder holds `model.safetensors`, `model.json` (what to build) and `merges.txt.gz` or
`vocab.txt` (its tokenizer), and is complete in itself; an expert's (kind `delta`) holds only the tensors it changed
and points to its base. Training state is what a trainer needs to go on after a kill: written aside,
flushed to disk, renamed, and the one before it is kept, so that there is always a whole one. Nothing
is ever unpickled without `weights_only`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import pickle
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

from clipgraft.config import ConfigError
from clipgraft.job import WRITING, write_json
from clipgraft.lean import open_clip
from clipgraft.models.build import build
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
    _save_tensors(tensors, folder / WEIGHTS)
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
        ConfigError: if the file is missing or damaged.
    """
    path = Path(folder) / WEIGHTS
    try:
        return dict(load_file(path))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist. Hint: is {folder} a model folder?") from None
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ConfigError(
            f"{path} ({size:,} bytes) is damaged or no safetensors file: {error}. Hint: remove the "
            "folder and run its job again"
        ) from None


def whole_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder; an expert's with those of its base."""
    spec, weights = _read_spec(Path(folder)), read_weights(folder)
    if spec["kind"] != "delta":
        return weights
    return {**whole_weights(Path(folder).resolve() / spec["base"]), **weights}


class TrainingState:
    """What a trainer saves to continue after a kill; two generations, in a folder of its own.

    Files are named by tag and step, so that state of other settings or code is never mistaken for
    one's own. The first process locks the folder until `close` or its end, however it ends.
    """

    def __init__(self, folder: Path, tag: str) -> None:
        """Lock the folder.

        Args:
            folder: made if need be.
            tag: settings, inputs and code; state saved under another tag is not loaded.

        Raises:
            ConfigError: if another trainer holds the folder.
        """
        self._folder = Path(folder)
        self._prefix = hashlib.sha256(tag.encode()).hexdigest()[:16]
        self._folder.mkdir(parents=True, exist_ok=True)
        is_first = os.environ.get("RANK", "0") == "0"  # the others only load
        self._lock = _lock(self._folder / ".lock") if is_first else None

    def load(self) -> dict[str, Any] | None:
        """The newest whole state under this tag, as it was saved; None means start afresh."""
        for path in reversed(self._generations()):
            try:
                return dict(torch.load(path, map_location="cpu", weights_only=True))
            except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
                log.warning("training state %s is damaged, not used: %s", path, str(error)[:200])
        if next(self._folder.glob("*.pt"), None) is not None:
            log.warning(
                "%s: no training state is whole and of these settings, inputs and code: starting "
                "afresh",
                self._folder,
            )
        return None

    def save(self, state: dict[str, Any]) -> None:
        """Save atomically; then only this state and the one before it are kept.

        Args:
            state: `step` (steps done) and what else there is: tensors, numbers, strings and None, in
                dicts, lists and tuples.
        """
        _check_plain(state)
        for left_by_a_kill in self._folder.glob("*.tmp"):
            left_by_a_kill.unlink()
        path = self._folder / f"{self._prefix}-{state['step']:012d}.pt"
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(self._folder)
        before = [other for other in self._generations() if other.name < path.name]
        for other in self._folder.glob("*.pt"):
            if other not in (path, *before[-1:]):
                other.unlink()

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _generations(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._prefix}-*.pt"))


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def _model_folder(name: str) -> Path:
    folder = Path(os.path.expandvars(name)).expanduser()
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


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"another trainer uses {path.parent}. Hint: wait for it, or end it; two trainers must "
            "not share state"
        ) from None
    return descriptor


def _check_plain(value: Any) -> None:
    """What `weights_only` would refuse to load must fail when it is saved, not after the kill."""
    if isinstance(value, dict):
        for key, part in value.items():
            assert isinstance(key, str | int), f"training state: key {key!r}"
            _check_plain(part)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_plain(part)
    else:
        plain = value is None or type(value) in (bool, int, float, str) or isinstance(value, Tensor)
        assert plain, f"training state holds a {type(value).__name__}: {value!r}"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
