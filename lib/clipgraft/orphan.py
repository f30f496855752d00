"""Orphans: a job leaves when the Snakemake that started it is gone, however it ended.

On a cluster the scheduler owns the jobs: they run on, and what they write is valid. Workers of torchrun leave with it,
too.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

SNAKEMAKE = "CLIPGRAFT_SNAKEMAKE"  # where the main Snakemake is, and its number there
SECONDS_TO_SAVE = 300
_POLL_SECONDS = 0.5


def name_parent() -> None:
    """Called by the main Snakemake: the jobs that it starts on this machine leave with it."""
    os.environ[SNAKEMAKE] = f"{_here()} {os.getpid()}"


def leave_with_parents() -> None:
    """From here on, the end of Snakemake or torchrun is SIGTERM to this process: training saves and leaves."""
    where, _, number = os.environ.get(SNAKEMAKE, "").rpartition(" ")
    is_here = where == _here() and "SLURM_JOB_ID" not in os.environ
    parents = [int(number)] if is_here else []
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parents.append(os.getppid())
    if parents:
        threading.Thread(target=_leave_with, args=(parents,), daemon=True).start()


def _here() -> str:
    """This machine; in a container numbers of processes mean others."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(space) if space.exists() else ''}"


def _leave_with(parents: list[int]) -> None:
    with suppress(ProcessLookupError):  # gone already
        try:
            select.select([os.pidfd_open(parent) for parent in parents], [], [])
        except ProcessLookupError:
            raise
        except (AttributeError, OSError):  # this Python, or this system, has it not
            while True:
                for parent in parents:
                    os.kill(parent, 0)
                time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_SAVE)
    os._exit(1)  # it does not listen
