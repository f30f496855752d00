"""Text from anywhere made writable: what is no UTF-8 becomes replacement characters, and nothing else is lost."""

from __future__ import annotations

import pyarrow as pa

_VIEWS = (
    (pa.types.is_string_view, pa.large_string()),
    (pa.types.is_binary_view, pa.large_binary()),
)


def is_utf8(text: str) -> bool:
    """Whether a text can be written; names of files and lone surrogates in JSON may not be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def clean(text: str) -> str:
    """The text with what cannot be written replaced."""
    return text.encode("utf-8", "replace").decode()


def clean_bytes(data: bytes) -> bytes:
    """The bytes as UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace").encode()
    return data


def clean_table(table: pa.Table) -> pa.Table:
    """The table with broken text in its string columns replaced; parquet files are read without a look at it."""
    for number, name in enumerate(table.column_names):
        column = table.column(number)
        for is_view, kind in _VIEWS:  # pyarrow can take no rows of them
            if is_view(column.type):
                column = column.cast(kind)
                table = table.set_column(number, name, column)
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            continue
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            raw = column.cast(pa.large_binary()).to_pylist()
            texts = [None if cell is None else cell.decode("utf-8", "replace") for cell in raw]
            table = table.set_column(number, name, pa.array(texts, column.type))
    return table
