"""Headers that are read in a short way say what `tarfile` reads, whatever wrote them and however they are damaged."""

import io
import random
import tarfile

import pytest

from clipgraft.config import ConfigError
from clipgraft.data.tars import _Member, list_members

NAMES = ("0.jpg", "ä/ü.jpg", "a" * 99, "b" * 100, "c/" * 60 + "d.txt", "e" * 300, "blank .cls")


def written(path, tar_format, change=lambda member: None):
    """A tar of files, a folder and a link."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for number, name in enumerate(NAMES):
            if tar_format == tarfile.USTAR_FORMAT and len(name) > 256:
                continue
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uid = 700 * number, 1.7e9 + number, 1000
            change(member)
            tar.addfile(member, io.BytesIO(bytes(range(256)) * 20))
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.AREGTYPE):
            member = tarfile.TarInfo(f"of kind {kind!r}")
            member.type, member.linkname = kind, "0.jpg"
            tar.addfile(member)
    return path


def plain(path):
    with tarfile.open(path, "r:", errors="backslashreplace") as tar:
        return [
            (each.name, each.offset_data, each.size, each.isfile(), each.isdir(), each.issparse())
            for each in tar
        ]


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_members_are_those_of_tarfile(tmp_path, tar_format):
    path = written(tmp_path / "a.tar", tar_format)
    wanted = plain(path)
    with tarfile.open(path, "r:", errors="backslashreplace", tarinfo=_Member) as tar:
        found = [
            (each.name, each.offset_data, each.size, each.isfile(), each.isdir(), each.issparse())
            for each in tar
        ]
    assert found == wanted
    assert list_members(path) == [each[:3] for each in wanted if each[3]]


@pytest.mark.skipif(
    hasattr(tarfile.TarInfo, "_frombuf"), reason="this Python's tarfile does not ask `frombuf`"
)
def test_files_are_read_in_the_short_way(tmp_path, monkeypatch):
    path, long = written(tmp_path / "a.tar", tarfile.USTAR_FORMAT), []
    whole = tarfile.TarInfo.frombuf.__func__

    def counted(cls, buf, encoding, errors):
        long.append(bytes(buf[:5]))
        return whole(cls, buf, encoding, errors)

    monkeypatch.setattr(tarfile.TarInfo, "frombuf", classmethod(counted))
    list_members(path)
    # A name in two parts, what is no file, a file of the oldest kind, and the end.
    assert long == [b"c/c/c", b"of ki", b"of ki", b"of ki", bytes(5)]


def test_a_damaged_header_is_damaged(tmp_path):
    """Any changed byte of a header shows in its checksum, and in the short way as well."""
    path = written(tmp_path / "a.tar", tarfile.GNU_FORMAT)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(400):
        at = draw.randrange(tarfile.BLOCKSIZE)
        other = bytes([whole[at] ^ 1 << draw.randrange(8)])
        path.write_bytes(whole[:at] + other + whole[at + 1 :])
        try:
            wanted = [each[:3] for each in plain(path) if each[3]]
        except tarfile.ReadError:
            wanted = None
        if wanted is None:
            with pytest.raises(ConfigError):
                list_members(path)
        else:  # in the checksum's own end
            assert list_members(path) == wanted


def test_sizes_in_other_forms_are_read(tmp_path):
    """GNU's binary numbers, and octal ones that end in blanks."""
    path = written(tmp_path / "a.tar", tarfile.GNU_FORMAT)
    whole = bytearray(path.read_bytes())
    for size in (b"\x80" + (0).to_bytes(11, "big"), b"          0 ", b"0".ljust(12)):
        header = bytearray(whole[:512])
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        path.write_bytes(bytes(header) + bytes(whole[512:]))
        assert list_members(path) == [each[:3] for each in plain(path) if each[3]]
