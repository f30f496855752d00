"""Where the time of a training step goes: torch profiler's events, summed by the part of the model that caused them.

Modules say where their part begins and ends while a profile is taken, and at no other time: of a block, what comes before
its second norm is attention, the rest MLP, with a residual each, and norms are counted with the rest of the model. So it
does not matter which modules a block calls in between, and compiled blocks have no parts. An operator of the backward
pass belongs to the part whose forward operator made its node of the graph: both carry its number. On a GPU the time is
that of the kernels which an operator started, and gaps are the time in which no kernel ran; on a CPU it is the time in
the operator itself, and gaps are the time outside of all operators, that is Python.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

INPUTS = "normalise + copies"  # what stands outside of all modules: data lie ready
DATA = "data"  # waiting for a loader
PARTS = ("attention", "mlp", "model", "loss", "optimizer", INPUTS, "gaps")
_MARK, _BACKWARD = "part: ", "autograd::engine::evaluate_function: "


def marked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose operators belong to a part."""

    def inner(*args: Any, **how: Any) -> Any:
        with record_function(_MARK + part):
            return function(*args, **how)

    return inner


@contextmanager
def profiled(model: nn.Module, device: str) -> Iterator[dict[str, float]]:
    """Profile what is done inside; the table, shares of the time by part, is filled in at the end."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    table: dict[str, float] = {}
    with marks(model), profile(activities=activities, acc_events=True) as taken:
        start = _now(device)
        yield table
        seconds = _now(device) - start
    table.update(shares(taken.events(), seconds * 1e6, device))


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def watched(
    batches: Iterable[Any],
    profile: Callable[[], AbstractContextManager[dict[str, float]]],
    steps: range,
    keep: Callable[[dict[str, float]], None],
) -> Iterator[Any]:
    """Batches as they come, of which some steps are profiled, with the wait for each batch.

    Args:
        batches: of a real loader.
        profile: as `profiled`, of a model that is known by then.
        steps: which, from 0; one more must follow.
        keep: gets the table, which has one part more: `DATA`, else one of the gaps. On a GPU it is at most that: the device
            may be busy while its host waits.
    """
    source, waited = iter(batches), 0.0
    with ExitStack() as until_last:
        for step in itertools.count():
            if step == steps.start:
                table = until_last.enter_context(profile())  # starting it takes a while
                begun = time.perf_counter()
            if step == steps.stop:
                seconds = time.perf_counter() - begun
                until_last.close()
                share = min(waited / seconds, table["gaps"])
                keep({**table, "gaps": table["gaps"] - share, DATA: share})
            asked = time.perf_counter()
            if (batch := next(source, None)) is None:
                return
            waited += (time.perf_counter() - asked) * (step in steps)
            yield batch


@contextmanager
def marks(model: nn.Module) -> Iterator[None]:
    """The modules of a model mark what they do."""
    handles = _mark(model, "model")
    for module in model.modules():
        for block in getattr(module, "resblocks", []):
            handles += _mark_halves(block)
            handles += _mark(block.ln_1, "model") + _mark(block.ln_2, "model")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mark(module: nn.Module, part: str) -> list[Any]:
    """What the module does is that part."""
    enter, leave = _steps(part)
    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _mark_halves(block: nn.Module) -> list[Any]:
    """What a block does until its second norm is one part, what it does then another."""
    (enter, leave), (enter_mlp, leave_mlp) = _steps("attention"), _steps("mlp")
    return [
        block.register_forward_pre_hook(enter),
        block.ln_2.register_forward_pre_hook(leave),
        block.ln_2.register_forward_pre_hook(enter_mlp),
        block.register_forward_hook(leave_mlp),
    ]


def _steps(part: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Begin and end a mark."""
    marks: list[Any] = []

    def enter(*_: Any) -> None:
        marks.append(record_function(_MARK + part))
        marks[-1].__enter__()

    def leave(*_: Any) -> None:
        marks.pop().__exit__(None, None, None)

    return enter, leave


def shares(events: Any, wall_us: float, device: str) -> dict[str, float]:
    """Share of the wall time by part.

    Args:
        events: of a profile.
        wall_us: microseconds that were profiled.
        device: whose time is counted.
    """
    busy = dict.fromkeys(PARTS, 0.0)
    for event, part in by_part(events):
        busy[part] += event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
    busy["gaps"] = max(0.0, wall_us - sum(busy.values()))
    return {part: took / wall_us for part, took in busy.items()}


def by_part(events: Any) -> list[tuple[Any, str]]:
    """Operators of a profile, each with the part that it belongs to."""
    operators = [event for event in events if event.device_type == DeviceType.CPU]
    operators.sort(key=lambda event: event.time_range.start)
    made: dict[int, str] = {}  # by number of the node of the graph: the last operator has made it
    found = []
    for event in operators:
        part = _part(event, made)
        if event.sequence_nr >= 0 and _node(event) is None:
            made[event.sequence_nr] = part
        if not event.name.startswith(_MARK):  # what is left of a mark is Python
            found.append((event, part))
    return found


def _part(event: Any, made: Mapping[int, str]) -> str:
    node = _node(event)
    if node is not None:  # of the backward pass
        return made.get(node.sequence_nr, "model")
    names = [each.name for each in _line(event)]
    if any(name.startswith("Optimizer.") for name in names):
        return "optimizer"
    part = next((name.removeprefix(_MARK) for name in names if name.startswith(_MARK)), None)
    if part is None:  # clipping has no module and no mark
        return "optimizer" if any("norm" in name or "foreach" in name for name in names) else INPUTS
    return part


def _node(event: Any) -> Any:
    """The node of the graph that an operator of the backward pass runs for; None in the forward pass."""
    return next((each for each in _line(event) if each.name.startswith(_BACKWARD)), None)


def _line(event: Any) -> Iterator[Any]:
    """An event, and those that it is in."""
    while event is not None:
        yield event
        event = event.cpu_parent
