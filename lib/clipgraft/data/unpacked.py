"""Bounds on what packed files become: a few megabytes of gzip or parquet can stand for terabytes of one letter.

Text of the web packs to a third or a tenth of its size, and no table of ours to a two-hundredth.
"""

from __future__ import annotations

import io
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.compression import compr

from clipgraft.config import ConfigError

MOST_TIMES = 200
_LEAST = 8  # bytes of a row in memory
_ROWS = 4096  # that are unpacked before they are counted
FREE = 256 * 2**20  # bytes; what becomes no larger than this is no danger however it is packed


def check_growth(name: str, packed: int, unpacked: int) -> None:
    """Refuse what grows too much.

    Args:
        name: of the file, for the message.
        packed: its bytes.
        unpacked: bytes that it becomes, as far as is known.

    Raises:
        ConfigError: if it is a decompression bomb.
    """
    if unpacked > max(FREE, MOST_TIMES * packed):
        raise ConfigError(
            f"{name}: its {packed:,} bytes unpack to {unpacked:,} or more, as those of a decompression bomb do. "
            "Hint: if it is what you want, unpack it first"
        )


def open_parquet(file: BinaryIO, name: str) -> pq.ParquetFile:
    """A parquet file whose own account of its size is no danger, if it is believed.

    Raises:
        ConfigError: if it is a decompression bomb.
        ArrowException: if it is no parquet file.
    """
    table = pq.ParquetFile(file)
    about = table.metadata
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    size = file.seek(0, io.SEEK_END)
    check_growth(name, size, sum(group.total_byte_size for group in groups))
    check_growth(name, size, _LEAST * about.num_rows)  # equal ones take no room in the file
    return table


def read_parquet(file: BinaryIO, name: str) -> pa.Table:
    """All of a parquet file, counted as it unpacks: a bomb says of itself that it is small.

    Raises:
        ConfigError: if it is a decompression bomb.
        ArrowException: if it is no parquet file.
    """
    table = open_parquet(file, name)
    size, unpacked, batches = file.seek(0, io.SEEK_END), 0, []
    for group in range(table.num_row_groups):  # or one batch could be of all groups
        for batch in table.iter_batches(_ROWS, row_groups=[group]):
            unpacked += batch.nbytes
            check_growth(name, size, unpacked)
            batches.append(batch)
    return pa.Table.from_batches(batches, table.schema_arrow)


class Unpacked(io.RawIOBase):
    """What a decompressor gives, counted against what it has been given."""

    def __init__(self, packed: BinaryIO, kind: str, name: str) -> None:
        """Unpack a file.

        Args:
            packed: the file; closed with this one.
            kind: as fsspec calls it: gzip, bz2, xz, zstd.
            name: of the file, for the message.

        Raises:
            ImportError: if that kind needs a package that is not installed.
        """
        if kind not in (*compr, "zstd"):
            raise ImportError(f"{kind}: fsspec cannot unpack it here")
        self._packed, self._name, self._count = packed, name, 0
        if kind == "zstd":  # fsspec wants a package of its own for it, and Arrow is here anyway
            self._file = pa.CompressedInputStream(packed, kind)
        else:
            self._file = compr[kind](packed, mode="rb")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer.

        Raises:
            ConfigError: once it has become too much.
        """
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._count += len(data)
        check_growth(self._name, self._packed.tell(), self._count)
        return len(data)

    def close(self) -> None:
        """Close both files."""
        if not self.closed:
            self._file.close()
            self._packed.close()
        super().close()
