"""Download: images and captions as they came, and what became of each one that was asked for.

A source is one of four kinds. The built-in generator and tables of URLs go through img2dataset
(`fetch.py`); tars and folders are on this machine already: they are checked and left where they are.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from clipgraft.config import ConfigError
from clipgraft.data.fetch import Outcome, fetch, key_of
from clipgraft.data.images import SUFFIXES
from clipgraft.data.parallel import Progress, parallel_map
from clipgraft.data.shapes import ATTRIBUTES, draw_sample
from clipgraft.data.tars import list_tars
from clipgraft.settings import FolderSource, ShapesSource, Source, TarSource, UrlSource
from clipgraft.versions import local_files

log = logging.getLogger(__name__)

_SHAPES_SEED = 0  # names the built-in data set
_JPEG_QUALITY = 95


def download(source: Source, out: Path, threads: int) -> dict[str, Any]:
    """Get all images of a source.

    Args:
        source: settings.
        out: existing, empty folder to write into.
        threads: worker processes.

    Returns:
        Facts for the manifest: how many were asked for and had, and why others failed.

    Raises:
        ConfigError: if the source cannot be read, or too few images could be had.
    """
    match source:
        case ShapesSource():
            outcomes = _download_shapes(source, out, threads)
        case UrlSource():
            outcomes = _download_urls(source, out, threads)
        case TarSource():
            outcomes = _read_tars(source, out, threads)
        case FolderSource():
            outcomes = _read_folder(source)
    columns = {
        name: [getattr(each, name) for each in outcomes]
        for name in ("key", "file", "status", "message")
    }
    pq.write_table(pa.table(columns), out / "outcomes.parquet")
    failures = Counter(each.message for each in outcomes if each.status != "ok")
    num_ok = len(outcomes) - failures.total()
    log.info("%s of %s images are ok", f"{num_ok:,}", f"{len(outcomes):,}")
    for message, count in failures.most_common(5):
        log.info("failed %6s  %s", f"{count:,}", message)
    return {
        "num_requested": len(outcomes),
        "num_ok": num_ok,
        "failures": dict(failures.most_common(20)),
    }


# --- the built-in generator -----------------------------------------------------------------------------------


def _download_shapes(source: ShapesSource, out: Path, threads: int) -> list[Outcome]:
    drawn = out / ".drawn"
    drawn.mkdir()
    try:
        table = _draw(source, drawn, threads)
        outcomes = fetch(
            table, out, threads, short_side=source.image_size, timeout_seconds=60, retries=0
        )
    finally:
        shutil.rmtree(drawn, ignore_errors=True)
    failed = [each for each in outcomes if each.status != "ok"]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(outcomes)} drawn pictures were lost: {failed[0].message}"
        )
    class_names = {name: list(values) for name, values in ATTRIBUTES.items()}
    (out / "classes.json").write_text(json.dumps(class_names, indent=1) + "\n")
    return outcomes


def _draw(source: ShapesSource, folder: Path, threads: int) -> pa.Table:
    """Draw all pictures as files; returns a table of their `file://` URLs, captions and attributes."""
    chunks = [
        range(first, min(first + 100, source.num_samples))
        for first in range(0, source.num_samples, 100)
    ]
    progress = Progress("drew", source.num_samples)
    rows: list[dict[str, Any]] = []
    for drawn in parallel_map(_draw_chunk, ((source, chunk, folder) for chunk in chunks), threads):
        rows += drawn
        progress.add(len(drawn))
    progress.done()
    return pa.Table.from_pylist(rows)


def _draw_chunk(task: tuple[ShapesSource, range, Path]) -> list[dict[str, Any]]:
    source, numbers, folder = task
    rows = []
    for i in numbers:
        sample = draw_sample(
            _SHAPES_SEED,
            source.split,
            i,
            image_size=source.image_size,
            noise=source.noise,
            mention=source.mention,
            num_captions=source.num_captions,
        )
        path = folder / f"{i:09d}.jpg"
        sample.image.save(path, quality=_JPEG_QUALITY, subsampling=0)
        row = {"row": i, "url": path.absolute().as_uri(), "caption": sample.captions[0]}
        rows.append({**row, "captions": sample.captions, **sample.attributes})
    return rows


# --- a table of URLs ------------------------------------------------------------------------------------------


def _download_urls(source: UrlSource, out: Path, threads: int) -> list[Outcome]:
    table = _read_table(source)
    schemes = {"http", "https", "file"} if source.allow_local_files else {"http", "https"}
    refusals = [_refusal(url, schemes) for url in table["url"].to_pylist()]
    refused = [
        Outcome(key_of(row), "", "failed", why)
        for row, why in enumerate(refusals)
        if why is not None
    ]
    if refused:
        log.warning(
            "%s of %s URLs are refused, e.g. %s",
            f"{len(refused):,}",
            f"{len(table):,}",
            refused[0].message,
        )
    wanted = table.filter(pa.array([why is None for why in refusals]))
    fetched = fetch(
        wanted,
        out,
        threads,
        short_side=source.image_size,
        timeout_seconds=source.timeout_seconds,
        retries=source.retries,
    )
    outcomes = sorted(refused + fetched, key=lambda each: each.key)
    _check_success(outcomes, source)
    return outcomes


def _read_table(source: UrlSource) -> pa.Table:
    """The columns row, url, caption of the user's table.

    Raises:
        ConfigError: if a file cannot be read, lacks a column or has no row.
    """
    parts = []
    for path in local_files(source.table):
        table = _read_file(path)
        for setting in ("url_column", "caption_column"):
            column = getattr(source, setting)
            if column not in table.column_names:
                raise ConfigError(
                    f"{path} has no column {column!r}. Hint: set {setting} to one of its columns: "
                    f"{', '.join(table.column_names)}; CSV and TSV need a header line"
                )
        columns = [
            pc.cast(table[name], pa.string()) for name in (source.url_column, source.caption_column)
        ]
        parts.append(pa.table(columns, names=["url", "caption"]))
    table = pa.concat_tables(parts)
    if not table.num_rows:
        raise ConfigError(f"{source.table} has no rows. Hint: it needs one row per image")
    return table.add_column(0, "row", pa.array(range(table.num_rows), pa.int64()))


def _read_file(path: Path) -> pa.Table:
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind not in ("parquet", "csv", "tsv"):
        raise ConfigError(
            f"{path}: a table is a .parquet, .csv or .tsv file (or .csv.gz, .tsv.gz), not .{kind}"
        )
    try:
        if kind == "parquet":
            return pq.read_table(path)
        delimiter = "\t" if kind == "tsv" else ","
        options = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        return pa.csv.read_csv(path, parse_options=options)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path} cannot be read as {kind}: {error}") from None


def _refusal(url: str | None, schemes: set[str]) -> str | None:
    """Why a URL is not even tried; None if it is."""
    if not url or not url.strip():
        return "no URL"
    try:
        scheme = urlsplit(url.strip()).scheme.lower()
    except ValueError as error:
        return f"not a URL: {error}"
    if scheme in schemes:
        return None
    if scheme == "file":
        return "file:// URLs are refused (allow_local_files: true lets them read local files)"
    return f"{scheme}: URLs are refused" if scheme else "not a URL: it has no http:// or https://"


def _check_success(outcomes: list[Outcome], source: UrlSource) -> None:
    failures = Counter(each.message for each in outcomes if each.status != "ok")
    num_ok = len(outcomes) - failures.total()
    if num_ok >= source.min_success * len(outcomes):
        return
    reasons = "; ".join(f"{count:,} x {message}" for message, count in failures.most_common(5))
    raise ConfigError(
        f"only {num_ok:,} of {len(outcomes):,} images of {source.table} could be had, fewer than "
        f"min_success = {source.min_success:g}. Most frequent: {reasons}. "
        "Hint: check the network and the table, or lower min_success"
    )


# --- what is on this machine already ----------------------------------------------------------------------------


def _read_tars(source: TarSource, out: Path, threads: int) -> list[Outcome]:
    """Check that the user's tars are whole; they stay where they are."""
    paths = [path.absolute() for path in local_files(source.tars)]
    if source.classes is not None:
        names = _read_classes(source.classes)
        (out / "classes.json").write_text(json.dumps({"class": names}, indent=1) + "\n")
    outcomes = []
    for path, samples in zip(paths, list_tars(paths, threads), strict=True):
        outcomes += [
            Outcome(key, str(path), "ok") for key in dict.fromkeys(key for key, _ in samples)
        ]
    log.info("%s tars, all whole", f"{len(paths):,}")
    return outcomes


def _read_classes(file: str) -> list[str]:
    path = local_files(file)[0]
    names = [line.strip() for line in path.read_text("utf-8").splitlines()]
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


def _read_folder(source: FolderSource) -> list[Outcome]:
    """Find the images of a folder and its subfolders, and whether each has a caption beside it."""
    folder = Path(os.path.expanduser(os.path.expandvars(source.folder))).absolute()
    if not folder.is_dir():
        raise ConfigError(f"folder {folder} does not exist")
    paths = sorted(
        path for path in folder.rglob("*") if path.suffix[1:].lower() in SUFFIXES and path.is_file()
    )
    if not paths:
        raise ConfigError(
            f"folder {folder} holds no images. Hint: image files are {', '.join(SUFFIXES)}"
        )
    outcomes, keys = [], set()
    for path in paths:
        key = path.relative_to(folder).with_suffix("").as_posix()
        message = ""
        if not path.with_suffix(".txt").is_file():
            message = "no caption: there is no .txt of the same name"
        elif key in keys:
            message = "another image has the same name, and so the same caption file"
        keys.add(key)
        outcomes.append(Outcome(key, str(path), "failed" if message else "ok", message))
    return outcomes
