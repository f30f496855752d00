"""Download: images and captions as they came, and what became of each one that was asked for.

What is on this machine already is checked and left where it is; what is not comes here once.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from clipgraft.data.outcomes import OUTCOMES, Outcome, failures, write_outcomes
from clipgraft.data.sources.annotations import read_coco, read_sharegpt4v
from clipgraft.data.sources.folders import read_class_folder, read_folder
from clipgraft.data.sources.parquet import download_parquet
from clipgraft.data.sources.shapes import download_shapes
from clipgraft.data.sources.tars import download_tars
from clipgraft.data.sources.urls import download_urls
from clipgraft.sources import (
    ClassFolderSource,
    CocoSource,
    FolderSource,
    OneSource,
    ParquetSource,
    ShapesSource,
    ShareGpt4vSource,
    TarSource,
    UrlSource,
)

log = logging.getLogger(__name__)


def download(
    source: OneSource, out: Path, threads: int, work: Path | None = None
) -> dict[str, Any]:
    """Get all images of a source.

    Args:
        source: settings.
        out: existing, empty folder to write into.
        threads: worker processes.
        work: folder for what is fetched so far; a stopped download goes on with what is in it. None keeps
            nothing.

    Returns:
        Facts for the manifest: how many were asked for and had, and why others failed.

    Raises:
        ConfigError: if the source cannot be read, or too few images could be had.
    """
    if work is not None:
        return _download(source, out, threads, work)
    work = out / ".work"
    try:
        return _download(source, out, threads, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(source: OneSource, out: Path, threads: int, work: Path) -> dict[str, Any]:
    requested = ""
    outcomes: list[Outcome]
    match source:
        case ShapesSource():
            outcomes = download_shapes(source, out, threads)
        case UrlSource():
            outcomes, requested = download_urls(source, out, work, threads)
        case TarSource():
            outcomes = download_tars(source, out, work, threads)
        case FolderSource():
            outcomes = read_folder(source)
        case ClassFolderSource():
            outcomes = read_class_folder(source, out)
        case CocoSource():
            outcomes = read_coco(source)
        case ShareGpt4vSource():
            outcomes = read_sharegpt4v(source)
        case ParquetSource():
            outcomes = download_parquet(source, out, work, threads)
    write_outcomes(outcomes, out / OUTCOMES, requested)
    failed = failures(outcomes)
    num_ok = len(outcomes) - failed.total()
    log.info("%s of %s images are ok", f"{num_ok:,}", f"{len(outcomes):,}")
    for message, count in failed.most_common(5):
        log.info("failed %6s  %s", f"{count:,}", message)
    return {
        "num_requested": len(outcomes),
        "num_ok": num_ok,
        "failures": dict(failed.most_common(20)),
    }
