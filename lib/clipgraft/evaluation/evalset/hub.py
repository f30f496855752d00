"""Tables of Hugging Face data sets, read where its library has cached them: Arrow or parquet, without that library.

An image is a cell `{bytes, path}`. Data sets that are made by a script keep paths alone, into the folder of extracted
downloads; where the cache was moved since, they are looked for at its new place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipgraft.config import ConfigError
from clipgraft.data.unpacked import read_parquet

_CACHE, _DOWNLOADS = "hf_cache", "downloads"


def read_table(files: Sequence[Path], columns: Sequence[str]) -> pa.Table:
    """Rows of all files.

    Args:
        files: Arrow (stream or file) or parquet.
        columns: those that are wanted.

    Raises:
        ConfigError: if a file cannot be read or lacks a column, or there are no rows.
    """
    parts = []
    for path in files:
        try:
            part = _read_parquet(path) if path.suffix == ".parquet" else _read_arrow(path)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{path} cannot be read: {error}. Hint: download it again") from None
        absent = [column for column in columns if column not in part.column_names]
        if absent:
            raise ConfigError(
                f"{path} has no column {absent[0]!r}, only {', '.join(part.column_names)}. Hint: is it the data set "
                "that its folder is named after?"
            )
        parts.append(part.select(list(columns)))
    if not any(map(len, parts)):
        raise ConfigError(f"{files[0]} has no rows. Hint: download the data set again")
    return pa.concat_tables(parts, promote_options="default")


def _read_parquet(path: Path) -> pa.Table:
    with path.open("rb") as file:
        return read_parquet(file, str(path))


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
    cache = _cache_of(files)
    own = [cache.resolve(), (cache / _DOWNLOADS).resolve()]  # this may be a link to another disk
    for candidate in (path, *_moved(path, cache)):
        # The table is another's: it must not name files of this machine that are not its own.
        if candidate.is_file() and any(map(candidate.resolve().is_relative_to, own)):
            return candidate.read_bytes()
    raise ConfigError(
        f"{name}: neither bytes nor a file in {cache}, path {str(path)!r}. Hint: keep hf_cache/downloads, or download "
        "the data set again"
    )


def _cache_of(files: Sequence[Path]) -> Path:
    """The folder that all files of a data set are in."""
    parts = files[0].absolute().parts
    return (
        Path(*parts[: parts.index(_CACHE) + 1]) if _CACHE in parts else files[0].absolute().parent
    )


def _moved(path: Path, cache: Path) -> list[Path]:
    """Where a file of the cache would be now."""
    if _DOWNLOADS not in path.parts:
        return []
    return [cache.joinpath(*path.parts[path.parts.index(_DOWNLOADS) :])]
