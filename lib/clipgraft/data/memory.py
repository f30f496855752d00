"""Numbers that a loss remembers of every sample: one table per node, shared by its processes.

A memory map of a file without a name: it needs no more RAM than what is in use, and it is gone when its processes are,
however they end. The first process of a node writes, the others read. They take turns: all gather between reading and
writing, and nobody reads again before all have written. Hosts ask one another for that, since with GPUs each may be a step
ahead of what its device does.
"""

# Shapes: N dataset, B local batch, G global batch, C numbers per sample

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clipgraft import dist


class SampleMemory:
    """A float32 table [N, C], row = sample."""

    def __init__(self, num_samples: int, initial_C: Sequence[float]) -> None:
        """Make the table; all processes together.

        Args:
            num_samples: rows.
            initial_C: what every row begins with.
        """
        self._is_writer = dist.is_first_on_node()
        self._have_written = dist.ask_largest(lambda: 0)
        shape = (num_samples, len(initial_C))
        path = ""
        if self._is_writer:
            descriptor, path = tempfile.mkstemp(prefix="clipgraft-memory-")
            os.ftruncate(descriptor, 4 * num_samples * len(initial_C))
            os.close(descriptor)
        path = dist.same_on_node(path)
        self._table_NC = np.memmap(path, np.float32, "r+", shape=shape)
        if self._is_writer:
            self._table_NC[:] = np.asarray(initial_C, np.float32)
        dist.barrier()
        if self._is_writer:
            os.unlink(path)

    def read(self, rows_B: Tensor, device: torch.device) -> Tensor:
        """The numbers [B, C] of some samples; all processes together, once after each `write`."""
        self._have_written()
        return torch.from_numpy(self._table_NC[rows_B.numpy()]).to(device)

    def write(self, rows_B: Tensor, values_BC: Tensor) -> None:
        """Replace those of the global batch; all processes together, each with its own rows.

        Of a sample that is in the batch twice, the last row counts.
        """
        rows_G = dist.gather(rows_B.to(values_BC.device))
        values_GC = dist.gather(values_BC.float())
        if self._is_writer:
            self._table_NC[rows_G.cpu().numpy()] = values_GC.cpu().numpy()
        self._have_written = dist.ask_largest(lambda: 0)

    def state(self) -> Tensor:
        """A copy of the table, to be saved."""
        return torch.from_numpy(np.array(self._table_NC))

    def restore(self, table_NC: Tensor) -> None:
        """Take over a saved table; all processes together."""
        if self._is_writer:
            self._table_NC[:] = table_NC.numpy()
        dist.barrier()
