"""Tables of URLs: parquet, CSV, TSV and JSON lines, with or without header, plain or packed."""

from __future__ import annotations

import io
import json
import lzma
import re
import zlib
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.csv

from clipgraft.config import ConfigError
from clipgraft.data.outcomes import texts_of
from clipgraft.data.remote import expand, is_remote, open_file
from clipgraft.data.unpacked import read_parquet
from clipgraft.data.utf8 import clean, clean_bytes, clean_table, is_utf8
from clipgraft.sources import UrlSource

_PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}

# A cell that begins with a quote and is not quoted as a whole.
_OPEN_QUOTE = re.compile(rb'(?:^|\t)"(?!(?:[^"\t\r\n]|"")*"(?:[\t\r]|$))', re.MULTILINE)


def read_tables(source: UrlSource) -> tuple[pa.Table, list[str]]:
    """All rows of the user's tables, all columns.

    Returns:
        The rows, and those lines that are no rows, each with the reason.

    Raises:
        ConfigError: if a file cannot be read, lacks a column, or there are no rows.
    """
    parts: list[pa.Table] = []
    bad: list[str] = []
    for name in expand(source.table):
        table = _read_file(name, source, bad)
        _check_columns(name, table, source)
        parts.append(table)
    try:
        table = pa.concat_tables(parts, promote_options="permissive")
    except pa.ArrowException as error:
        raise ConfigError(f"the files of {source.table} do not go together: {error}") from None
    if not table.num_rows:
        reason = f"; {len(bad):,} lines are no rows, e.g. {bad[0]}" if bad else ""
        raise ConfigError(f"{source.table} has no rows{reason}. Hint: it needs one row per image")
    return table, bad


def _check_columns(name: str, table: pa.Table, source: UrlSource) -> None:
    if repeated := [column for column, times in Counter(table.column_names).items() if times > 1]:
        raise ConfigError(
            f"{name} has several columns {repeated[0]!r}. Hint: rename all but one, or give `columns`"
        )
    wanted = {"url_column": source.url_column, "uid_column": source.uid_column}
    wanted |= {f"captions.{kind}": column for kind, column in source.captions.items()}
    for setting, column in wanted.items():
        if column is None or column in table.column_names:
            continue
        there = ", ".join(table.column_names)
        if any(word.startswith(("http://", "https://")) for word in table.column_names):
            hint = (
                "its first line is data, so it has no header: name its columns with `columns: "
                "[caption, url]`"
            )
        else:
            hint = f"set {setting} to one of its columns: {there}"
        raise ConfigError(f"{name} has no column {column!r} ({setting}). Hint: {hint}")


def _read_file(name: str, source: UrlSource, bad: list[str]) -> pa.Table:
    path = PurePosixPath(urlsplit(name).path if is_remote(name) else name)
    suffix = path.suffix.lower()
    packing = _PACKED.get(suffix)
    kind = (path.with_suffix("").suffix if suffix in _PACKED else path.suffix)[1:].lower()
    readers = {"parquet", "csv", "tsv", "jsonl", "json", "ndjson"}
    if kind not in readers:
        raise ConfigError(
            f"{name}: a table is a .parquet, .csv, .tsv or .jsonl file (or .gz of one), not .{kind}. "
            "Hint: write it as one of those"
        )
    try:
        with open_file(name, packing) as file:
            if kind == "parquet":
                whole = io.BytesIO(file.read()) if packing else file  # it is read from its end
                return clean_table(read_parquet(whole, name))
            if kind in ("csv", "tsv"):
                return _read_lines(file, kind, source.columns, bad)
            return _read_json_lines(file, name, source, bad)
    except (
        pa.ArrowException,
        OSError,
        EOFError,
        UnicodeDecodeError,
        zlib.error,
        lzma.LZMAError,
    ) as error:
        raise ConfigError(
            f"{name} cannot be read as {kind}: {error}. Hint: check how it was written, or get it again"
        ) from None
    except Exception as error:  # of a connection that breaks each file system raises its own
        if not is_remote(name) or isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{name} cannot be read: {type(error).__name__}: {str(error)[:300]}. Hint: run snakemake again, or copy the "
            "table to this machine"
        ) from None


def _read_lines(file: BinaryIO, kind: str, columns: list[str] | None, bad: list[str]) -> pa.Table:
    """CSV or TSV; every cell is text: a caption of digits is no number.

    A TSV is taken as it stands, as in captions of the web a quote opens nothing, unless it has a header and quotes
    whole cells wherever one begins with a quote, as pandas does.
    """
    data = clean_bytes(file.read())

    def note(row: Any) -> str:
        bad.append(f"{row.actual_columns} columns, not {row.expected_columns}: {row.text[:60]!r}")
        return "skip"

    is_raw = kind == "tsv" and bool(columns or _OPEN_QUOTE.search(data))
    parse = partial(
        pa.csv.ParseOptions,
        delimiter="\t" if kind == "tsv" else ",",
        quote_char=False if is_raw else '"',
        newlines_in_values=not is_raw,
    )
    names = columns or _header(data, parse(invalid_row_handler=lambda _: "skip"))
    table = pa.csv.read_csv(
        pa.BufferReader(data),
        parse_options=parse(invalid_row_handler=note),
        read_options=pa.csv.ReadOptions(column_names=columns),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
        ),
    )
    if columns and table.num_rows and list(table.slice(0, 1).to_pylist()[0].values()) == columns:
        table = table.slice(1)  # it has a header after all
    return table


def _header(data: bytes, parse: pa.csv.ParseOptions) -> list[str]:
    if not data.strip():
        return []
    with pa.csv.open_csv(pa.BufferReader(data), parse_options=parse) as reader:
        return list(reader.schema.names)


def _read_json_lines(file: BinaryIO, name: str, source: UrlSource, bad: list[str]) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            # Written anew if it has surrogates that stand alone, which no table can hold.
            row = json.loads(clean_bytes(line), parse_constant=_no_number)
            row = (
                row
                if is_utf8(text := json.dumps(row, ensure_ascii=False))
                else json.loads(clean(text))
            )
        except (ValueError, RecursionError) as error:
            bad.append(f"line {number} is no JSON: {error}")
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad.append(f"line {number} is no JSON object: {line[:60]!r}")
    if bad and not rows:
        raise ConfigError(f"{name} has no rows: {bad[0]}. Hint: JSON lines are one object per line")
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    captions = source.captions.values()
    return pa.table(
        {
            column: _caption_column(cells, column) if column in captions else _column(cells)
            for column, cells in columns.items()
        }
    )


def _no_number(_: str) -> None:
    """NaN and infinity, which JSON does not have, stand for what is missing."""


def _caption_column(cells: list[Any], column: str) -> pa.Array:
    """Texts and lists of texts in one column are lists."""
    texts = [texts_of(cell, column) for cell in cells]
    with suppress(pa.ArrowException, OverflowError):
        return pa.array(cells)
    return pa.array(texts, pa.list_(pa.string()))


def _column(cells: list[Any]) -> pa.Array:
    """Cells of several types, and of types that no parquet file can hold, are JSON."""
    with suppress(pa.ArrowException, OverflowError):
        if _can_be_stored((array := pa.array(cells)).type):
            return array
    return pa.array(
        [cell if cell is None or isinstance(cell, str) else json.dumps(cell) for cell in cells],
        pa.string(),
    )


def _can_be_stored(kind: pa.DataType) -> bool:
    """Whether no object in it is without keys."""
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return bool(inner or not pa.types.is_struct(kind)) and all(map(_can_be_stored, inner))
