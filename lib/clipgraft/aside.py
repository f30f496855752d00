"""Written aside: a file is there whole or not at all, whenever the process that writes it is killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_aside(path: Path, *, is_shared: bool = False) -> Iterator[Path]:
    """A name to write to; on leaving without error what was written takes the place of `path`, else it goes.

    Args:
        path: where it is to be.
        is_shared: other processes may be writing it, too; otherwise what a kill has left is written over.
    """
    aside = path.with_name(f".{path.name}.{os.getpid() if is_shared else ''}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def link(source: Path, target: Path) -> None:
    """Give a file a second name; where the file system cannot, copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, which survives a power cut, too."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=1) + "\n")
        sync(aside)


def sync(path: Path) -> None:
    """Wait until a file, or the list of those in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
