"""Feature rows, in memory or, if they are many, in a file: five million of 512 numbers are 10 GB.

Both are read the same way, some rows at a time: `rows[10:20]`, `rows[[3, 1]]`. Numbers are float32 in both, so that a
result does not depend on where they were. A file is read and not mapped: what a mapping has touched counts as resident.
"""

# Shapes: N rows, D embedding

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LARGE_BYTES = 2**29  # of features that go to a file
BLOCK = 8192  # images whose scores are held at a time


class FileRows:
    """Rows in a file, float32.

    Attributes:
        shape: N and D.
        device: where rows go when they are read.
    """

    def __init__(self, file: Path, num: int, dim: int, device: torch.device) -> None:
        """Name a file that holds them, or will."""
        self._file = file
        self.shape = (num, dim)
        self.device = device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor | np.ndarray | list[int]) -> Tensor:
        """Rows on the device."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            assert step == 1, rows
            count, dim = max(0, stop - start), self.shape[1]
            flat = np.fromfile(self._file, np.float32, count * dim, offset=4 * dim * start)
            found_BD = flat.reshape(count, dim)
        else:
            chosen = rows.cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
            found_BD = np.memmap(self._file, np.float32, "r", shape=self.shape)[chosen]
        return torch.from_numpy(np.asarray(found_BD)).to(self.device)


Rows = Tensor | FileRows


def spread(num: int, wanted: int) -> np.ndarray:
    """So many of `num` places, evenly from the first to the last, rising; all of them if there are no more."""
    return np.linspace(0, num - 1, min(wanted, num)).astype(np.int64)


def blocks_of(rows: Rows) -> Iterator[Tensor]:
    """Rows on their device, so many at a time that scores of them fit into memory."""
    return (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))


def collect(parts: Iterable[Tensor], num: int, file: Path) -> Rows:
    """Put parts end to end, on their device if they are small, else in a file.

    Args:
        parts: in order, at least one.
        num: how many rows they have together.
        file: to write if need be; the caller removes it.
    """
    parts = iter(parts)
    first = next(parts)
    dim = first.shape[1]
    if 4 * num * dim <= LARGE_BYTES:
        return torch.cat([first, *parts])
    with file.open("wb") as out:
        first.cpu().numpy().tofile(out)
        for part in parts:
            part.cpu().numpy().tofile(out)
    return FileRows(file, num, dim, first.device)
