"""Outcomes: what became of each image that a source was asked for, one row each in `outcomes.parquet`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipgraft.config import ConfigError
from clipgraft.data.samples import read_columns
from clipgraft.data.utf8 import clean

OUTCOMES = "outcomes.parquet"
SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "file": pa.string(),
        "status": pa.string(),
        "message": pa.string(),
        "uid": pa.string(),
        "captions": pa.list_(pa.string()),
        "caption_kinds": pa.list_(pa.string()),
        "labels": pa.string(),
    }
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one requested image.

    Attributes:
        key: names the sample in its file.
        file: tar or image; relative names are inside the download folder.
        status: ok or failed.
        message: why it failed.
        uid: names the sample in the index; None means by its key.
        captions: its captions; None means that they stand beside the image, in the tar or as files.
        caption_kinds: of each caption; None goes with captions None.
        labels: JSON of label name -> class name; None means beside the image.
    """

    key: str
    file: str
    status: str
    message: str = ""
    uid: str | None = None
    captions: list[str] | None = None
    caption_kinds: list[str] | None = None
    labels: str | None = None


def write_outcomes(outcomes: Sequence[Outcome], path: Path, requested: str = "") -> None:
    """Write the table.

    Args:
        outcomes: one per requested image.
        path: the file.
        requested: hash of what was asked for, kept in the file's metadata.
    """
    columns = {name: [getattr(each, name) for each in outcomes] for name in SCHEMA.names}
    pq.write_table(pa.table(columns, schema=SCHEMA.with_metadata({"requested": requested})), path)


def requested_of(path: Path) -> str:
    """Hash of what a download of URLs was asked for; empty for other sources, and where there is none."""
    if not path.is_file():
        return ""
    return str((pq.read_schema(path).metadata or {}).get(b"requested", b"").decode())


def read_outcomes(path: Path) -> list[Outcome]:
    """Read what `write_outcomes` wrote."""
    batches = read_columns(path).to_batches()
    return [Outcome(**row) for batch in batches for row in batch.to_pylist()]


def failures(outcomes: Iterable[Outcome]) -> Counter[str]:
    """How many failed, by message."""
    return Counter(each.message for each in outcomes if each.status != "ok")


def collect_captions(
    row: Mapping[str, Any], columns: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Captions of a row and the kind of each, without empty ones.

    Args:
        row: column -> cell: text, a list of texts, or nothing.
        columns: caption kind -> column.

    Raises:
        ConfigError: if a cell holds something else.
    """
    captions, kinds = [], []
    for kind, column in columns.items():
        texts = texts_of(row.get(column), column)
        captions += texts
        kinds += [kind] * len(texts)
    return captions, kinds


def texts_of(cell: object, column: str) -> list[str]:
    """The texts of a cell without empty ones; a missing value may be written as NaN, and a number is its digits.

    Raises:
        ConfigError: if it is neither a text nor a list of texts.
    """
    texts = []
    for text in cell if isinstance(cell, list) else [cell]:
        if isinstance(text, bool | dict | list | tuple):
            raise ConfigError(
                f"{column!r} holds a {type(text).__name__} where a caption is wanted. Hint: a caption is a text, or one "
                "of a list of texts; give what holds them"
            )
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        if text is None or text != text or not str(text).strip():  # NaN alone differs from itself
            continue
        texts.append(clean(str(text)))
    return texts
