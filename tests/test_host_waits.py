"""A step never makes a device wait for the host, or the host for a device, but where it is named here.

On a CPU nothing waits; but what would is called all the same, and seen. A row of `metrics.jsonl` is no part of a step.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from test_references import made
from test_train import LOSSES, folder, make_data, phase
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from clipgraft.data.tokens import Tokens
from clipgraft.experts import finetune_expert
from clipgraft.graft import assemble
from clipgraft.pretrain import pretrain
from clipgraft.router import finetune_router
from clipgraft.settings import AssembleJob, ExpertJob, RouterJob
from clipgraft.train import Fit

# Their result or its shape is needed on the host; `lift_fresh` is a constant that the host sends.
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "unique_dim",
    "masked_select",
    "equal",
    "bincount",
    "lift_fresh",
}
# Functions that may: they look at texts before they are sent; the last one where padding is left out.
NAMED = {"trimmed", "packing", "places"}
COPIES = {
    torch.Tensor.cpu,
    torch.Tensor.numpy,
    torch.Tensor.tolist,
}  # on a CPU nothing is dispatched
ONCE = {"_of_channels"}  # in the first step of a process
# What torch says of a wait; of its debug mode it says that it "does not yet detect all synchronizing operations".
WAITED = "called a synchronizing CUDA operation"


class Waits(TorchDispatchMode):
    """Which functions of the library wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        if name in WAITS or any(torch.is_tensor(x) and x.dtype == torch.bool for x in indices):
            self.found.add(function_of_ours(sys._getframe()))
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Which functions of the library copy to the host or from it, and wait."""

    def __init__(self, found: set[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        to = [x for x in (*args[1:], *named.values()) if isinstance(x, torch.device | str)]
        moves = func is torch.Tensor.to and to and not named.get("non_blocking")
        caller = sys._getframe(1)
        is_torch = "/torch/" in caller.f_code.co_filename  # it asks for the device that it is on
        if func in COPIES or (moves and not is_torch):
            self.found.add(function_of_ours(caller))
        return func(*args, **named)


def function_of_ours(frame: FrameType | None) -> str:
    """The innermost one of the library that a frame was called by."""
    while frame is not None and "/clipgraft/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_code.co_name if frame is not None else ""


@contextmanager
def steps_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[set[str]]]:
    """What waits in each step of the trainings that run meanwhile."""
    found: list[set[str]] = []
    step = Fit._step

    def seen(self: Fit, *arguments: Any) -> Any:
        with Waits() as waits, Copies(waits.found):
            result = step(self, *arguments)
        found.append(waits.found - ONCE)
        return result

    monkeypatch.setattr(Fit, "_step", seen)
    yield found
    monkeypatch.undo()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a reference, a base, labels of which one shares its batches with another, and a mixture."""
    root = tmp_path_factory.mktemp("waits")
    make_data(root)
    tokens = Tokens.open(root / "index")
    made(root / "near", tokens.tokenizer, vocab_size=tokens.vocab_size, dim=16)
    data = root / "index", root / "shard"
    pretrain(phase(samples_seen=0), *data, None, folder(root / "base"))
    folder(root / "labels")
    np.save(root / "labels" / "labels.npy", np.repeat(np.arange(5), 8).astype(np.int32))
    about = {"samples_id": tokens.samples_id, "rounds": 1}
    (root / "labels" / "clusters.json").write_text(json.dumps(about))
    settings = AssembleJob(num_experts=2, top_k=1, copies=True, noise=0.5, seed=0)
    assemble(settings, [root / "base"], folder(root / "moe"))
    return root


TERMS = {"feature": 0.5, "affinity": 1.0, "interactive": 0.5}
PRETRAINED: dict[str, dict[str, Any]] = {
    "contrastive": {},
    **{name: {"loss": LOSSES[name]} for name in LOSSES if name != "v3"},
    "clipped": {"optim": {"lr": 1e-3, "max_grad_norm": 0.1}},
    "in parts": {"accumulate": 2},
    "augmented": {"flip_prob": 0.5, "color_jitter": (0.2, 0.2, 0.2, 0.1), "gray_scale_prob": 0.1},
    "guided": {"references": ["near"], "distillation": TERMS},
    **{name: {"optim": {"name": name, "lr": 1e-3}} for name in ("lamb", "lion", "sgd")},
}


