"""Architectures by name, read from their JSON files without torch: ours of `presets/models`, then open_clip's."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

from clipgraft.config import ConfigError, local_path, validate
from clipgraft.crosschecks import check_model, pieces_misfit
from clipgraft.loss_settings import ReferenceSettings
from clipgraft.misfits import interactive_misfit, tower_misfit
from clipgraft.model_settings import ModelSettings, is_file_name
from clipgraft.recipes import PhaseSettings
from clipgraft.run_settings import RunSettings
from clipgraft.settings import IndexSettings

OURS = Path(__file__).resolve().parent.parent.parent / "presets" / "models"


def architecture(settings: ModelSettings, where: str = "model.name") -> dict[str, Any]:
    """The model config of `settings`, in open_clip's form, not yet sized for a phase; `where` it was asked for.

    Raises:
        ConfigError: if neither we nor open_clip have an architecture of that name, or if ours is not one.
    """
    if settings.config is not None:
        return copy.deepcopy(settings.config)
    if ours := our_file(settings):
        return _ours(ours)
    name = str(settings.name)
    path = _open_clips() / f"{name}.json"
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
            f"{where} = {name!r} is no architecture of open_clip, nor of {OURS.parent.name}/{OURS.name}. "
            f"Hint: {hint}"
        )
    return config


def check_references(phase: PhaseSettings, model: ModelSettings, index: IndexSettings) -> None:
    """What can be known of the references of a phase before anything runs.

    Args:
        phase: that learns from them.
        model: that starts from the first, if the phase says so.
        index: which vocabulary it reads.

    Raises:
        ConfigError: if one is not there, has not the dimension that a term needs, or reads another vocabulary than the
            model that starts from it.
    """
    dim = _embed_dim(model) if phase.references else None
    for each in phase.references:
        its: int | None
        if each.pretrained is None:
            its = _folder_dim(each.model, f"pretrain.{phase.name}.references")
        else:
            check_weights(each.pretrained, f"pretrain.{phase.name}.references: pretrained")
            its = _embed_dim(
                ModelSettings(name=each.model), f"pretrain.{phase.name}.references: model"
            )
        if dim and its and (misfit := interactive_misfit(phase, each.model, dim, its)):
            raise ConfigError(misfit)
    if phase.init_from and phase.references[0].pretrained is not None:
        _check_start(phase, index)


def _check_start(phase: PhaseSettings, index: IndexSettings) -> None:
    """A public model reads all of CLIP's vocabulary or of BERT's; which, is known of one of a hub when it is opened."""
    first = phase.references[0]
    if ":" in first.model:
        reads = ["full", "wordpiece"]
    else:
        config = architecture(ModelSettings(name=first.model))
        if misfit := tower_misfit(config):
            raise ConfigError(f"pretrain.{phase.name}.init_from: {first.model}: {misfit}")
        reads = ["wordpiece" if config["text_cfg"].get("hf_tokenizer_name") else "full"]
    where = f"pretrain.{phase.name}.init_from = reference: {first.name}"
    if index.vocabulary not in reads:
        raise ConfigError(
            f"{where} reads another vocabulary than index.vocabulary = {index.vocabulary} gives. "
            f"Hint: index: {{vocabulary: {reads[0]}}}"
        )
    if misfit := pieces_misfit(index):
        raise ConfigError(f"{where}: {misfit}")


def check_architecture(run: RunSettings) -> None:
    """Hold a run against its named architecture; one of a hub is known when it is opened.

    Raises:
        ConfigError: if there is no such architecture, or it does not fit what the run wants.
    """
    if run.model.name is None or ":" in run.model.name:
        return
    config = architecture(run.model)
    try:
        check_model(run, config)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_weights(pretrained: str | None, where: str) -> None:
    """What can be known of public weights before anything runs; tags of open_clip are known when they are opened.

    Raises:
        ConfigError: if they are named like a file that is not there; `where` they were asked for.
    """
    if pretrained is not None and is_file_name(pretrained) and not local_path(pretrained).is_file():
        raise ConfigError(
            f"{where} = {pretrained!r}: {local_path(pretrained)} is no file. Hint: a checkpoint on this machine "
            f"(paths are relative to {Path().resolve()}), or a tag of open_clip"
        )


def image_size_of(reference: ReferenceSettings) -> int:
    """Side of the images that a reference is given: as set, or its own; `check_references` has found it.

    A checkpoint may have been trained at another size than its architecture's, and planning does not open it.

    Raises:
        ConfigError: if it is known only when the reference is opened.
    """
    side: Any = reference.image_size
    if side is None and reference.pretrained is None:
        side = _read(local_path(reference.model) / "model.json")["preprocess"]["size"]
    elif side is None and ":" not in reference.model and not _is_file(reference.pretrained):
        vision = architecture(ModelSettings(name=reference.model))["vision_cfg"]
        side = vision.get("image_size", 224)  # open_clip's own default
    if not isinstance(side, int):
        raise ConfigError(
            f"references: the image size of {reference.name} is not known before it is opened. Hint: give `image_size`"
        )
    return side


def _is_file(pretrained: str | None) -> bool:
    return pretrained is not None and local_path(pretrained).is_file()


def our_file(settings: ModelSettings) -> Path | None:
    """The file of ours that describes the model, if there is one."""
    path = OURS / f"{settings.name}.json"
    return path if path.is_file() else None


def _ours(path: Path) -> dict[str, Any]:
    try:
        config = _read(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    validate(ModelSettings, {"config": config}, f"{path}: ")
    return config


def _embed_dim(model: ModelSettings, where: str = "model.name") -> int | None:
    """None of what is on a hub, which is known when it is opened."""
    if ":" in str(model.name):
        return None
    return int(architecture(model, where)["embed_dim"])


def _folder_dim(name: str, where: str) -> int:
    path = local_path(name) / "model.json"
    try:
        return int(_read(path)["config"]["embed_dim"])
    except OSError:
        raise ConfigError(
            f"{where}: {path} does not exist. Hint: `model` is a model folder, or an open_clip architecture with "
            "`pretrained`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{where}: {path} is no model spec: {type(error).__name__} {error}"
        ) from None


@cache
def _open_clips() -> Path:
    found = importlib.util.find_spec("open_clip")  # does not import it
    assert found is not None and found.origin is not None, "open_clip is a dependency"
    return Path(found.origin).parent / "model_configs"


def _read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text())
    return config
