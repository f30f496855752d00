"""What processes of one machine tell one another through memory that they share.

On CPUs, gloo carries every number through the loopback network, in threads of its own: of a small model's training with a
process per core, that was a sixth of the step. Here a process copies what it has to say to memory that all of them map, tells
each of the others by a message through a pipe, and reads what they say once they have told it the same.

Neither has a name: all of it is gone with its processes, however they end. A process that ends closes its pipes, so that
nobody waits for it. For what is told in rows there are two buffers, taken in turn: who fills one again has heard from all
others about the next one, and they had read the first before they spoke of that.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from clipgraft.config import ConfigError

BUFFER = 2**23  # bytes that a process may say at once
_MESSAGE = struct.Struct("qq")  # which of all messages, a number
_ENDED = "another process of this training has ended; what it said last tells why"
_REFUSED = "refused: "
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
        self.rank, self.size = rank, size
        self._say, self._patience = say, patience
        self._num_told, self._num_filled = 0, 0
        self._heard: list[_Ear] = []
        self._tell: list[int] = []
        self._buffers = torch.empty(0)
        try:
            self._open_pipes()
            self._buffers = self.memory(2 * size * BUFFER).view(2, size, BUFFER)
        except OSError:
            self.close()
            raise

    def _open_pipes(self) -> None:
        others, written = [rank for rank in range(self.size) if rank != self.rank], dict[int, int]()

        def make() -> str:
            for other in others:
                read, written[other] = os.pipe()
                self._heard.append(_Ear(read))
            return " ".join(
                _path(written[rank]) if rank in written else "-" for rank in range(self.size)
            )

        def take() -> str:
            for other in others:
                self._tell.append(os.open(paths_R[other].split()[self.rank], os.O_WRONLY))
            return ""

        try:
            paths_R = self._together(make)
            self._together(take)
        finally:
            for end in written.values():
                os.close(end)

    def memory(self, num_bytes: int) -> Tensor:
        """Zeros [num_bytes], uint8, that all processes see; by all together.

        Raises:
            OSError: in all of them, if one may not do it; says why.
        """
        with ExitStack() as until_all_map_it:

            def make() -> str:
                if self.rank:
                    return ""
                end = os.memfd_create("clipgraft")
                until_all_map_it.callback(os.close, end)
                os.ftruncate(end, num_bytes)
                return _path(end)

            def take() -> str:
                with open(path, "r+b") as file:
                    maps.append(mmap.mmap(file.fileno(), num_bytes))
                return ""

            path, maps = self._together(make)[0], list[mmap.mmap]()
            try:
                self._together(take)
            except OSError:
                for each in maps:
                    each.close()
                raise
        return torch.frombuffer(maps[0], dtype=torch.uint8)

    def _together(self, do: Callable[[], str]) -> list[str]:
        """Let each process do its part, and tell all what comes of it; `OSError` in all if one may not."""
        try:
            result = do()
        except OSError as error:
            result = _REFUSED + str(error)
        results_R = self._say(result)
        for each in results_R:
            if each.startswith(_REFUSED):
                raise OSError(each.removeprefix(_REFUSED))
        return results_R

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

    def agree(self, number: int) -> None:
        """Wait until all others have told the same number.

        Raises:
            RuntimeError: if one told another.
        """
        if any(other != number for other in self.hear(self.tell(number))):
            raise RuntimeError("processes of one training say different things")

    def gather(self, local_BD: Tensor) -> Tensor:
        """Rows of all processes [R * B, ...], as many on each."""
        parts_RX = local_BD.new_empty((self.size, local_BD.numel()))
        for piece, said_RX in self._said(local_BD.flatten()):
            parts_RX[:, piece] = said_RX
        return parts_RX.view(-1, *local_BD.shape[1:])

    def total(self, own_X: Tensor) -> Tensor:
        """Sum over processes, in their order: the same bits for all."""
        total_X, *others = self.gather(own_X[None])
        for other_X in others:
            total_X += other_X
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
            said_RX[self.rank] = own_X[piece]
            self.agree(num)
            yield piece, said_RX


class SharedMean:
    """The mean over processes of a vector, of which each computes a share for all.

    Others read a process's vector only while all compute; before and after it belongs to that process alone.

    Attributes:
        vector_X: this process's, zeros at first; `compute` puts the mean in its place.
    """

    def __init__(self, exchange: Exchange, num: int, dtype: torch.dtype) -> None:
        """Of `num` elements; all processes together.

        Raises:
            OSError: in all of them, if one may not share so much memory.
        """
        self._exchange = exchange
        memory = exchange.memory((exchange.size + 1) * num * dtype.itemsize)
        vectors_VX = memory.view(dtype).view(exchange.size + 1, num)
        self.vector_X, self._mean_X = vectors_VX[exchange.rank], vectors_VX[-1]
        *self._own_RS, self._mean_S = vectors_VX.tensor_split(exchange.size, 1)[exchange.rank]

    def compute(self, number: int) -> None:
        """By all processes together, the sums in their order: the same bits for all.

        Args:
            number: which all must have in common.

        Raises:
            RuntimeError: if they do not.
        """
        self._exchange.agree(number)  # all have copied the mean before this one
        first_S, second_S, *others = self._own_RS
        torch.add(first_S, second_S, out=self._mean_S)
        for other_S in others:
            self._mean_S.add_(other_S)
        self._mean_S.div_(self._exchange.size)
        self._exchange.agree(number)  # all have read the vectors
        self.vector_X.copy_(self._mean_X)


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
