"""Training state: what a training needs to go on after a kill, when it is saved, and who asks for it.

State is written aside, flushed to disk and renamed, and the one before it is kept, so that there is always a whole one.
A file's name tells whose it is (settings, inputs and code), its step, and the checksum of what it holds: one that was
damaged is never continued. Nothing is ever unpickled without `weights_only`.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import pickle
import signal
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor, nn

from clipgraft import dist, parallel
from clipgraft.aside import sync
from clipgraft.config import ConfigError
from clipgraft.data.memory import SampleMemory
from clipgraft.devices import random_state, set_random_state
from clipgraft.lock import try_lock
from clipgraft.orphan import was_asked

log = logging.getLogger(__name__)

SAVE_SECONDS = float(os.environ.get("CLIPGRAFT_SAVE_SECONDS", "60"))  # 0: after every step
SAVE_SHARE = 0.02  # of the time may go into saving: where that takes longer, it is done less often


_UNREADABLE = (OSError, RuntimeError, pickle.UnpicklingError)


class TrainingState:
    """What a trainer saves to continue after a kill; two generations, in a folder of its own.

    State of other settings, inputs or code is never mistaken for one's own. The first process locks the folder until
    `close` or its end, however it ends.
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
        self._is_first = os.environ.get("RANK", "0") == "0"  # the others only load
        self._let_go: Callable[[], object] = lambda: None
        if self._is_first:
            lock = try_lock(self._folder / ".lock")
            if lock is None:
                raise ConfigError(
                    f"another trainer uses {self._folder}. Hint: wait for it, or end it; two trainers must not share state"
                )
            self._let_go = weakref.finalize(self, lock.close)

    def load(self) -> dict[str, Any] | None:
        """The newest whole state under this tag, as it was saved; None means start afresh; by all processes together.

        The first process finds it, and reads all of it once, for its checksum. Tensors are mapped: those of a node
        share what they read, and none holds more of it than it takes over.
        """
        name, state = self._newest() if self._is_first else ("", None)
        chosen = dist.said_by_first(name)
        if chosen == name:
            return state
        try:
            return _mapped(self._folder / chosen)
        except _UNREADABLE as error:  # shown late, or in part: `check_alike` says what to do
            log.warning("training state %s cannot be read, not used: %s", chosen, error)
            return None

    def _newest(self) -> tuple[str, dict[str, Any] | None]:
        """Its name, too; no name if there is none."""
        is_any = next(self._folder.glob("*.pt"), None) is not None
        for path in reversed(self._generations()):
            try:
                _check(path)
                return path.name, _mapped(path)
            except _Damaged as error:
                log.warning("training state %s is damaged, not used: %s", path, error)
                path.unlink()  # or it would be kept in place of a whole one
            except _UNREADABLE as error:
                log.warning("training state %s cannot be read, not used: %s", path, error)
        if is_any:
            log.warning(
                "%s: no training state is whole and of these settings, inputs and code: starting "
                "afresh",
                self._folder,
            )
        return "", None

    def save(self, state: dict[str, Any]) -> None:
        """Save atomically; then only this state and the one before it are kept, and the last one of another tag.

        Whose code was changed by mistake while it trained can so change it back, and go on.

        Args:
            state: `step` (steps done) and what else there is: tensors, numbers, strings and None, in
                dicts, lists and tuples.

        Raises:
            OSError: if it cannot be written; what was saved before is as it was.
        """
        _check_plain(state)
        for left_by_a_kill in self._folder.glob("*.tmp"):
            left_by_a_kill.unlink()
        name = f"{self._prefix}-{state['step']:012d}"
        temporary = self._folder / f"{name}.tmp"
        try:
            checksum = _write(state, temporary)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        path = self._folder / f"{name}-{checksum}.pt"
        os.replace(temporary, path)
        sync(self._folder)
        own = self._generations()
        before = [other for other in own if other.name < name]
        others = sorted(set(self._folder.glob("*.pt")).difference(own), key=os.path.getmtime)
        for each in {*own, *others}.difference([path, *before[-1:], *others[-1:]]):
            each.unlink()

    def close(self) -> None:
        """Let go of the folder."""
        self._let_go()

    def _generations(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._prefix}-*.pt"))


