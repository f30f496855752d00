"""Class names of a source: read from a text file, written as `classes.json`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from clipgraft.config import ConfigError
from clipgraft.local_files import local_files


def read_classes(file: str) -> list[str]:
    """Class names, one per line.

    Raises:
        ConfigError: if a line is empty, a name is repeated, or it is no UTF-8.
    """
    path = local_files(file)[0]
    try:
        text = path.read_text("utf-8-sig")  # editors of Windows put a mark before it
    except UnicodeDecodeError as error:
        raise ConfigError(f"classes {path} is not UTF-8: {error}. Hint: save it as UTF-8") from None
    names = [line.strip() for line in text.splitlines()]
    while names and not names[-1]:
        names.pop()
    repeated = [name for name, count in Counter(names).items() if count > 1 or not name]
    if not names or repeated:
        problem = (
            f"line {names.index(repeated[0]) + 1}, {repeated[0]!r}, is empty or repeated"
            if names
            else "it is empty"
        )
        raise ConfigError(
            f"classes {path}: {problem}. Hint: one class name per line; line 1 is class 0"
        )
    return names


def write_classes(names: Sequence[str], out: Path) -> None:
    """Write the names of the label `class`."""
    (out / "classes.json").write_text(json.dumps({"class": list(names)}, indent=1) + "\n")


def class_label(name: str) -> str:
    """The `labels` of an outcome."""
    return json.dumps({"class": name})
