"""Checkpoints as the training runs of open_clip, fast_clip and DRRho-CLIP write them, and files that are none."""

from __future__ import annotations

import copy
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clipgraft.config import ConfigError
from clipgraft.model_settings import ModelSettings
from clipgraft.models.build import build, model_config, pretrained_state
from clipgraft.models.weights import read_state

NUM_ROWS = 12  # of the data set of the run


def clip_of(tiny_config: dict[str, Any]) -> nn.Module:
    """The class that their trainers build for an architecture without `custom_text`."""
    config = {key: value for key, value in tiny_config.items() if key != "custom_text"}
    return open_clip.CLIP(**copy.deepcopy(config))


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW after a step of their cosine schedule, whose learning rate is a number of numpy."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    features = model(torch.randn(2, 3, 16, 16), torch.tensor([[38, 5, 39, 0, 0, 0, 0, 0]] * 2))
    sum(part.sum() for part in features[:3]).backward()
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.5 * (1 + np.cos(np.pi * 3 / 7)) * 1e-3
    assert isinstance(optimizer.param_groups[0]["lr"], np.float64)
    return optimizer


def training_run(model: nn.Module, trainer: str) -> dict[str, Any]:
    """What `epoch_3.pt` of a run holds."""
    saved = {
        "epoch": 3,
        "name": "2025_05_05-model_ViT-B-16-lr_0.0003",
        "state_dict": {f"module.{name}": part for name, part in model.state_dict().items()},
        "optimizer": stepped(model).state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }
    state = ["u_im", "u_tt"] if trainer != "open_clip" else []
    if trainer == "fast_clip v2":
        state += ["tau_im", "tau_tt", "m_grad_tau_im", "m_grad_tau_tt", "v_grad_tau_im"]
        state += ["v_grad_tau_tt", "bound_im", "bound_tt"]
    return saved | {name: torch.zeros(NUM_ROWS, 1) for name in state}


