"""Trainings in processes of their own, to be killed: a server that has imported everything forks one for each."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
# torch imports its compiler when the first optimizer is made.
FORKS.set_forkserver_preload(
    ["clipgraft.pretrain", "clipgraft.experts", "clipgraft.router", "torch._dynamo"]
)


@dataclass(frozen=True)
class Training:
    """A stage, its settings, and what its function is given before the folder to write."""

    stage: str
    settings: dict[str, Any]
    inputs: tuple[Path | None, ...]

    def start(
        self, folder: Path, num: int = 1, *, near: bool = True, **how: Any
    ) -> list[BaseProcess]:
        """Begin, or go on, in some processes: state goes to `state`, and the model to `out`.

        Args:
            folder: for both.
            num: processes.
            near: they know that they are on one machine.
            how: `threads` of the loader; `pause`: seconds between saves, 0 after every step, None for no
                state; `late`: a process that does not see the state; `dies`: see `_die_after`.
        """
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        about = {"WORLD_SIZE": num, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        about["LOCAL_WORLD_SIZE"] = num if near else 1
        ranks = [{"RANK": rank, **about} for rank in range(num)]
        processes: list[BaseProcess] = [
            FORKS.Process(target=_train, args=(self, folder, rank if num > 1 else {}), kwargs=how)
            for rank in ranks
        ]
        for process in processes:
            process.start()
        return processes

    def end(self, folder: Path, num: int = 1, **how: Any) -> bytes:
        """Let it end, and read the weights."""
        assert exit_codes(self.start(folder, num, **how)) == {0}
        return weights(folder)


def _train(
    training: Training,
    folder: Path,
    environment: dict[str, Any],
    threads: int = 1,
    pause: float | None = 0.0,
    late: int | None = None,
    dies: tuple[int, float] | None = None,
) -> None:
    import torch

    from clipgraft import training_state
    from clipgraft.experts import finetune_expert
    from clipgraft.pretrain import pretrain
    from clipgraft.router import finetune_router
    from clipgraft.settings import ExpertJob, PretrainJob, RouterJob

    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ["CLIPGRAFT_PRECISION"] = "fp32"
    logging.basicConfig(filename=folder / "log", level=logging.INFO)
    torch.set_num_threads(1)
    training_state.SAVE_SECONDS = pause or 0.0
    stages: dict[str, Any] = {
        "pretrain": (PretrainJob, pretrain),
        "finetune_expert": (ExpertJob, finetune_expert),
        "finetune_router": (RouterJob, finetune_router),
    }
    settings_of, stage = stages[training.stage]
    settings, out = settings_of(**training.settings), folder / "out"
    out.mkdir(exist_ok=True)
    where = folder / ("late" if os.environ.get("RANK") == str(late) else "state")
    state = None if pause is None else training_state.TrainingState(where, "tag")
    if dies is not None:
        _die_after(*dies, folder / "state")
    try:
        stage(settings, *training.inputs, out, threads=threads, state=state)
    except training_state.ConfigError as error:
        logging.error("%s", error)
        sys.exit(1)
    except KeyboardInterrupt:  # as a job does
        sys.exit(128 + signal.SIGINT)


def _die_after(step: int, pause: float, state: Path) -> None:
    """Be killed when the state of a step is about to get its name, or so many seconds later.

    By itself or the kernel's timer (SIGALRM, which nobody handles): who kills from outside may come too late, when a
    machine that does other things lets a short training end first.
    """

    def begin(event: str, words: tuple[Any, ...]) -> None:
        is_saved = event == "os.rename" and str(words[1]).endswith(".pt")
        if (
            is_saved
            and _step(Path(words[1])) >= step
            and not signal.getitimer(signal.ITIMER_REAL)[0]
        ):
            if not pause:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.setitimer(signal.ITIMER_REAL, pause)

    if step_of(state) >= step:
        signal.setitimer(signal.ITIMER_REAL, pause)
    sys.addaudithook(begin)


def weights(folder: Path) -> bytes:
    """What a training has written."""
    return (folder / "out" / "model.safetensors").read_bytes()


def step_of(folder: Path) -> int:
    """The newest step that is saved; 0 if none is."""
    return max(map(_step, folder.glob("*.pt")), default=0)


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def kill(
    processes: list[BaseProcess],
    folder: Path,
    step: int,
    pause: float = 0.0,
    signal: signal.Signals = signal.SIGKILL,
) -> set[int | None]:
    """Send all a signal a moment after a step was saved; returns their exit codes."""
    while processes[0].is_alive() and step_of(folder / "state") < step:
        time.sleep(0.0005)
    time.sleep(pause)
    for process in processes:
        if process.is_alive() and process.pid:
            os.kill(process.pid, signal)
    return exit_codes(processes)


def exit_codes(processes: list[BaseProcess]) -> set[int | None]:
    """Wait until all have ended."""
    for process in processes:
        process.join()
    return {process.exitcode for process in processes}
