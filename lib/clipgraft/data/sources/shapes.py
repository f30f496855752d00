"""The built-in generator as a source: pictures are drawn as files, then fetched like any others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipgraft.aside import link
from clipgraft.data.fetch import Limits, fetch
from clipgraft.data.outcomes import Outcome
from clipgraft.data.parallel import Progress, parallel_map
from clipgraft.data.shapes import ATTRIBUTES, draw_sample
from clipgraft.sources import ShapesSource

_SEED = 0  # names the built-in data set
_JPEG_QUALITY = 95


def download_shapes(source: ShapesSource, out: Path, threads: int) -> list[Outcome]:
    """Draw and fetch all pictures; they are cheap, so nothing is kept for a restart."""
    drawn = out / ".drawn"
    drawn.mkdir()
    try:
        rows = _draw(source, drawn, threads)
        table = pa.table(
            {
                "row": list(range(len(rows))),
                "url": [row.pop("url") for row in rows],
                "caption": [row["caption"] for row in rows],
                "about": rows,
            }
        )
        limits = Limits(source.image_size, allow_private=True, allow_files=True)
        outcomes = fetch(table, drawn / "work", threads, limits)
        for path in (drawn / "work" / "finished").glob("*.tar"):
            link(path, out / path.name)
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


def _draw(source: ShapesSource, folder: Path, threads: int) -> list[dict[str, Any]]:
    """Draw all pictures as files; returns their `file://` URLs, captions and attributes."""
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
    return rows


def _draw_chunk(task: tuple[ShapesSource, range, Path]) -> list[dict[str, Any]]:
    source, numbers, folder = task
    rows = []
    for i in numbers:
        sample = draw_sample(
            _SEED,
            source.split,
            i,
            image_size=source.image_size,
            noise=source.noise,
            mention={str(name): share for name, share in source.mention.items()},
            num_captions=source.num_captions,
        )
        path = folder / f"{i:09d}.jpg"
        sample.image.save(path, quality=_JPEG_QUALITY, subsampling=0)
        row = {"url": path.absolute().as_uri(), "caption": sample.captions[0]}
        rows.append({**row, "captions": sample.captions, **sample.attributes})
    return rows
