"""Numbers that a loss remembers of every sample: one table per node, shared by its processes.

A memory map of a file without a name: it needs no more RAM than what is in use, and it is gone when its processes are,
however they end. The first process of a node writes, the others read. They take turns: all gather between reading and
writing, and nobody reads again before all have written. Hosts ask one another for that, since with GPUs each is ahead of
what its device does. So that no device runs dry, what is to be written is fetched once the rest of the step is queued.
"""

# Shapes: N dataset, B local batch, G global batch, C numbers per sample

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from clipgraft import devices, dist


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
        self._pending: tuple[Tensor, Callable[[], Tensor]] | None = None
        shape = (num_samples, len(initial_C))
        with ExitStack() as until_all_map_it:
            table_NC = self._mapped(until_all_map_it, shape, has_name=False)
            is_refused = dist.largest(int(table_NC is None), torch.device("cpu"))
            if is_refused:  # by a container: then the file has a name for a moment
                table_NC = self._mapped(until_all_map_it, shape, has_name=True)
            assert table_NC is not None
            self._table_NC = table_NC
            if self._is_writer:
                self._table_NC[:] = np.asarray(initial_C, np.float32)
            dist.barrier()

    def _mapped(
        self, until_all_map_it: ExitStack, shape: tuple[int, int], *, has_name: bool
    ) -> np.memmap | None:
        """The table, in the file that the first process of the node makes; None if it may not be opened without a name."""
        path = ""
        if self._is_writer:
            file = until_all_map_it.enter_context(
                tempfile.NamedTemporaryFile() if has_name else tempfile.TemporaryFile()
            )
            try:  # with its room reserved: a map of a file that finds none ends the process without a word
                os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
            except OSError as error:
                raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from None
            path = file.name if has_name else f"/proc/{os.getpid()}/fd/{file.fileno()}"
        path = dist.same_on_node(path)
        try:
            return np.memmap(path, np.float32, "r+", shape=shape)
        except OSError:
            if has_name:
                raise
            return None

    def read(self, rows_B: Tensor, device: torch.device) -> Tensor:
        """The numbers [B, C] of some samples; all processes together, once after each `write` that was settled."""
        assert self._pending is None
        self._have_written()
        return devices.send(torch.from_numpy(self._table_NC[rows_B.numpy()]), device)

    def write(self, rows_B: Tensor, values_BC: Tensor) -> None:
        """Replace those of the global batch once it is settled; all processes together, each with its own rows.

        Of a sample that is in the batch twice, the last row counts.

        Args:
            rows_B: on the host.
            values_BC: on the device of training.
        """
        rows_G = dist.gather(rows_B)
        self._pending = rows_G, devices.fetch_later(dist.gather(values_BC.float()))

    def settle(self) -> None:
        """Write what is pending; all processes together, when the rest of the step is queued."""
        assert self._pending is not None
        (rows_G, fetch), self._pending = self._pending, None
        values_GC = fetch()
        if self._is_writer:
            self._table_NC[rows_G.numpy()] = values_GC.numpy()
        self._have_written = dist.ask_largest(lambda: 0)

    def state(self) -> Tensor:
        """A copy of the table, to be saved."""
        return torch.from_numpy(np.array(self._table_NC))

    def restore(self, table_NC: Tensor) -> None:
        """Take over a saved table; all processes together."""
        if self._is_writer:
            self._table_NC[:] = table_NC.numpy()
        dist.barrier()
