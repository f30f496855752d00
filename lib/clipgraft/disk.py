"""Trouble with a disk: full, read-only or of someone else, said in one message."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipgraft.config import ConfigError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_trouble(out: Path) -> Iterator[None]:
    """A disk that is full or may not be written to is for the user to mend."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if is_disk_full(error, out):
            raise ConfigError(_disk_full(error, out)) from error
        if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise ConfigError(
                f"{error.filename or out}: {error.strerror}. Hint: is the disk mounted read-only, or are the files "
                "someone else's?"
            ) from error
        raise


def is_of_the_disk(error: BaseException) -> bool:
    """Whether an error says of itself that a disk is full or read-only, and not what was read."""
    return isinstance(error, OSError) and error.errno in (*_FULL, errno.EROFS)


def is_disk_full(error: Exception, out: Path) -> bool:
    """Whether the disk of a folder is full. Not all libraries pass the error number on; then one without room is the cause."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    has_reason = isinstance(error, OSError) and error.errno is not None
    return not has_reason and ("No space left" in str(error) or _free_bytes(out) < 2**20)


def _disk_full(error: OSError | RuntimeError, out: Path) -> str:
    where = Path(getattr(error, "filename", None) or out)
    temporary = Path(tempfile.gettempdir()).resolve()
    is_temporary = where.resolve().is_relative_to(temporary)
    if is_temporary and not where.resolve().is_relative_to(out.resolve()):
        disk, hint = where, "set TMPDIR to a folder on a larger disk"
    else:
        disk = out
        hint = "free some room (`python -m clipgraft.runs unused` lists versions that no run uses)"
    return (
        f"{where}: no space left on device ({_free_bytes(disk) / 2**20:,.0f} MB free). No outputs of this job were kept. "
        f"Hint: {hint}, then run snakemake again"
    )


def _free_bytes(out: Path) -> int:
    there = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    return shutil.disk_usage(there).free
