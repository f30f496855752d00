"""Parquet files with image bytes inside as a source, as Hugging Face data sets ship them."""

from __future__ import annotations

import json
import logging
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipgraft.aside import link, written_aside
from clipgraft.config import ConfigError
from clipgraft.data.fetch import SHARD
from clipgraft.data.outcomes import (
    OUTCOMES,
    Outcome,
    collect_captions,
    read_outcomes,
    requested_of,
    write_outcomes,
)
from clipgraft.data.parallel import Progress, parallel_map
from clipgraft.data.remote import expand, identity_of, open_file
from clipgraft.data.sources.classes import class_label, read_classes, write_classes
from clipgraft.data.tars import add_member
from clipgraft.data.unpacked import open_parquet
from clipgraft.data.utf8 import clean_table
from clipgraft.sources import ParquetSource

log = logging.getLogger(__name__)

_ROWS = 256  # decoded at once
_MAGIC = {
    b"\xff\xd8": "jpg",
    b"\x89PNG": "png",
    b"RIFF": "webp",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
}


def download_parquet(source: ParquetSource, out: Path, work: Path, threads: int) -> list[Outcome]:
    """Unpack the images of all files into tars; a file that is finished is not read again while it stays as it is.

    Raises:
        ConfigError: if a file cannot be read or lacks a column, or class names are unknown.
    """
    files = expand(source.files)
    classes = _class_names(source, files)
    work.mkdir(parents=True, exist_ok=True)
    tasks = [(source, name, classes, number, work) for number, name in enumerate(files)]
    progress = Progress("unpacked", len(files), unit="files")
    outcomes: list[Outcome] = []
    for of_file in parallel_map(_unpack, tasks, min(threads, len(tasks))):
        outcomes += of_file
        progress.add(1, f"   {len(outcomes):,} images")
    progress.done(f"   {len(outcomes):,} images")
    for number in range(len(files)):  # of an earlier, longer list there may be more
        for path in sorted(_folder(work, number).glob("*.tar")):
            link(path, out / path.name)
    if source.label_column is not None:
        told = (json.loads(each.labels)["class"] for each in outcomes if each.labels)
        write_classes(classes or sorted(set(told)), out)
    return outcomes


def _class_names(source: ParquetSource, files: list[str]) -> list[str] | None:
    """From the settings or the metadata; None if labels are names already."""
    if source.label_column is None:
        return None
    if source.classes is not None:
        return read_classes(source.classes)
    with open_file(files[0]) as file:
        schema = _open(file, files[0]).schema_arrow
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = about.get("info", {}).get("features", {}).get(source.label_column, {})
    if isinstance(feature, dict) and feature.get("names"):
        return list(feature["names"])
    column = source.label_column
    if column not in schema.names:
        _raise_no_column(files[0], "label_column", column, schema.names)
    kind = schema.field(column).type
    if not pa.types.is_integer(kind) and not pa.types.is_floating(kind):
        return None
    raise ConfigError(
        f"{files[0]}: column {column!r} has class numbers, and the metadata no names. Hint: give "
        "`classes`, a text file with one class name per line"
    )


def _unpack(task: tuple[ParquetSource, str, list[str] | None, int, Path]) -> list[Outcome]:
    source, name, classes, number, work = task
    folder = _folder(work, number)
    marker, unpacked = folder / OUTCOMES, repr([name, identity_of(name), classes])
    if requested_of(marker) == unpacked:
        return read_outcomes(marker)
    shutil.rmtree(folder, ignore_errors=True)  # not finished, or of another file
    folder.mkdir()
    outcomes: list[Outcome] = []
    tar: tarfile.TarFile | None = None
    try:
        with open_file(name) as file:
            table = _open(file, name)
            columns = _columns(source, name, table.schema_arrow.names)
            _check_images(name, table.schema_arrow.field(source.image_column))
            row = 0
            for batch in table.iter_batches(_ROWS, columns=columns):
                for cells in clean_table(pa.Table.from_batches([batch])).to_pylist():
                    if row % SHARD == 0:
                        _close(tar)
                        tar = tarfile.open(folder / f"{number:05d}-{row // SHARD:04d}.tar", "w")
                    assert tar is not None
                    key = f"{number:05d}-{row:08d}"
                    outcomes.append(_add(source, name, classes, cells, key, tar))
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{name} cannot be read: {error}. Hint: download it again") from None
    finally:
        _close(tar)
    with written_aside(marker) as aside:
        write_outcomes(outcomes, aside, unpacked)
    return outcomes


