"""Arrays on disk that several processes fill, chunk by chunk, and that a kill leaves as far as they are.

Which chunks are done stands in a file beside them, marked only after what they hold is on the disk. What is done does
not depend on who did it: the next start may have another number of processes, and several jobs may fill a part each.
Written by offset, not mapped, so that processes of several nodes never write the same page.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from clipgraft import dist
from clipgraft.aside import link, write_json
from clipgraft.lock import locked

SAVE_SECONDS = 60.0
_ABOUT, _DONE = "filling.json", "done"


class Filling:
    """Float16 arrays in a folder of their own; all processes open it together.

    Attributes:
        num_done: chunks of this job's part that were done before.
        own_todo: numbers of the chunks that this process is to fill.
    """

    def __init__(
        self,
        folder: Path,
        tag: str,
        shapes: Mapping[str, tuple[int, ...]],
        num_chunks: int,
        world: dist.World,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """Open the arrays; they are made anew unless those of the same tag are there.

        Args:
            folder: what else is in it goes.
            tag: what arrays must agree with to be filled further: settings, inputs and code.
            shapes: of the arrays, by the names of their files.
            num_chunks: how many chunks of work there are.
            world: this process.
            part: of jobs that fill the same arrays, which one this is, and how many they are.
        """
        self._folder, self._names = folder, list(shapes)
        if world.is_first:
            about = {"tag": tag, "shapes": {name: list(shape) for name, shape in shapes.items()}}
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.with_name(f"{folder.name}.lock")):  # several jobs may open it
                is_whole = all((folder / name).exists() for name in [*shapes, _DONE])
                if _read(folder / _ABOUT) != about or not is_whole:
                    _make(folder, shapes, num_chunks)
                    write_json(folder / _ABOUT, about)  # the last: all is there
        dist.barrier()
        done = np.frombuffer((folder / _DONE).read_bytes(), np.uint8)
        dist.barrier()  # nobody marks before all have read
        k, num_parts = part
        share = np.arange(num_chunks)[k::num_parts]  # the same whenever a job of the others begins
        todo = share[done[share] == 0]
        self.num_done, self.own_todo = len(share) - len(todo), todo[world.rank :: world.size]
        self._files = {name: os.open(folder / name, os.O_RDWR) for name in [*shapes, _DONE]}
        fcntl.flock(
            self._files[_DONE], fcntl.LOCK_SH
        )  # until it is closed; NFS wants it open for reading
        self._close = weakref.finalize(self, _close, list(self._files.values()))
        self._begin = {name: np.load(folder / name, mmap_mode="r").offset for name in shapes}
        self._unmarked: list[int] = []
        self._saved = time.monotonic()

    def write(self, name: str, first: int, rows: np.ndarray) -> None:
        """Write neighbouring rows of an array."""
        rows = np.ascontiguousarray(rows, np.float16)
        begin = self._begin[name] + first * rows[:1].nbytes
        view = memoryview(rows.tobytes())
        while view:
            written = os.pwrite(self._files[name], view, begin)
            view, begin = view[written:], begin + written

    def mark(self, chunk: int) -> None:
        """Say that a chunk is filled."""
        self._unmarked.append(chunk)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Put what is filled on the disk, and then the marks."""
        for name in self._names:
            os.fsync(self._files[name])
        for chunk in self._unmarked:
            os.pwrite(self._files[_DONE], b"\1", chunk)
        os.fsync(self._files[_DONE])
        self._unmarked, self._saved = [], time.monotonic()

    def leave(self) -> None:
        """Save, and let the jobs of the other parts and the one that gathers go on."""
        self.save()
        self._close()

    def finish(self, out: Path, world: dist.World, *, is_kept: bool = False) -> None:
        """Move the arrays, when all processes have filled theirs, to another folder of the same disk.

        Jobs of an older set, of other parts, may be at it still: they are waited for, or they would write into what is
        finished.

        Args:
            out: where to.
            world: this process.
            is_kept: they stay here, too, under a second name, for a start after a kill; the caller removes the folder.

        Raises:
            ConfigError: if they do not leave.
        """
        self.save()
        self._close()
        dist.barrier()
        if world.is_first:
            with locked(self._folder / _DONE, f"filling {self._folder}", is_kept=True):
                assert 0 not in (self._folder / _DONE).read_bytes()
                for name in self._names:
                    (link if is_kept else os.replace)(self._folder / name, out / name)
                if not is_kept:
                    shutil.rmtree(self._folder)


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _make(folder: Path, shapes: Mapping[str, tuple[int, ...]], num_chunks: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        for name, shape in shapes.items():
            _allocate(folder / name, shape)
        (folder / _DONE).write_bytes(bytes(num_chunks))
    except OSError:
        shutil.rmtree(folder)
        raise


def _allocate(path: Path, shape: tuple[int, ...]) -> None:
    """An empty array on disk, with its room reserved: a disk too small is said at the start."""
    array = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
