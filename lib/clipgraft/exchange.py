"""What processes of one machine tell one another through memory that they share.

On CPUs, gloo carries every number through the loopback network, in threads of its own: of a small model's training with a
process per core, that was a sixth of the step. Here a process copies what it has to say to memory that all of them map, tells
each of the others by a message through a pipe, and reads what they say once they have told it the same.

Neither has a name: all of it is gone with its processes, however they end. A process that ends closes its pipes, so that
nobody waits for it. There are two buffers, taken in turn: who fills one again has heard from all others about the next one,
and they had read the first before they spoke of that.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from clipgraft.config import ConfigError

BUFFER = 2**23  # bytes that a process may say at once
_MESSAGE = struct.Struct("qq")  # which of all messages, a number
_ENDED = "another process of this training has ended; what it said last tells why"
_SILENT = "another process of this training has said nothing"


class Exchange:
    """This process's end, among all of its machine."""

    def __init__(
        self, rank: int, size: int, say: Callable[[str], list[str]], patience: float
    ) -> None:
        """Map the memory and open the pipes; all processes together.

        Args:
            rank: of this process.
            size: number of processes.
            say: tells all processes a text, and returns what each of them has told.
            patience: seconds that another process may say nothing.

        Raises:
            OSError: in all of them, if one may not do it; says why.
        """
        self._rank, self._patience = rank, patience
        self._num_told, self._num_filled = 0, 0
        self._heard: list[_Ear] = []
        self._tell: list[int] = []
        self._buffers = torch.empty(0)
        shown: list[int] = []  # to be opened by others
        trouble = self._show(shown, size)
        paths_RR = [text.split() for text in say(" ".join(map(_path, shown)))]
        trouble = trouble or self._take(paths_RR)
        troubles = list(filter(None, say(trouble)))  # by now all have opened what they need
        for end in shown:
            os.close(end)
        if troubles:
            self.close()
            raise OSError(troubles[0])

    def _show(self, shown: list[int], size: int) -> str:
        """Make one end for each process, in `shown`: pipes, and in its own place memory. Returns what went wrong."""
        try:
            for other in range(size):
                if other == self._rank:
                    shown.append(os.memfd_create("clipgraft"))  # the first process's is used
                    os.ftruncate(shown[-1], 2 * size * BUFFER)
                else:
                    read, write = os.pipe()
                    shown.append(write)
                    self._heard.append(_Ear(read))
        except OSError as error:
            return str(error)
        return ""

    def _take(self, paths_RR: list[list[str]]) -> str:
        """Open what the others have made for this process. Returns what went wrong."""
        size = len(paths_RR)
        try:
            for other, paths in enumerate(paths_RR):
                if other != self._rank:
                    self._tell.append(os.open(paths[self._rank], os.O_WRONLY))
            with open(paths_RR[0][0], "r+b") as memory:
                mapped = mmap.mmap(memory.fileno(), 2 * size * BUFFER)
        except OSError as error:
            return str(error)
        except IndexError:  # one that could not make its ends says so itself
            return ""
        self._buffers = torch.frombuffer(mapped, dtype=torch.uint8).view(2, size, BUFFER)
        return ""

    def close(self) -> None:
        """Leave; who still waits for this process learns that it has ended."""
        for each in (*self._tell, *(ear.end for ear in self._heard)):
            os.close(each)
        del self._buffers  # unmapped when nobody reads from them

    def tell(self, number: int) -> int:
        """Tell all others a number, without waiting; by all processes in the same order.

        Returns:
            What `hear` asks for.
        """
        message, self._num_told = self._num_told, self._num_told + 1
        for end in self._tell:
            try:
                os.write(end, _MESSAGE.pack(message, number))
            except BrokenPipeError:
                raise ConfigError(_ENDED) from None
        return message

    def hear(self, message: int) -> list[int]:
        """The numbers that the others told with a message; waits for them.

        Raises:
            ConfigError: if one of them has ended.
            RuntimeError: if one says nothing.
        """
        numbers = []
        for ear in self._heard:
            while message not in ear.heard:
                if not ear.poll.poll(1000 * self._patience):
                    raise RuntimeError(f"{_SILENT} for {self._patience:g} s")
                told = os.read(ear.end, _MESSAGE.size)
                if not told:
                    raise ConfigError(_ENDED)
                which, number = _MESSAGE.unpack(told)
                ear.heard[which] = number
            numbers.append(ear.heard.pop(message))
        return numbers

    def gather(self, local_BD: Tensor) -> Tensor:
        """Rows of all processes [R * B, ...], as many on each."""
        parts_RX = local_BD.new_empty((self._buffers.shape[1], local_BD.numel()))
        for piece, said_RX in self._said(local_BD.flatten()):
            parts_RX[:, piece] = said_RX
        return parts_RX.view(-1, *local_BD.shape[1:])

    def total(self, own_X: Tensor) -> Tensor:
        """Sum over processes, in their order: the same bits for all."""
        total_X = torch.empty_like(own_X)
        for piece, said_RX in self._said(own_X):
            shares = said_RX.tensor_split(len(said_RX), 1)  # each process sums its own, for all
            share_RS = shares[self._rank]
            sum_S = share_RS[0] + share_RS[1]
            for other_S in share_RS[2:]:
                sum_S += other_S
            share_RS[self._rank] = sum_S
            self.hear(self.tell(len(own_X)))
            torch.cat([each_RS[rank] for rank, each_RS in enumerate(shares)], out=total_X[piece])
        return total_X

    def _said(self, own_X: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """What all say, piece by piece: where it belongs, and [R, X], to be read before the next one.

        Raises:
            RuntimeError: if they do not say as much.
        """
        at_once, num = BUFFER // own_X.element_size(), len(own_X)
        for start in range(0, num, at_once):
            piece = slice(start, min(start + at_once, num))
            said_RX = self._buffers[self._num_filled % 2].view(own_X.dtype)
            said_RX = said_RX[:, : piece.stop - start]
            self._num_filled += 1
            said_RX[self._rank] = own_X[piece]
            if any(other != num for other in self.hear(self.tell(num))):
                raise RuntimeError("processes of one training say different things")
            yield piece, said_RX


class _Ear:
    """A pipe that another process tells its messages through, and those that nobody has asked for yet."""

    def __init__(self, end: int) -> None:
        """Of the end that is read."""
        self.end, self.heard = end, dict[int, int]()
        self.poll = select.poll()
        self.poll.register(end, select.POLLIN)


def _path(end: int) -> str:
    """What another process of the machine opens it by."""
    return f"/proc/{os.getpid()}/fd/{end}"
