"""WebDataset tars: where each member's bytes are, whether a tar is whole, and tars that come out byte for byte equal.

`tarfile` takes a tar that was cut for one that ends; `webdataset` then skips the rest or stops in the middle of
a run. Here a tar must end with the zero block that every writer puts there.

Nothing is ever unpacked to disk: members are read by their offset, so that a name with `..`, a link or a device leads
nowhere. A name is a key and no more.
"""

from __future__ import annotations

import io
import re
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from clipgraft.config import ConfigError
from clipgraft.data.images import SUFFIXES
from clipgraft.data.parallel import parallel_map

# Where the bytes of a sample's files are: extension -> (offset, length).
Members = dict[str, tuple[int, int]]

_BLOCK = 512
# A header's size, time, checksum and kind: a file. Its name is whole if there is nothing at 345.
_PLAIN = re.compile(rb"[0-7]{11}[\0 ].{12}[0-7]{6}\0 0", re.DOTALL)
# Bytes of one file that is read as a whole: pictures, and the texts and tables beside them.
_MAX_IMAGE, _MAX_TEXT = 512 * 2**20, 16 * 2**20
_TEXTS = ("txt", "json", "cls", "npy")


class _Member(tarfile.TarInfo):
    """A member whose header is read for its name and size alone, if it is as nearly all are: in half of the time."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """From a header; `tarfile` looks at those that are longer, damaged, or no file's."""
        is_plain = len(buf) == _BLOCK and _PLAIN.match(buf, 124) and buf[345:500] == bytes(155)
        if not is_plain or sum(buf) - sum(buf[148:156]) + 8 * ord(" ") != int(buf[148:154], 8):
            return super().frombuf(buf, encoding, errors)
        member = cls(buf[:100].partition(b"\0")[0].decode(encoding, errors))
        member.size = int(buf[124:135], 8)
        return member


def list_members(path: Path) -> list[tuple[str, int, int]]:
    """Name, offset and length of each file in a tar.

    Raises:
        ConfigError: if the tar is missing, empty, compressed, not a tar, or was cut.
    """
    members: list[tuple[str, int, int]] = []
    try:
        with tarfile.open(path, "r:", errors="backslashreplace", tarinfo=_Member) as tar:
            end = 0
            for member in tar:
                if tar.offset <= end or member.size < 0:  # it would be read again and again
                    raise tarfile.ReadError(f"the size of {member.name} leads back into the tar")
                end = tar.offset
                if member.issparse():
                    raise ConfigError(
                        f"tar {path}: {member.name} is stored with its zeros left out (sparse), so it has no place to "
                        "be read from. Hint: write the tar again without --sparse"
                    )
                if member.isfile():
                    members.append((member.name, member.offset_data, member.size))
            end = tar.offset
    except FileNotFoundError:
        raise ConfigError(f"tar {path} does not exist") from None
    except tarfile.ReadError as error:
        raise ConfigError(_explain(path, members, error)) from None
    with path.open("rb") as file:
        file.seek(end)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise ConfigError(_cut(path, members))
    if not members:
        raise ConfigError(f"tar {path} holds no files. Hint: leave it out, or write it again")
    return members


def list_samples(path: Path) -> list[tuple[str, Members]]:
    """Samples of a WebDataset tar, in its order: neighbours whose names agree up to the first dot.

    An extension that comes twice begins another sample of the same key. Hidden files belong to none: a Mac puts
    a `._0.jpg` before each `0.jpg`. webdataset passes over them, too, where they are in no folder.
    """
    samples: list[tuple[str, Members]] = []
    for name, offset, size in list_members(path):
        folder, _, base = name.rpartition("/")
        if base.startswith("."):
            continue
        stem, _, extension = base.partition(".")
        key = f"{folder}/{stem}".removeprefix("./").removeprefix("/")
        extension = sys.intern(extension.lower())  # one of a few, in memory once
        if not samples or samples[-1][0] != key or extension in samples[-1][1]:
            samples.append((key, {}))
        samples[-1][1][extension] = (offset, size)
    return samples


def too_large(members: Members) -> str:
    """Which file of a sample is larger than anything that belongs there; empty if none is."""
    for extension, (_, size) in members.items():
        most = _MAX_TEXT if extension in _TEXTS else _MAX_IMAGE
        if size > most and extension in (*_TEXTS, *SUFFIXES):  # nobody reads the others
            return f"its .{extension} has {size / 2**20:,.0f} MB, more than {most // 2**20}"
    return ""


def list_tars(paths: Sequence[Path], threads: int) -> Iterator[list[tuple[str, Members]]]:
    """Samples of each tar; a few tars are read sooner than processes start."""
    return parallel_map(list_samples, paths, threads if len(paths) > 16 else 1)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Write one file with no time and no owner.

    Returns:
        Offset of its bytes.
    """
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = len(data), 0o644, 0
    tar.addfile(member, io.BytesIO(data))
    return int(tar.offset) - -(-len(data) // _BLOCK) * _BLOCK


def read_range(path: Path, offset: int, size: int, checksum: int | None = None) -> bytes:
    """Bytes of a file that was looked through before.

    Args:
        path: the file.
        offset: of the first byte.
        size: how many.
        checksum: their CRC-32 then, if it is known.

    Raises:
        ConfigError: if the file is no longer there, no longer as long, or holds other bytes.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is gone: images are read from where they were when their data set was indexed. "
            "Hint: bring it back, or give its new place under `download`"
        ) from None
    if len(data) < size:
        raise ConfigError(
            f"{path} is shorter than it was when its data set was indexed: bytes {offset:,} to {offset + size:,} "
            "are wanted. Hint: has it been replaced? Then run its stage `download` again"
        )
    if checksum is not None and zlib.crc32(data) != checksum:
        raise ConfigError(
            f"{path} is not what it was when its data set was indexed: bytes {offset:,} to {offset + size:,} differ. "
            "Hint: has it been replaced or damaged? Then run its stage `download` again"
        )
    return data


def _explain(path: Path, members: list[tuple[str, int, int]], error: tarfile.ReadError) -> str:
    if path.stat().st_size == 0:
        return f"tar {path} is empty (0 bytes). Hint: download it again"
    with path.open("rb") as file:
        magic = file.read(6)
    if magic[:2] == b"\x1f\x8b" or magic == b"\xfd7zXZ\0" or magic[:4] == b"\x28\xb5\x2f\xfd":
        return f"tar {path} is compressed. Hint: decompress it; images are read from it by their offset"
    hint = "Hint: leave it out, or download it again"
    return _cut(path, members) if members else f"{path} is not a tar: {error}. {hint}"


def _cut(path: Path, members: list[tuple[str, int, int]]) -> str:
    last = "no member is whole"
    size = path.stat().st_size
    for name, offset, length in reversed(members):
        if offset + length <= size:
            last = f"the last whole member is {name}, which ends at byte {offset + length:,}"
            break
    return (
        f"tar {path} is not whole: it breaks off before its end ({size:,} bytes; {last}). "
        "Hint: download it again, or leave it out"
    )