@pytest.mark.parametrize("trainer", ["open_clip", "fast_clip v3", "fast_clip v2"])
def test_a_checkpoint_of_a_training_run_is_the_start_of_a_phase(tiny_config, tmp_path, trainer):
    clip = clip_of(tiny_config)
    torch.save(training_run(clip, trainer), tmp_path / "epoch_3.pt")
    # torch alone stops at the number of numpy
    with pytest.raises(Exception, match=r"multiarray\.scalar"):
        torch.load(tmp_path / "epoch_3.pt", weights_only=True)
    settings = ModelSettings(config=tiny_config, pretrained=str(tmp_path / "epoch_3.pt"))
    config = model_config(settings, 40, 16, 8)
    model = build(config).eval()
    model.load_state_dict(pretrained_state(settings, config))
    images, text = torch.randn(2, 3, 16, 16), torch.tensor([[38, 5, 39, 0, 0, 0, 0, 0]] * 2)
    for ours, theirs in zip(model(images, text), clip.eval()(images, text), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_numbers_of_numpy_1_are_read_too(tiny_config, tmp_path, monkeypatch):
    """It called the module of its scalars by another name, which stands in the files of its time."""

    def scalar(*_: Any) -> None: ...

    scalar.__module__, scalar.__qualname__ = "numpy.core.multiarray", "scalar"
    old = types.ModuleType("numpy.core.multiarray")
    old.scalar = scalar
    monkeypatch.setitem(sys.modules, "numpy.core.multiarray", old)

    class Number:
        def __reduce__(self) -> tuple[Any, ...]:
            return scalar, (np.dtype(np.float64), np.float64(0.5).tobytes())

    saved = {"state_dict": build(tiny_config).state_dict(), "optimizer": {"lr": Number()}}
    torch.save(saved, tmp_path / "epoch_3.pt")
    with pytest.raises(Exception, match=r"numpy\.core\.multiarray\.scalar"):
        torch.load(tmp_path / "epoch_3.pt", weights_only=True)
    assert len(read_state(tmp_path / "epoch_3.pt", "model.pretrained")) == len(saved["state_dict"])


@pytest.mark.parametrize(
    "wrapper", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("is_run", [True, False])
def test_weights_have_their_names_however_they_were_wrapped(tiny_config, tmp_path, wrapper, is_run):
    state = build(tiny_config).state_dict()
    wrapped = {wrapper + name: part for name, part in state.items()}
    torch.save({"epoch": 1, "state_dict": wrapped} if is_run else wrapped, tmp_path / "a.pt")
    read = read_state(tmp_path / "a.pt", "model.pretrained")
    assert all(torch.equal(read[name], state[name]) for name in state | read)


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_every_form_of_file_gives_the_same_weights_in_float32(tiny_config, tmp_path, form):
    state = {name: part.half() for name, part in build(tiny_config).state_dict().items()}
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pt")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    read = read_state(path, "model.pretrained")
    assert all(torch.equal(read[name], state[name].float()) for name in state | read)
    assert {part.dtype for part in read.values()} == {torch.float32}


class Secret:
    """An object of the trainer's own."""


def save_torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wants to be rid of it
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda path: torch.save({"state_dict": {}}, path),
            "no weights, but a dict with state_dict",
        ),
        (lambda path: torch.save({"epoch": 3, "model": {}}, path), "a dict with epoch, model"),
        (lambda path: torch.save({}, path), "a dict with nothing"),
        (lambda path: torch.save(torch.ones(3), path), "a Tensor with no names"),
        (lambda path: torch.save({"args": Secret()}, path), "an object of test_weights.Secret"),
        (lambda path: path.write_bytes(b"PK\x03\x04 cut off"), "cannot be read"),
        (lambda path: path.write_text("<html>"), "cannot be read"),
        (save_torchscript, "a TorchScript archive"),
    ],
)
def test_what_is_no_checkpoint_is_said_in_one_sentence(tmp_path, write, message):
    write(tmp_path / "a.pt")
    with pytest.raises(
        ConfigError, match=rf"model.pretrained: \S*a.pt .*{message}.*Hint: "
    ) as caught:
        read_state(tmp_path / "a.pt", "model.pretrained")
    assert "weights_only" not in str(caught.value)  # no advice to run the file's code


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("logit_scale", torch.ones(2), r"logit_scale is \[2\], the model has \[\]"),
        ("visual.positional_embedding", torch.ones(8, 32), "no class token and a square"),
    ],
)
def test_a_tensor_of_a_shape_that_cannot_be_carried_over_is_named(
    tiny_config, tmp_path, name, tensor, message
):
    state = clip_of(tiny_config).state_dict()
    tensor = tensor[:, : state[name].shape[-1]] if tensor.dim() == 2 else tensor
    torch.save(state | {name: tensor}, tmp_path / "a.pt")
    settings = ModelSettings(config=tiny_config, pretrained=str(tmp_path / "a.pt"))
    with pytest.raises(ConfigError, match=message):
        pretrained_state(settings, model_config(settings, 40, 16, 8))


def test_openais_own_file_is_not_run_with_another_activation(tiny_config, tmp_path):
    """Its state dict has three facts beside the weights, by which it is known."""
    facts = {"input_resolution": 16, "context_length": 8, "vocab_size": 40}
    clip = clip_of(tiny_config | {"quick_gelu": True})
    state = clip.state_dict() | {name: torch.tensor(number) for name, number in facts.items()}
    torch.save(state, tmp_path / "ViT.pt")
    for is_quick in (True, False):
        settings = ModelSettings(
            config=tiny_config | {"quick_gelu": is_quick}, pretrained=str(tmp_path / "ViT.pt")
        )
        config = model_config(settings, 40, 16, 8)
        if is_quick:
            build(config).load_state_dict(pretrained_state(settings, config))
        else:
            with pytest.raises(ConfigError, match="trained with QuickGELU, and the model has GELU"):
                pretrained_state(settings, config)


def test_siglips_bias_starts_where_the_weights_have_none(tiny_config, tmp_path):
    save_file(build(tiny_config).state_dict(), tmp_path / "a.safetensors")
    settings = ModelSettings(config=tiny_config, pretrained=str(tmp_path / "a.safetensors"))
    config = model_config(settings, 40, 16, 8) | {"init_logit_bias": -10}
    assert pretrained_state(settings, config)["logit_bias"] == -10
