"""Orphans: a process leaves when the one that it works for is gone, however it ended.

A job leaves with its Snakemake; on a cluster the scheduler owns the jobs: they run on, and what they write is valid.
Workers leave with what has started them: torchrun, a job, img2dataset.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

SNAKEMAKE = "CLIPGRAFT_SNAKEMAKE"  # where the main Snakemake is, and its number there
HERE = "CLIPGRAFT_HERE"  # set where jobs run on the machine of their Snakemake
TORCHRUN = (
    "CLIPGRAFT_TORCHRUN"  # the number of the torchrun that the launcher became, for its workers
)
NOTHING_TO_DO = "CLIPGRAFT_NOTHING_TO_DO"  # of several processes, the first is told
SECONDS_TO_SAVE = 300
SECONDS_TO_ASK_AGAIN = 30.0  # where the first time was swallowed
_POLL_SECONDS = 0.5


def name_parent() -> None:
    """Called by the main Snakemake: the jobs that it starts on this machine leave with it."""
    os.environ[SNAKEMAKE] = f"{_here()} {os.getpid()}"


def name_place(*, is_local: bool) -> None:
    """Called by the main Snakemake: whether its jobs run beside it, maybe in a job of SLURM of its own."""
    os.environ.pop(HERE, None)
    if is_local:
        os.environ[HERE] = "1"


def is_on_slurm() -> bool:
    """Whether SLURM has started this job, for a Snakemake somewhere else."""
    return "SLURM_JOB_ID" in os.environ and HERE not in os.environ


def leave_when_asked() -> None:
    """From here on, SIGTERM and SIGUSR1 are the end of this process; training takes them over and saves first.

    An import that catches every exception swallows this one, too: `was_asked` remembers it.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _leave)


def was_asked() -> bool:
    """Whether this process should have ended."""
    return bool(_asked)


def leave_with_parents() -> None:
    """From here on, the end of Snakemake or torchrun is SIGTERM to this process: training saves and leaves."""
    parents = _snakemake()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a parent that has ended already is another one
        parents.append(int(os.environ.get(TORCHRUN, os.getppid())))
    if parents:
        leave_with(parents, _save_and_leave)


def leave_with(parents: Sequence[int], leave: Callable[[], object]) -> None:
    """Have a thread of this process wait until one of its parents has ended, and leave.

    Args:
        parents: their numbers.
        leave: called then.
    """

    def wait() -> None:
        _wait_for_end(parents, None)
        leave()

    threading.Thread(target=wait, daemon=True).start()


def is_left() -> bool:
    """Whether the Snakemake that has started this job, on this machine, is gone."""
    return any(_wait_for_end([parent], 0.0) for parent in _snakemake())


def _snakemake() -> list[int]:
    """The number of the Snakemake that this job leaves with, if there is one."""
    where, _, number = os.environ.get(SNAKEMAKE, "").rpartition(" ")
    return [int(number)] if where == _here() and not is_on_slurm() else []


def _here() -> str:
    """This machine; in a container numbers of processes mean others."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(space) if space.exists() else ''}"


def _wait_for_end(processes: Sequence[int], seconds: float | None) -> bool:
    """Wait until one of them has ended, or for so long; returns whether one has."""
    ends: list[int] = []
    try:
        for process in processes:
            ends.append(os.pidfd_open(process))
        return _is_readable(ends, seconds)
    except ProcessLookupError:  # gone already
        return True
    except (AttributeError, OSError):  # this Python, or this system, has it not
        return _ask_for_end(processes, seconds)
    finally:
        for end in ends:
            os.close(end)


def _is_readable(files: Sequence[int], seconds: float | None) -> bool:
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    return bool(poll.poll(None if seconds is None else 1000 * seconds))


def _ask_for_end(processes: Sequence[int], seconds: float | None) -> bool:
    begun = time.monotonic()
    try:
        while True:
            for process in processes:
                os.kill(process, 0)
            if seconds is not None and time.monotonic() - begun >= seconds:
                return False
            time.sleep(_POLL_SECONDS)
    except ProcessLookupError:
        return True


def _save_and_leave() -> None:
    begun = time.monotonic()
    while time.monotonic() - begun < SECONDS_TO_SAVE:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SECONDS_TO_ASK_AGAIN)
    os._exit(1)  # it does not listen


def _leave(number: int, _: object) -> None:
    _asked.append(number)
    sys.exit(128 + number)


_asked: list[int] = []  # signals that wanted this process to end
