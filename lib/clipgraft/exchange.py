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
import struct
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BUFFER = 2**23  # bytes that a process may say at once
_MESSAGE = struct.Struct("qq")  # which of all messages, a number
_ENDED = "another process of this training has ended"


class Exchange:
    """This process's end, among all of its machine."""

    def __init__(self, rank: int, size: int, say: Callable[[str], list[str]]) -> None:
        """Map the memory and open the pipes; all processes together.

        Args:
            rank: of this process.
            size: number of processes.
            say: tells all processes a text, and returns what each of them has told.
        """
        self._rank, self._num_told, self._num_filled = rank, 0, 0
        others = [other for other in range(size) if other != rank]
        own = {other: os.pipe() for other in others}  # read end, write end
        memory = os.memfd_create("clipgraft")  # the first process's is used
        os.ftruncate(memory, 2 * size * BUFFER)
        ends = [own[other][1] if other in own else memory for other in range(size)]
        paths = [text.split() for text in say(" ".join(map(_path, ends)))]
        self._heard = [(read, dict[int, int]()) for read, _ in own.values()]
        self._tell = [os.open(paths[other][rank], os.O_WRONLY) for other in others]
        shared = os.open(paths[0][0], os.O_RDWR)
        bytes_X = torch.frombuffer(mmap.mmap(shared, 2 * size * BUFFER), dtype=torch.uint8)
        self._buffers = bytes_X.view(2, size, BUFFER)
        say("")  # all have opened what they need
        for end in (memory, shared, *(write for _, write in own.values())):
            os.close(end)

    def close(self) -> None:
        """Leave; who still waits for this process learns that it has ended."""
        for each in (*self._tell, *(read for read, _ in self._heard)):
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
                raise RuntimeError(_ENDED) from None
        return message

    def hear(self, message: int) -> list[int]:
        """The numbers that the others told with a message; waits for them.

        Raises:
            RuntimeError: if one of them has ended.
        """
        numbers = []
        for end, heard in self._heard:
            while message not in heard:
                told = os.read(end, _MESSAGE.size)
                if not told:
                    raise RuntimeError(_ENDED)
                which, number = _MESSAGE.unpack(told)
                heard[which] = number
            numbers.append(heard.pop(message))
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


def _path(end: int) -> str:
    """What another process of the machine opens it by."""
    return f"/proc/{os.getpid()}/fd/{end}"
