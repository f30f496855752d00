"""Work spread over processes, results in order, with progress lines.

Workers are started anew, never forked from a process that holds threads (OpenCV, torch), and they leave when their
parent is gone, however it ended. A fork server would leave a folder with its socket behind where a job is killed.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from clipgraft.config import ConfigError
from clipgraft.orphan import leave_with

log = logging.getLogger(__name__)

LOG_SECONDS = 10.0  # between lines of progress

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def worker_pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes; on an error what has not begun is dropped.

    Raises:
        ConfigError: if a worker was killed.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max(1, num_workers), mp_context=context, initializer=_start_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise ConfigError(
            f"one of {num_workers} worker processes was killed. Hint: most often memory has run out (`dmesg` says so): "
            "fewer threads of this stage under `resources` need less; then run snakemake again"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def parallel_map(function: Callable[[T], R], tasks: Iterable[T], num_workers: int) -> Iterator[R]:
    """Apply `function` to each task; results come in the order of the tasks.

    Args:
        function: a module's function; its arguments and results travel between processes.
        tasks: taken as needed: at most four per worker are under way.
        num_workers: 1 works in this process.
    """
    if num_workers <= 1:
        yield from map(function, tasks)
        return
    with worker_pool(num_workers) as pool:
        pending: deque[Future[R]] = deque()
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) >= 4 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class Progress:
    """A line now and then: how many of how many, how fast, and the time left."""

    def __init__(self, verb: str, total: int, unit: str = "images") -> None:
        """Start the clock.

        Args:
            verb: what is done to images, e.g. `decoded`.
            total: how many there are; 0 if that is not known.
            unit: what is counted.
        """
        self.verb, self.total, self.unit = verb, total, unit
        self.count, self.started = 0, time.monotonic()
        self.last = self.started

    def add(self, count: int, note: str = "") -> None:
        """Count `count` more images; speak if it is time to."""
        self.count += count
        now = time.monotonic()
        if now - self.last >= LOG_SECONDS:
            self.last = now
            log.info("%s%s", self._line(now), note)

    def done(self, note: str = "") -> None:
        """Say how it ended."""
        log.info("%s%s", self._line(time.monotonic()), note)

    def _line(self, now: float) -> str:
        rate = self.count / max(1e-9, now - self.started)
        unit = {"images": "img"}.get(self.unit, self.unit)
        line = f"{self.verb} {self.count:,}/{self.total:,} {self.unit}"
        if self.total:
            line += f"  {self.count / self.total:.0%}"
        line += f"  {rate:,.0f} {unit}/s"
        if 0 < self.count < self.total:
            minutes, seconds = divmod(round((self.total - self.count) / max(rate, 1e-9)), 60)
            line += f"  {minutes}m{seconds:02d}s left"
        return line


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.filterwarnings("ignore", module="PIL")  # broken metadata of single images
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    leave_with([parent.pid], lambda: os._exit(1))