@pytest.mark.parametrize("case", PRETRAINED)
def test_a_step_of_pretraining_waits_for_nothing(root, tmp_path, monkeypatch, case):
    changes = dict(PRETRAINED[case])
    named = [{"model": str(root / name)} for name in changes.pop("references", [])]
    settings = phase(samples_seen=48, temperature=0.1, references=named, **changes)
    with steps_seen(monkeypatch) as found:
        pretrain(settings, root / "index", root / "shard", None, folder(tmp_path / "out"))
    # Of samples: the host reads the numbers of a batch, and writes new ones once the rest of the step is queued.
    remembered = {"read", "settle"} if settings.loss.is_global else set()
    captions = {"<lambda>"} if named else set()  # as a reference reads them
    assert found == [NAMED | remembered | captions] * 3


def test_the_threshold_of_the_temperature_is_the_one_number_that_is_read(
    root, tmp_path, monkeypatch
):
    """On a GPU it is that of the step before, which is over by then. What is remembered is read from the host, too."""
    settings = phase(samples_seen=48, temperature=0.1, loss=LOSSES["v3"])
    with steps_seen(monkeypatch) as found:
        pretrain(settings, root / "index", root / "shard", None, folder(tmp_path / "out"))
    assert found == [NAMED | {"read", "settle", "_tau"}] * 3


def test_a_step_of_an_expert_waits_for_nothing_where_labels_share_a_batch(
    root, tmp_path, monkeypatch
):
    settings = ExpertJob(
        batches="homogeneous",
        samples_seen=40,
        batch_size=20,
        optim={"lr": 1e-3},
        stop_ratio=None,
        seed=0,
    )
    inputs = root / "base", root / "index", root / "shard", root / "labels"
    with steps_seen(monkeypatch) as found:
        finetune_expert(settings, *inputs, folder(tmp_path / "out"))
    assert found == [NAMED] * 2


def test_a_step_of_a_router_waits_for_what_experts_leave_out_alone(root, tmp_path, monkeypatch):
    settings = RouterJob(samples_seen=40, batch_size=20, optim={"lr": 1e-3}, seed=0)
    inputs = root / "moe", root / "index", root / "shard"
    monkeypatch.setenv("CLIPGRAFT_MOE_BACKEND", "loop")  # elsewhere `grouped`, which does not wait
    with steps_seen(monkeypatch) as found:
        finetune_router(settings, *inputs, folder(tmp_path / "out"))
    assert found == [{"trimmed", "places", "_loop"}] * 2


@pytest.mark.parametrize("copy", ["cpu", "numpy", "tolist", "to"])
def test_a_copy_to_the_host_is_seen(copy):
    found: set[str] = set()
    with Copies(found):
        getattr(torch.ones(1), copy)(*["cpu"] if copy == "to" else [])
        assert found == {""}
        found.clear()
        torch.ones(1).to("cpu", non_blocking=True).to(torch.float64)
    assert not found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("stage", ["pretrain", "finetune_router"])
def test_a_step_on_a_gpu_waits_for_nothing(root, tmp_path, monkeypatch, stage):
    """As torch sees it, which says where."""
    step = Fit._step

    def seen(self: Fit, *arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            return step(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Fit, "_step", seen)
    monkeypatch.setenv("CLIPGRAFT_MOE_BACKEND", "dense")  # runs at any width; `grouped` is alike
    data, out = (root / "index", root / "shard"), folder(tmp_path / "out")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if stage == "pretrain":
            pretrain(phase(samples_seen=48), *data, None, out)
        else:
            settings = RouterJob(samples_seen=40, batch_size=20, optim={"lr": 1e-3}, seed=0)
            finetune_router(settings, root / "moe", *data, out)
    where = {Path(each.filename).name for each in said if WAITED in str(each.message)}
    assert where <= {"build.py"}  # `_of_channels`, once
