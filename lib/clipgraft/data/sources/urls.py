"""Tables of image URLs as a source: rows are checked, fetched, and each is told what became of it."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa

from clipgraft.aside import link
from clipgraft.config import ConfigError
from clipgraft.data.fetch import Limits, fetch, key_of, lay_aside
from clipgraft.data.outcomes import (
    OUTCOMES,
    Outcome,
    collect_captions,
    failures,
    requested_of,
)
from clipgraft.data.sources.tables import read_tables
from clipgraft.sources import UrlSource

log = logging.getLogger(__name__)


def download_urls(
    source: UrlSource, out: Path, work: Path, threads: int
) -> tuple[list[Outcome], str]:
    """Fetch all images of a table.

    Args:
        source: settings.
        out: where tars appear.
        work: keeps what is finished until the job is done; in it, a folder per table.
        threads: processes.

    Returns:
        One outcome per row, and a hash of what was asked for.

    Raises:
        ConfigError: if the table cannot be read, or too few images could be had.
    """
    table, bad = read_tables(source)
    urls = [_text(url) for url in table[source.url_column].to_pylist()]
    captions = [collect_captions(row, source.captions) for row in _rows(table, source)]
    schemes = {"http", "https", "file"} if source.allow_local_files else {"http", "https"}
    refusals = {row: why for row, url in enumerate(urls) if (why := _refusal(url, schemes))}
    refused = [Outcome(key_of(row), "", "failed", why) for row, why in refusals.items()]
    refused += [
        Outcome(key_of(len(urls) + i), "", "failed", f"no row of the table: {why}")
        for i, why in enumerate(bad)
    ]
    if refused:
        log.warning(
            "%s of %s rows are refused, e.g. %s",
            f"{len(refused):,}",
            f"{len(urls) + len(bad):,}",
            refused[0].message,
        )
    asked = pa.table(
        {
            "row": pa.array(range(len(urls)), pa.int64()),
            "url": pa.array(urls, pa.string()),
            "caption": pa.array([next(iter(texts), None) for texts, _ in captions], pa.string()),
            "about": table.to_struct_array(),
        }
    ).filter(pa.array([row not in refusals for row in range(len(urls))]))
    requested = _name_of(asked, source.image_size)
    folder = _folder(work, requested)
    if not folder.is_dir() and requested_of(work.parent / OUTCOMES) == requested:
        log.warning(
            "%s has images of this table already: they are kept, what failed is fetched again. Hint: to fetch all, delete it",
            work.parent,
        )
        lay_aside(work.parent, folder)
    limits = Limits(
        source.image_size,
        source.timeout_seconds,
        source.retries,
        source.allow_private_addresses,
        source.allow_local_files,
    )
    fetched = fetch(asked, folder, threads, limits) if asked.num_rows else []
    outcomes = sorted(refused + fetched, key=lambda each: each.key)
    _check_success(outcomes, source)
    for path in sorted((folder / "finished").glob("*.tar")):
        link(path, out / path.name)
    uids = table[source.uid_column].to_pylist() if source.uid_column else [None] * len(urls)
    return [
        replace(each, uid=_text(uid), captions=texts, caption_kinds=kinds)
        for each, uid, (texts, kinds) in zip(outcomes, uids, captions, strict=False)
    ] + outcomes[len(urls) :], requested


def _rows(table: pa.Table, source: UrlSource) -> list[dict[str, object]]:
    return list(table.select(list(dict.fromkeys(source.captions.values()))).to_pylist())


def _text(value: object) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    text = "" if value is None else str(value).strip()
    return text or None


def _name_of(asked: pa.Table, image_size: int) -> str:
    """16 hex digits that name what is asked for, so that work on another table is never gone on with.

    They are of the values: the bytes of a parquet file change with the version of pyarrow.
    """
    digest = hashlib.sha256(str(image_size).encode())
    for batch in asked.to_batches(max_chunksize=2**14):
        for row in batch.to_pylist():
            digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()[:16]


def _folder(work: Path, requested: str) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    for other in work.iterdir():
        if other.name != requested:
            log.warning("the table has changed since: what was fetched for the old one is dropped")
            shutil.rmtree(other)
    return work / requested


def _refusal(url: str | None, schemes: set[str]) -> str | None:
    """Why a URL is not even tried; None if it is."""
    if not url:
        return "no URL"
    try:
        scheme = urlsplit(url).scheme.lower()
    except ValueError as error:
        return f"not a URL: {error}"
    if scheme in schemes:
        return None
    if scheme == "file":
        return "file:// URLs are refused (allow_local_files: true lets them read local files)"
    if scheme:
        return f"{scheme}: URLs are refused"
    return "not a URL: it has no http:// or https:// (for files of this machine: kind: folder, or file://)"


def _check_success(outcomes: list[Outcome], source: UrlSource) -> None:
    failed = failures(outcomes)
    num_ok = len(outcomes) - failed.total()
    if num_ok >= source.min_success * len(outcomes):
        return
    reasons = "; ".join(f"{count:,} x {message}" for message, count in failed.most_common(5))
    raise ConfigError(
        f"only {num_ok:,} of {len(outcomes):,} images of {source.table} could be had, fewer than "
        f"min_success = {source.min_success:g}. Most frequent: {reasons}. "
        "Hint: check the network and the table, then run it again, which fetches only what failed; "
        "or lower min_success"
    )
