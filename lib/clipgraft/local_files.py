"""Local files of the user: which ones a setting names, and what tells that they have changed."""

from __future__ import annotations

import hashlib
import os
import re
from functools import cache
from pathlib import Path

from clipgraft.config import ConfigError, local_path

_SMALL, _PLACE = 2**20, 2**14  # bytes


def spelled_out(pattern: str) -> list[str]:
    """The alternatives of each brace: `{a,b}`, and `{000..127}` with its zeros, up or down; `$NAME` from the environment.

    Raises:
        ConfigError: if a variable is not set.
    """
    expanded = os.path.expanduser(os.path.expandvars(pattern))
    if "$" in expanded:
        raise ConfigError(f"{pattern}: an environment variable in it is not set. Hint: export it")
    brace = re.search(r"\{([^{}]*)\}", expanded)
    if brace is None:
        return [expanded]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
    if span:
        first, last = int(span[1]), int(span[2])
        width = max(map(len, span.groups())) if re.match(r"0\d", span[1]) else 0
        step = 1 if first <= last else -1
        words = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    else:
        words = brace[1].split(",")
    whole = [expanded[: brace.start()] + word + expanded[brace.end() :] for word in words]
    return [each for one in whole for each in spelled_out(one)]


def local_files(pattern: str) -> list[Path]:
    """Files that a glob with braces matches, sorted; `$NAME` is read from the environment.

    Raises:
        ConfigError: if a variable is not set, or nothing matches.
    """
    files: set[Path] = set()
    for path in map(Path, spelled_out(pattern)):
        root, tail = (
            (Path(path.anchor), path.relative_to(path.anchor))
            if path.is_absolute()
            else (Path(), path)
        )
        found = {each for each in root.glob(str(tail)) if each.is_file()}
        if path.is_dir():
            raise ConfigError(
                f"{str(path)!r} is a folder, not a file. Hint: '{path}/*' for the files in it"
            )
        if not found:
            raise ConfigError(
                f"no file matches {str(path)!r} (looked in {path.parent.resolve()}). Hint: paths are relative "
                "to the folder in which snakemake runs"
            )
        files |= found
    return sorted(files)


@cache
def listing(name: str) -> str:
    """Names and sizes of all files of a folder, hashed; remembered, since runs share folders.

    Raises:
        ConfigError: if there is no such folder, or one in it cannot be read.
    """
    folder = local_path(name)
    if not folder.is_dir():
        raise ConfigError(
            f"folder {name!r} does not exist. Hint: paths are relative to {Path().resolve()}"
        )
    files = files_below(folder)
    listed = "\n".join(f"{path.relative_to(folder)}:{path.stat().st_size}" for path in files)
    return f"{len(files)} files, {hashlib.sha256(os.fsencode(listed)).hexdigest()[:8]}"


def files_below(folder: Path) -> list[Path]:
    """All files of a folder and its subfolders, sorted; links to folders are followed, and each folder is entered once.

    Folders come before links to them: a link to another place of the same tree adds nothing.

    Raises:
        ConfigError: if one of the folders cannot be read.
    """
    files: list[Path] = []
    entered: set[str] = set()
    starts = [str(folder)]  # and the links that are met
    try:
        for start in starts:
            for place, folders, names in os.walk(start, onerror=_raise):
                folders.sort()
                real = os.path.realpath(place)
                if real in entered:
                    folders.clear()
                    continue
                entered.add(real)
                starts += [
                    link for name in folders if os.path.islink(link := os.path.join(place, name))
                ]
                files += [path for name in names if (path := Path(place, name)).is_file()]
    except OSError as error:
        raise ConfigError(
            f"{error.filename!r} in the folder {str(folder)!r} cannot be read: {error.strerror}. Hint: see to its "
            "permissions (`ls -ld`), or move it elsewhere"
        ) from None
    return sorted(files)


def _raise(error: OSError) -> None:
    raise error


def identity(path: Path, places: int = 1) -> str:
    """Name and size of a file, and a hash: of all of a small one, else of its end and of evenly spaced places of it.

    Begin and end are two reads, as ten thousand tars on a network disk are looked at whenever a run is planned. They show
    when a tar was written, if its headers have times, and a parquet file's statistics, which stand at its end.
    """
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        if size < _SMALL:
            digest.update(file.read())
        else:
            for start in (*(size * number // places for number in range(places)), size - _PLACE):
                file.seek(start)
                digest.update(file.read(_PLACE))
    return f"{path.name}:{size}:{digest.hexdigest()[:8]}"


def sampled(path: Path) -> str:
    """`identity` of weights, whose header stays when a training moves all of them a little, or all but a locked tower."""
    return identity(path, places=64)
