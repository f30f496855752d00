"""Locks: one process at a time. The kernel drops a lock when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from clipgraft.config import ConfigError

log = logging.getLogger(__name__)

# A job that was left alone by its Snakemake saves and leaves within this time; the next one waits for it.
WAIT_SECONDS = float(os.environ.get("CLIPGRAFT_WAIT_SECONDS", "300"))


def try_lock(path: Path) -> IO[str] | None:
    """Lock a file, made if need be, until what is returned is closed; None if another process holds it.

    Raises:
        ConfigError: if the file system has no locks.
    """
    while True:
        file = path.open("a")
        try:
            is_free = _is_free(file)
        except OSError as error:
            file.close()
            raise ConfigError(
                f"{path} cannot be locked: {error.strerror}. Hint: mount the file system with locks (Lustre: -o flock), or "
                "put results/ on another one"
            ) from None
        if not is_free:
            file.close()
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the process that held it has removed it


@contextmanager
def locked(
    path: Path,
    doing: str = "",
    *,
    patience: float | None = None,
    silence: float = 0.0,
    is_kept: bool = False,
) -> Iterator[None]:
    """Hold a lock file, which is removed afterwards.

    Args:
        path: in the folder that is written.
        doing: what another process is at that holds it.
        patience: how many seconds to wait for it; `WAIT_SECONDS` unless told.
        silence: so many seconds nothing is said of waiting.
        is_kept: the file holds something, and stays.

    Raises:
        ConfigError: if another process still holds it then.
    """
    doing = doing or f"writing {path.parent}"
    patience = WAIT_SECONDS if patience is None else patience
    begun, is_told = time.monotonic(), False
    while (file := try_lock(path)) is None:
        waited = time.monotonic() - begun
        if waited > patience:
            raise ConfigError(
                f"another process is {doing}. Hint: wait for it, or end it; two jobs must not share outputs"
            )
        if waited >= silence and not is_told:
            log.warning("another process is %s: waiting for it", doing)
            is_told = True
        time.sleep(0.2)
    try:
        yield
    finally:
        if not is_kept:
            path.unlink(missing_ok=True)
        file.close()


def be_present(folder: Path, temporary: Path) -> bool:
    """Say that a Snakemake is at work in a folder, until this process ends; clear up after those that were killed.

    Args:
        folder: its `.snakemake`.
        temporary: its own folder for temporary files.

    Returns:
        Whether no other is at work: what locks there are then were left by one that was killed. Only the word of this
        machine counts, since not all network file systems tell of locks on others.
    """
    try:
        folder.mkdir(exist_ok=True)
        file = (folder / "present").open("a+")
        file.seek(0)
        machine, *left = file.read().splitlines() or [socket.gethostname()]
        is_known = machine == socket.gethostname() or not any((folder / "locks").glob("*"))
        is_alone = _is_free(file) and is_known
        fcntl.flock(file, fcntl.LOCK_SH)
        if is_alone:
            for each in filter(_is_own_temporary, map(Path, left)):
                shutil.rmtree(each, ignore_errors=True)
            file.truncate(0)
            file.write(f"{socket.gethostname()}\n")
        file.write(f"{temporary}\n")
        file.flush()
    except OSError:  # not ours to write, or no locks here
        return False
    _present.append(file)
    return is_alone


_present: list[IO[str]] = []  # keeps the file open


def _is_own_temporary(folder: Path) -> bool:
    """The list may have come with the folder, from anyone: it must not have other things removed."""
    is_named = folder.parent == Path(tempfile.gettempdir()) and folder.name.startswith("snakemake")
    return is_named and folder.is_dir() and folder.lstat().st_uid == os.getuid()


def _is_free(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