class Pace:
    """When state is saved: every `SAVE_SECONDS`, or as seldom as keeps that under `SAVE_SHARE` of the time."""

    def __init__(self) -> None:
        """Begin."""
        self._saved, self._took = time.monotonic(), 0.0

    def is_due(self) -> bool:
        """Whether it is time."""
        pause = max(SAVE_SECONDS, self._took / SAVE_SHARE) if SAVE_SECONDS else 0.0
        return time.monotonic() - self._saved >= pause

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Take the time of a save."""
        started = time.monotonic()
        yield
        self._saved = time.monotonic()
        self._took = self._saved - started


@dataclass
class Stop:
    """Whether someone has asked this process to leave."""

    requested: bool = False


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """While training, SIGTERM and SIGUSR1 mean: save and leave."""
    stop = Stop(requested=was_asked())

    def request(*_: object) -> None:
        stop.requested = True

    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watcher(Protocol):
    """What looks at the model every so often, and changes nothing (`evaluation.watch`)."""

    rows: list[dict[str, Any]]
    best: dict[str, Any] | None

    def is_due(self, step: int) -> bool:
        """Whether to look after so many steps."""

    def look(self, model: nn.Module, step: int, seconds: float) -> None:
        """Measure the model; by all processes together."""

    def state(self) -> dict[str, Any]:
        """What a resume needs."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""


@dataclass(frozen=True)
class Parts:
    """All that changes while a model trains, but step and metrics; no tower that we train has buffers.

    Attributes:
        trained: parameters by name.
        optimizer: of the parameters.
        memory: what the loss remembers.
        watch: what looks at the model.
    """

    trained: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    memory: SampleMemory | None
    watch: Watcher | None

    def captured(self, is_first: bool) -> dict[str, Any]:
        """As it is now, to be saved before the next step; by all processes together, for the first one to save."""
        captured = parallel.state_of(self.trained, self.optimizer, is_first)
        if not is_first:
            return {}
        captured["random"] = random_state()
        if self.memory is not None:
            captured["memory"] = self.memory.state()
        if self.watch is not None:
            captured["watch"] = self.watch.state()
        return captured

    def restore(self, captured: Mapping[str, Any]) -> None:
        """Be again as it was; by all processes together, of which there may be more or fewer than before."""
        parallel.restore(captured, self.trained, self.optimizer)
        set_random_state(captured["random"])
        if self.memory is not None:
            self.memory.restore(captured["memory"])
        if self.watch is not None and "watch" in captured:
            self.watch.restore(copy.deepcopy(captured["watch"]))  # not as part of a file

    def check_finite(self, step: int, num_steps: int, device: torch.device) -> None:
        """State of weights that are not finite would be good for nothing; by all processes together.

        A step may spoil them though its loss was finite, and only the next loss would show it.

        Raises:
            ConfigError: if a number is not.
        """
        of_parameters = self.optimizer.state.values()
        moments = [value for of in of_parameters for value in of.values() if torch.is_tensor(value)]
        checks = [
            dist.own(value.detach()).isfinite().all().cpu()
            for value in (*self.trained.values(), *moments)
        ]
        if dist.largest(not all(checks), device):
            raise ConfigError(
                f"weights are not finite after step {step} of {num_steps}, though the loss before was. State of earlier "
                "steps is kept. Hint: a lower optim.lr, a longer warmup, or max_grad_norm"
            )


def check_alike(step: int, device: torch.device) -> None:
    """All processes must have read state of the same step: a file system may show a new file late.

    Raises:
        ConfigError: if they have not.
    """
    most, least = dist.largest(step, device), -dist.largest(-step, device)
    if most != least:
        raise ConfigError(
            f"processes found training state of steps {least} and {most}. Hint: run it again; the results folder must be "
            "one that all nodes see alike"
        )


class _Damaged(Exception):
    """The file does not hold what was written."""


class _Summed:
    """A file that is written from front to back, and the checksum of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _write(state: dict[str, Any], path: Path) -> str:
    with path.open("wb") as file:
        summed = _Summed(file)
        torch.save(state, summed)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    return summed.sha256.hexdigest()[:16]


def _check(path: Path) -> None:
    # torch's own files have checksums, but it is built not to look at them.
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    if checksum != path.stem.rpartition("-")[2]:
        raise _Damaged("its checksum is not that in its name")


def _mapped(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


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
