"""Turns: sides of a benchmark, each a process of its own or some that belong together, that run some steps when they are told to.

A side runs a whole training program in which the loader alone is replaced, by `Turns`: it hands out batches that lie
ready on the device, stops the clock after as many steps as it was told to, and then waits for its next turn. What one
side sets (attention kernels, compiler, threads) cannot touch the others, and while one runs the others wait.
"""

# Shapes: B batch, C channels, H x W pixels, L text tokens

from __future__ import annotations

import itertools
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from _profile import profiled
from torch import Tensor, nn

from clipgraft.devices import device_name, precision

NUM_BATCHES = 2  # in turn, so that none is learned by heart at once
NUM_STEPS = 10**6  # more than are ever run: the learning rate hardly moves
WARM_STEPS = 2  # of each turn on a GPU, where memory was given back after the turn before

# Forks save each side its imports, but may not follow a look at CUDA, which any of these imports may take.
PROCESSES: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
PROCESSES.set_forkserver_preload(["_sides", "open_clip_train.main", "torch._dynamo"])


@dataclass(frozen=True)
class Case:
    """A model and its batches.

    Attributes:
        name: what readers call it.
        config: in open_clip's form, with sizes; its context length is what ours reads texts up to.
        batch: samples of a step.
        longest: tokens of the longest text of a batch.
        lengths: mean and standard deviation of the number of tokens; None: all are as long as the longest.
        num_experts: of ours; 0 is dense.
        device: cpu or cuda.
        threads: of torch.
        mfu: to reach; None if nothing is claimed.
    """

    name: str
    config: dict[str, Any]
    batch: int
    longest: int
    lengths: tuple[float, float] | None = None
    num_experts: int = 0
    device: str = "cpu"
    threads: int = 1
    mfu: float | None = None


class Side(Protocol):
    """One way to run the steps of a case.

    Attributes:
        processes: that run it together; each is given orders.
    """

    @property
    def processes(self) -> int: ...

    def run(self, case: Case, orders: Connection, folder: Path) -> None:
        """Run a program on `Turns` of this connection; `folder` is empty, and goes afterwards."""

    def size(self, case: Case) -> int:
        """What a step counts as."""


def text_lengths(case: Case, number: int) -> np.ndarray:
    """Tokens of each text of a batch; one is the longest."""
    rng = np.random.default_rng([1, number])
    num_B = np.full(case.batch, case.longest)
    if case.lengths is not None:
        num_B = rng.normal(*case.lengths, case.batch).round().clip(3, case.longest).astype(np.int64)
        num_B[0] = case.longest
    return num_B


def batch_of(case: Case, number: int, context: int) -> tuple[Tensor, Tensor]:
    """Pictures as bytes, and texts padded to a context; the same for all sides."""
    rng = np.random.default_rng([0, number])
    side, vocabulary = (
        case.config["vision_cfg"]["image_size"],
        case.config["text_cfg"]["vocab_size"],
    )
    images = rng.integers(0, 256, (case.batch, side, side, 3), dtype=np.uint8)
    drawn_BL = rng.integers(1, vocabulary - 2, (case.batch, case.longest))
    text_BL = np.zeros((case.batch, max(context, case.longest)), np.int64)
    for row, num in enumerate(text_lengths(case, number)):
        text_BL[row, :num] = drawn_BL[row, :num]
        text_BL[row, [0, num - 1]] = vocabulary - 2, vocabulary - 1
    images_BCHW = torch.from_numpy(images).permute(0, 3, 1, 2)
    return images_BCHW, torch.from_numpy(text_BL[:, :context]).contiguous()


