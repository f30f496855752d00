"""Weights: what is read from files that others wrote, and whether it fits a model.

A file is safetensors, a state dict, or what a training run of open_clip, fast_clip or DRRho-CLIP leaves behind: a dict
with the `state_dict` among the optimizer, the scaler, the epoch and the state of the loss, its names behind `module.`
if it ran on several devices. Nothing is unpickled without `weights_only`; the numbers that numpy computed as learning
rates for such a run are let through, for without them no finished run of a cosine schedule would load.
"""

from __future__ import annotations

import math
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from clipgraft.config import ConfigError, local_path
from clipgraft.lean import open_clip
from clipgraft.model_settings import ModelSettings, PreprocessSettings
from clipgraft.models.positions import IMAGE, TEXT

KERNEL = "visual.conv1.weight"  # of the patches
_WRAPPERS = ("module.", "_orig_mod.")  # of several devices, of the compiler; in either order
OPENAIS = {"input_resolution", "context_length", "vocab_size"}  # in OpenAI's files alone
SECOND_TABLE = "_res"  # what the name of Long-CLIP's second text position table ends in
_LONG_CLIP_KEEP = 20  # rows that are those of the first
_PREPROCESS = tuple(PreprocessSettings.model_fields)
_SCALAR = np.float64(0).__reduce__()[0]
# What a numpy number is pickled as; numpy 1 called the module by another name.
_NUMBERS: list[Any] = [
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def pretrained_tag(settings: ModelSettings) -> dict[str, Any]:
    """What open_clip knows of the weights; empty if there are none, or if they are a local file."""
    if settings.pretrained is None or settings.name is None:
        return {}
    return dict(open_clip.get_pretrained_cfg(settings.name, settings.pretrained))


def wanted_preprocess(settings: ModelSettings) -> dict[str, Any]:
    """How the weights that `settings` name want their images, as far as that is known.

    A checkpoint does not say it: taken is what all public weights of its architecture agree on.
    """
    if settings.pretrained is None or settings.name is None:
        return {}
    tag = pretrained_tag(settings)
    public = open_clip.list_pretrained_tags_by_model(settings.name)
    tags = [tag] if tag else [open_clip.get_pretrained_cfg(settings.name, each) for each in public]
    wanted = [PreprocessSettings(**{key: one.get(key) for key in _PREPROCESS}) for one in tags]
    agree = bool(wanted) and all(one == wanted[0] for one in wanted)
    return wanted[0].model_dump(exclude_none=True) if agree else {}


def pretrained_file(settings: ModelSettings) -> Path:
    """The file of `settings.pretrained`: a checkpoint on this machine, or downloaded by its tag.

    Raises:
        ConfigError: if there is neither.
    """
    tag = pretrained_tag(settings)
    return Path(_download(settings, tag)) if tag else _local_checkpoint(settings)


def read_state(path: Path, where: str) -> dict[str, Tensor]:
    """The weights in a file, in float32, by the names of `CustomTextCLIP`.

    Args:
        path: safetensors, or saved with torch.save.
        where: the setting that names the file, for the message.

    Raises:
        ConfigError: if it cannot be read without running code, or holds no weights.
    """
    try:
        saved = _read(path)
    except Exception as error:  # torch, pickle, zipfile and safetensors each raise their own
        raise ConfigError(
            f"{where}: {path} cannot be read: {_reason(error)}. Hint: a safetensors file, or a "
            "state dict saved with torch.save (no TorchScript, no objects)"
        ) from None
    state = saved.get("state_dict", saved) if isinstance(saved, Mapping) else saved
    if not _is_state(state):
        keys = ", ".join(map(str, list(saved)[:6])) if isinstance(saved, Mapping) else "no names"
        raise ConfigError(
            f"{where}: {path} holds no weights, but a {type(saved).__name__} with {keys or 'nothing'}. Hint: tensors "
            "by their names, or a dict that has them as `state_dict`"
        )
    state = _unwrapped({name: _in_float32(tensor) for name, tensor in state.items()})
    return _one_text_table(dict(open_clip.model.convert_to_custom_text_state_dict(state)))


def fit_state(
    state: Mapping[str, Tensor], model: nn.Module, where: str, bias: float | None = None
) -> dict[str, Tensor]:
    """The weights of `read_state` as a model wants them, but for the lengths of position tables.

    Args:
        state: weights.
        model: what they are for; may be on the meta device.
        where: the setting and the file, for the message.
        bias: as in `adopt_scalars`.

    Raises:
        ConfigError: if they are of another architecture, or were trained with another activation.
    """
    state = dict(open_clip.convert.convert_state_dict(model, dict(state)))
    if state.keys() & OPENAIS:
        _check_activation(model, where)
        state = {name: tensor for name, tensor in state.items() if name not in OPENAIS}
    adopt_scalars(state, model, bias)
    check_fit(state, model, where)
    return state


def adopt_scalars(state: dict[str, Tensor], model: nn.Module, bias: float | None) -> None:
    """Give temperature and bias the shapes of the model, in place.

    Args:
        state: weights; SigLIP's bias is left out if the model has none.
        model: what they are for.
        bias: SigLIP's, if only the model has one.
    """
    if model.logit_bias is None:
        state.pop("logit_bias", None)
    elif bias is not None:
        state.setdefault("logit_bias", torch.tensor(float(bias)))
    for name in ("logit_scale", "logit_bias"):
        if name in state and state[name].numel() == 1:
            state[name] = state[name].reshape(getattr(model, name).shape)


def check_fit(state: Mapping[str, Tensor], model: nn.Module, where: str) -> None:
    """Whether a state dict fits a model, position tables of another length aside.

    Args:
        state: weights.
        model: what they are for.
        where: the file that the weights come from, for the message.

    Raises:
        ConfigError: names the first tensors that do not fit, with both shapes.
    """
    wrong = misfits(state, model)
    if wrong and all("token_embedding" in each for each in wrong):
        raise ConfigError(
            f"{where} reads another vocabulary: {wrong[0]}. Hint: index: {{vocabulary: full}} for weights that read CLIP's "
            "49,408 tokens"
        )
    if wrong and any(name.startswith(("vision_model.", "text_model.")) for name in state):
        raise ConfigError(
            f"{where} has transformers' names of tensors (CLIPModel). Hint: the same weights as open_clip saves them"
        )
    if wrong:
        raise ConfigError(
            f"{where} holds another architecture: {first_of(wrong)}. Hint: the model must "
            "be built from the config that these weights were trained with"
        )


def misfits(state: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Tensors of other shapes than the model's, those that are missing, and those too many, in words."""
    expected = model.state_dict()
    wrong = []
    for name in expected.keys() & state.keys():
        ours, theirs = list(expected[name].shape), list(state[name].shape)
        resizable = name in (IMAGE, TEXT) and len(theirs) == len(ours)
        if theirs != ours and not (resizable and theirs[1:] == ours[1:]):
            wrong.append(f"{name} is {theirs}, the model has {ours}")
        elif theirs != ours and name == IMAGE and math.isqrt(theirs[0] - 1) ** 2 != theirs[0] - 1:
            wrong.append(f"{name} is {theirs}, which is no class token and a square")
    wrong = sorted(wrong)
    # Batches that a norm has seen are counted by torch since 2018, and filled in by it where they are not.
    needed = [name for name in expected if not name.endswith("num_batches_tracked")]
    wrong += [f"{name} is missing" for name in needed if name not in state]
    wrong += [f"{name} is not in the model" for name in state if name not in expected]
    return wrong


def first_of(wrong: list[str]) -> str:
    """The first three in words, and how many more there are."""
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return "; ".join(wrong[:3]) + more


def _download(settings: ModelSettings, tag: dict[str, Any]) -> str:
    try:
        return str(open_clip.download_pretrained(tag))
    except Exception as error:  # the hub and urllib have many of their own
        raise ConfigError(
            f"model.pretrained = {settings.pretrained!r} cannot be downloaded: {str(error)[:200]}. "
            "Hint: on a machine without network, give the path of a checkpoint"
        ) from None


def _local_checkpoint(settings: ModelSettings) -> Path:
    path = local_path(str(settings.pretrained))
    if path.is_file():
        return path
    known = open_clip.list_pretrained_tags_by_model(settings.name) if settings.name else []
    hint = f"tags of {settings.name}: {', '.join(known)}" if known else "tags need `model.name`"
    raise ConfigError(
        f"model.pretrained = {settings.pretrained!r} is no tag of open_clip and no file. Hint: {hint}"
    )


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    # Mapped, so that of a training run only the weights are read, not the optimizer, which is twice as large.
    is_mappable = zipfile.is_zipfile(path)
    with torch.serialization.safe_globals(_NUMBERS), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "'torch.load' received a zip file that looks like a TorchScript"
        )
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mappable)


