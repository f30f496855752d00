"""Features of images or of names of classes that several tasks of one model ask for: encoded by the first, read by the others.

A file is named by a hash of all that makes it: the files of the model, the code that this module reaches, the samples
and the kind of device; so none is ever out of date, and all may be thrown away at any time. Whoever comes while another
process is at it waits, by a lock that the kernel drops with its holder. The oldest files go when a folder gets too large.
"""

# Shapes: N images, D embedding

from __future__ import annotations

import hashlib
import json
import logging
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from clipgraft.aside import written_aside
from clipgraft.checkpoint import SPEC, TOKENIZERS, WEIGHTS
from clipgraft.lock import locked
from clipgraft.provenance import sha256
from clipgraft.versions import fingerprint

log = logging.getLogger(__name__)

LIMIT_BYTES = 2**31  # of a folder
SILENCE_SECONDS = 5.0  # after them it is said what is waited for
LARGEST = LIMIT_BYTES // 4  # of one file: what is larger is encoded by every task

Arrays = Mapping[str, np.ndarray]


def stored(path: Path, make: Callable[[], Arrays], what: str = "images") -> Arrays:
    """The arrays of a file if they are there and whole, else made and kept.

    Args:
        path: named by `key_of` what they are made of; its folder is made if need be.
        make: makes them.
        what: they are of, for people.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    doing = f"encoding the {what} of {path} for another task"
    with locked(path.with_suffix(".lock"), doing, patience=math.inf, silence=SILENCE_SECONDS):
        found = _read(path, what)
        if found is not None:
            log.info("%s were encoded before, for another task: %s", what, path)
            return found
        arrays = make()
        if sum(array.nbytes for array in arrays.values()) <= LARGEST:
            _keep(path, arrays)
    return arrays


def _keep(path: Path, arrays: Arrays) -> None:
    try:
        with written_aside(path) as aside, aside.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:  # what was asked for is in memory
        log.warning("%s is not kept for other tasks: %s", path, error)
        return
    _make_room(path)


def key_of(*parts: object) -> str:
    """A name for what is made of these."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def identity_of(folders: Sequence[Path], code: Path) -> str:
    """Hash of the files of models, an expert's with those of its base, and of the code that uses them.

    Args:
        folders: of the models.
        code: a module that reaches it.
    """
    digests = [fingerprint(code)]
    todo = [Path(folder).resolve() for folder in folders]
    while todo:
        folder = todo.pop(0)
        paths = [folder / name for name in (SPEC, WEIGHTS, *TOKENIZERS)]
        digests += [sha256(path) for path in paths if path.is_file()]
        base = json.loads((folder / SPEC).read_text()).get("base") if paths[0].is_file() else None
        todo += [(folder / base).resolve()] if base else []
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]


def _read(path: Path, what: str) -> Arrays | None:
    """What a file holds; its checksums are read with it."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged, %s are encoded again: %s", path, what, str(error)[:200])
        return None
    path.touch()  # the oldest go first
    return arrays


def _make_room(kept: Path) -> None:
    """Remove the oldest files until the others fit; whoever reads one of them goes on reading."""
    files = sorted(_with_age(kept.parent), key=lambda each: each[0])
    total = sum(size for _, size, _ in files)
    for _, size, path in files:
        if total > LIMIT_BYTES and path != kept:
            path.unlink(missing_ok=True)
            total -= size


def _with_age(folder: Path) -> Iterator[tuple[int, int, Path]]:
    for path in folder.glob("*.npz"):
        try:
            about = path.stat()
        except FileNotFoundError:  # another process makes room, too
            continue
        yield about.st_mtime_ns, about.st_size, path