class Turns:
    """Stands where a loader does: as many batches as the parent asks for, and how long their steps took."""

    wait_seconds = 0.0

    def __init__(self, case: Case, orders: Connection, batches: list[Any]) -> None:
        """Batches that lie ready; `model` is set by whoever has it."""
        self.case, self.orders, self.batches = case, orders, itertools.cycle(batches)
        self.model: nn.Module | None = None
        self.num_batches, self.num_samples = NUM_STEPS, NUM_STEPS * case.batch  # open_clip asks

    def __iter__(self) -> Iterator[Any]:
        """Batches, in turns, until the parent ends the process."""
        device = torch.device(self.case.device)
        dtype = str(precision(device)).removeprefix("torch.")
        self.orders.send(f"{dtype} on {device_name(device)}")
        while True:
            what, num = self.orders.recv()
            yield from self._warm()
            yield from self._timed(num) if what == "steps" else self._profiled(num)
            if self.case.device == "cuda":
                torch.cuda.empty_cache()

    def _warm(self) -> Iterator[Any]:
        for _ in range(WARM_STEPS if self.case.device == "cuda" else 0):
            yield next(self.batches)

    def _timed(self, num: int) -> Iterator[Any]:
        start = self._now()
        for _ in range(num):
            yield next(self.batches)
        self.orders.send(self._now() - start)  # whoever asks for more has done the last step

    def _profiled(self, num: int) -> Iterator[Any]:
        assert self.model is not None
        with profiled(self.model, self.case.device) as table:
            for _ in range(num):
                yield next(self.batches)
            self._now()
        self.orders.send(table)

    def _now(self) -> float:
        if self.case.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _child(side: Side, case: Case, orders: Connection, folder: Path, about: dict[str, str]) -> None:
    """A process of a side; what it prints is not for the reader of the table."""
    folder.mkdir(parents=True)
    os.environ.update(about)
    log = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    torch.set_num_threads(max(case.threads // side.processes, 1))
    try:
        side.run(case, orders, folder)
    except Exception:
        orders.send(RuntimeError(f"{side}: {traceback.format_exc()}"))


class Player:
    """The processes of a side, as seen by the one that measures."""

    def __init__(self, side: Side, case: Case, folder: Path) -> None:
        """Start them; they are ready when they have said what they run on. `folder` is made."""
        self.size = side.size(case)
        self.orders, self.processes = [], []
        for rank, about in enumerate(_together(side.processes)):
            ours, theirs = PROCESSES.Pipe()
            words = (side, case, theirs, folder / str(rank), about)
            process = PROCESSES.Process(target=_child, args=words)
            process.start()
            theirs.close()
            self.orders.append(ours)
            self.processes.append(process)

    def answer(self) -> Any:
        """What all of them say next: the first one's word.

        Raises:
            RuntimeError: if one has failed; the others may wait for it and say nothing.
        """
        said: dict[int, Any] = {}
        while len(said) < len(self.orders):
            silent = [rank for rank in range(len(self.orders)) if rank not in said]
            ready = wait([self.orders[rank] for rank in silent])
            for rank in silent:
                if self.orders[rank] in ready:
                    said[rank] = self._heard(rank)
        return said[0]

    def _heard(self, rank: int) -> Any:
        try:
            said = self.orders[rank].recv()
        except EOFError:
            self.processes[rank].join()
            code = self.processes[rank].exitcode
            raise RuntimeError(f"a side has ended with {code}") from None
        if isinstance(said, Exception):
            raise said
        return said

    def ask(self, what: str, num: int) -> Any:
        """Some steps, timed or profiled."""
        for orders in self.orders:
            orders.send((what, num))
        return self.answer()

    def end(self) -> None:
        """At once: nothing of it is kept."""
        for process, orders in zip(self.processes, self.orders, strict=True):
            process.kill()
            process.join()
            orders.close()


def _together(num: int) -> list[dict[str, str]]:
    """What torchrun would tell each of so many processes of one machine; nothing to one that is alone."""
    if num == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    group = {"WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num), "MASTER_PORT": port}
    group |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num)]


def turns(
    sides: Mapping[str, Side], case: Case, seconds: float, repeats: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]], str]:
    """Samples per second of each side, round by round; where their time goes; and what they ran on.

    Args:
        sides: by name; those called `ours` and `open_clip` are profiled, if they are there.
        case: model and batches.
        seconds: that a turn takes, about; at least one step.
        repeats: rounds that count.

    Raises:
        RuntimeError: if a side fails.
    """
    rates, profiles, about, _ = turns_with(sides, {}, case, seconds, repeats)
    return rates, profiles, about


def turns_with(
    sides: Mapping[str, Side],
    optional: Mapping[str, Side],
    case: Case,
    seconds: float,
    repeats: int,
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]], str, dict[str, RuntimeError]]:
    """As `turns`, and why optional sides have failed, which leave the others alone and have no rates."""
    lost: dict[str, RuntimeError] = {}
    with tempfile.TemporaryDirectory() as scratch:
        players = {
            name: Player(side, case, Path(scratch) / name)
            for name, side in {**sides, **optional}.items()
        }

        def each(work: Callable[[str, Player], Any]) -> list[Any]:
            done = []
            for name, player in list(players.items()):
                try:
                    done.append(work(name, player))
                except RuntimeError as error:
                    if name not in optional:
                        raise
                    lost[name] = error
                    players.pop(name).end()
            return done

        try:
            about, *_ = each(lambda _, player: player.answer())
            rates, profiles = _in_turns(players, each, seconds, repeats)
        finally:
            for player in players.values():
                player.end()
    return rates, profiles, about, lost


def _in_turns(
    players: Mapping[str, Player],
    each: Callable[[Callable[[str, Player], Any]], list[Any]],
    seconds: float,
    repeats: int,
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    num: dict[str, int] = {}
    rates: dict[str, list[float]] = {name: [] for name in players}

    def begin(name: str, player: Player) -> None:
        player.ask("steps", 1)  # compiles, and makes the optimizer's state
        num[name] = max(1, round(seconds / player.ask("steps", 1)))

    def measure(name: str, player: Player) -> None:
        took = player.ask("steps", num[name])
        rates[name].append(num[name] * player.size / took)

    each(begin)
    for _ in range(repeats):
        each(measure)
    named = [name for name in ("ours", "open_clip") if name in players]
    profiles = {name: players[name].ask("profile", min(num[name], 5)) for name in named}
    return {name: rates[name] for name in players}, profiles