def _reason(error: Exception) -> str:
    """In our words where torch would advise to run the code in the file."""
    words = str(error)
    if "TorchScript" in words:
        return "it is a TorchScript archive, as OpenAI's own files are, and those of its tag `openai` are not"
    if "Unsupported global: GLOBAL " in words:
        found = words.split("Unsupported global: GLOBAL ")[1].split()[0]
        return f"it holds an object of {found}, which is code, not numbers"
    if isinstance(error, pickle.UnpicklingError):
        return "torch.save did not write it, or not all of it"
    return f"{type(error).__name__}: {words[:200]}"


def _is_state(state: Any) -> bool:
    return (
        isinstance(state, Mapping)
        and bool(state)
        and all(isinstance(key, str) and isinstance(state[key], Tensor) for key in state)
    )


def _in_float32(tensor: Tensor) -> Tensor:
    """OpenAI's weights are half in float16, which the CPU cannot resample."""
    return tensor.detach().float() if tensor.is_floating_point() else tensor


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS * 2:
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return state


def _one_text_table(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Long-CLIP and CLIP-MoE keep two tables, and take rows before 20 from one, the others from the other."""
    second_LD = state.pop(f"{TEXT}{SECOND_TABLE}", None)
    if second_LD is not None and TEXT in state:
        state[TEXT] = torch.cat([state[TEXT][:_LONG_CLIP_KEEP], second_LD[_LONG_CLIP_KEEP:]])
    return state


def _check_activation(model: nn.Module, where: str) -> None:
    if not any(isinstance(part, open_clip.transformer.QuickGELU) for part in model.modules()):
        raise ConfigError(
            f"{where} is a file of OpenAI's, trained with QuickGELU, and the model has GELU. "
            "Hint: the architecture whose name ends in -quickgelu, or pretrained: openai"
        )
