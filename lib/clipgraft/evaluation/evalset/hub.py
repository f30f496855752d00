"""Tables of Hugging Face data sets, read where its library has cached them: Arrow or parquet, without that library.

An image is a cell `{bytes, path}`. Data sets that are made by a script keep paths alone, into the folder of extracted
downloads; where the cache was moved since, they are looked for at its new place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipgraft.config import ConfigError

_CACHE = "hf_cache"


def read_table(files: Sequence[Path], columns: Sequence[str]) -> pa.Table:
    """Rows of all files.

    Args:
        files: Arrow (stream or file) or parquet.
        columns: those that are wanted.

    Raises:
        ConfigError: if a file cannot be read, or lacks a column.
    """
    parts = []
    for path in files:
        try:
            part = pq.read_table(path) if path.suffix == ".parquet" else _read_arrow(path)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{path} cannot be read: {error}. Hint: download it again") from None
        absent = [column for column in columns if column not in part.column_names]
        if absent:
            raise ConfigError(
                f"{path} has no column {absent[0]!r}, only {', '.join(part.column_names)}. Hint: is it the data set "
                "that its folder is named after?"
            )
        parts.append(part.select(list(columns)))
    return pa.concat_tables(parts, promote_options="default")


def _read_arrow(path: Path) -> pa.Table:
    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()


def image_bytes(cell: Mapping[str, Any] | bytes | None, name: str, files: Sequence[Path]) -> bytes:
    """The bytes of an image cell.

    Args:
        cell: as it stands in the table.
        name: for the message.
        files: of the table, which say where the cache is.

    Raises:
        ConfigError: if it holds neither bytes nor the path of a file.
    """
    if isinstance(cell, bytes):
        return cell
    cell = cell or {}
    if cell.get("bytes"):
        return bytes(cell["bytes"])
    path = Path(cell.get("path") or "")
    for candidate in (path, *_moved(path, files)):
        if candidate.is_file():
            return candidate.read_bytes()
    raise ConfigError(
        f"{name}: neither bytes nor a file, path {str(path)!r}. Hint: keep hf_cache/downloads, or download the data set again"
    )


def _moved(path: Path, files: Sequence[Path]) -> list[Path]:
    """Where a file of the cache would be now."""
    if _CACHE not in files[0].parts or "downloads" not in path.parts:
        return []
    cache = Path(*files[0].parts[: files[0].parts.index(_CACHE) + 1])
    return [cache.joinpath(*path.parts[path.parts.index("downloads") :])]