def _folder(work: Path, number: int) -> Path:
    """What is unpacked of one file; its outcomes, written last, say of which."""
    return work / f"{number:05d}"


def _close(tar: tarfile.TarFile | None) -> None:
    if tar is None:
        return
    is_empty = not tar.getmembers()
    tar.close()
    if is_empty:
        Path(str(tar.name)).unlink()  # an empty tar is an error everywhere else


def _add(
    source: ParquetSource,
    name: str,
    classes: list[str] | None,
    cells: dict[str, Any],
    key: str,
    tar: tarfile.TarFile,
) -> Outcome:
    file = Path(str(tar.name)).name
    uid = None
    if source.uid_column is not None and cells[source.uid_column] is not None:
        uid = str(cells[source.uid_column])
    captions, kinds = collect_captions(cells, source.captions)
    data = cells[source.image_column]
    if isinstance(data, dict):
        data = data.get("bytes")
    if not data:
        return Outcome(key, file, "failed", "no image bytes in its row", uid, captions, kinds)
    labels = None
    if source.label_column is not None:
        label = cells[source.label_column]
        if isinstance(label, float) and label.is_integer():  # pandas, where one is missing
            label = int(label)
        if isinstance(label, int) and classes is not None and label >= len(classes):
            message = f"label {label}: there are {len(classes)} classes"
            return Outcome(key, file, "failed", message, uid, captions, kinds)
        if (of_class := _class_of(name, source.label_column, classes, label)) is not None:
            labels = class_label(of_class)
    suffix = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), "jpg")
    add_member(tar, f"{key}.{suffix}", data)
    return Outcome(key, file, "ok", "", uid, captions, kinds, labels)


def _class_of(name: str, column: str, classes: list[str] | None, label: Any) -> str | None:
    """The class that a number or a name stands for; None if it stands for none, as NaN and Hugging Face's -1."""
    if label is None or label != label:
        return None
    if classes is None:
        return str(label)
    if isinstance(label, int):
        return classes[label] if label >= 0 else None
    if label not in classes:
        raise ConfigError(
            f"{name}: column {column!r} has the label {label!r}, which is none of the {len(classes)} classes, "
            f"e.g. {classes[0]!r}. Hint: write it into `classes` as the column does"
        )
    return str(label)


def _check_images(name: str, column: pa.Field) -> None:
    kind = column.type
    if pa.types.is_struct(kind) and "bytes" in kind.names:
        kind = kind.field("bytes").type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    has_bytes = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
        pa.types.is_null,
    )
    if not any(is_kind(kind) for is_kind in has_bytes):
        raise ConfigError(
            f"{name}: column {column.name!r} is of type {column.type}, not the bytes of images. Hint: set image_column "
            "to a column of bytes, or of structs with `bytes`; paths and addresses of images are for other kinds of source"
        )


def _columns(source: ParquetSource, name: str, there: list[str]) -> list[str]:
    wanted = {
        "image_column": source.image_column,
        "label_column": source.label_column,
        "uid_column": source.uid_column,
        **{f"captions.{kind}": column for kind, column in source.captions.items()},
    }
    for setting, column in wanted.items():
        if column is not None and column not in there:
            _raise_no_column(name, setting, column, there)
    return list(dict.fromkeys(column for column in wanted.values() if column is not None))


def _raise_no_column(name: str, setting: str, column: str, there: list[str]) -> None:
    raise ConfigError(
        f"{name} has no column {column!r}. Hint: set {setting} to one of its columns: "
        f"{', '.join(there)}"
    )


def _open(file: Any, name: str) -> pq.ParquetFile:
    try:
        return open_parquet(file, name)
    except pa.ArrowException as error:
        raise ConfigError(f"{name} is no parquet file: {error}. Hint: download it again") from None
