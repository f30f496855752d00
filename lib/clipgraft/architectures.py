"""Architectures by name, read from their JSON files without torch: ours of `presets/models`, then open_clip's."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

from clipgraft.config import ConfigError
from clipgraft.recipes import ModelSettings

OURS = Path(__file__).resolve().parent.parent.parent / "presets" / "models"


def architecture(settings: ModelSettings) -> dict[str, Any]:
    """The model config of `settings`, in open_clip's form, not yet sized for a phase.

    Raises:
        ConfigError: if neither we nor open_clip have an architecture of that name.
    """
    if settings.config is not None:
        return copy.deepcopy(settings.config)
    name = str(settings.name)
    path = our_file(settings) or _open_clips() / f"{name}.json"
    config = _read(path) if path.is_file() else {}
    if "vision_cfg" not in config:
        known = sorted(path.stem for folder in (OURS, _open_clips()) for path in folder.glob("*"))
        close = difflib.get_close_matches(name, known, n=3)
        hint = (
            f"did you mean {' or '.join(close)}?"
            if close
            else f"one of {', '.join(known[:8])}, ..."
        )
        raise ConfigError(
            f"model.name = {name!r} is no architecture of open_clip, nor of {OURS.parent.name}/{OURS.name}. "
            f"Hint: {hint}"
        )
    return config


def our_file(settings: ModelSettings) -> Path | None:
    """The file of ours that describes the model, if there is one."""
    path = OURS / f"{settings.name}.json"
    return path if path.is_file() else None


@cache
def _open_clips() -> Path:
    found = importlib.util.find_spec("open_clip")  # does not import it
    assert found is not None and found.origin is not None, "open_clip is a dependency"
    return Path(found.origin).parent / "model_configs"


def _read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text())
    return config
