"""Indexing beside img2dataset's own processing of an image: images per second on one core, same files.

img2dataset decodes, checks size and shape, shrinks and encodes again (`img2dataset.resizer.Resizer`, which it calls
for every image). `index` decodes, checks the same, hashes pixels and notes captions; it is measured as the stage, table
and tokens included. Shrinking is `shard`'s work and comes with the second row.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import cv2
from _common import arguments, faster, one_core, rates, report  # first: sets threads
from _photos import photo_bytes, write_photos
from img2dataset.resizer import Resizer

from clipgraft.data.download import download
from clipgraft.data.index import build_index
from clipgraft.data.shards import write_shards
from clipgraft.settings import IndexJob, ShardJob
from clipgraft.sources import TarSource

SIZE = 256


def img2datasets(photos: list[bytes]):
    """img2dataset's processing of photos that were fetched already, with its usual settings for training sets."""
    resizer = Resizer(
        SIZE, "keep_ratio", True, min_image_size=16, max_aspect_ratio=5, encode_quality=95
    )

    def work() -> int:
        for data in photos:
            error = resizer(io.BytesIO(data))[-1]
            assert error is None, error
        return len(photos)

    return work


def ours(folder: Path, num: int, with_shards: bool):
    """The stage `index`, and `shard` after it."""
    settings, numbers = IndexJob(tokenize=True, drop_duplicates=False), iter(range(1000))

    def work() -> int:
        out = folder / f"index-{with_shards}-{next(numbers)}"
        out.mkdir()
        build_index(settings, folder / "download", out, 1)
        if with_shards:
            (out / "shards").mkdir()
            write_shards(ShardJob(image_size=SIZE, oversize=1), out, out / "shards", 1)
        return num

    return work


def main() -> None:
    """Measure and report."""
    quick = arguments().quick
    one_core()
    cv2.setNumThreads(1)
    num, repeats = (256, 5) if quick else (2048, 7)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made_of = write_photos(folder / "photos", num)
        (folder / "download").mkdir()
        download(TarSource(kind="tars", tars=str(folder / "photos/*.tar")), folder / "download", 1)
        sides = {
            "img2dataset": img2datasets(photo_bytes(folder / "photos")),
            "index": ours(folder, num, with_shards=False),
            "both": ours(folder, num, with_shards=True),
        }
        measured = rates(sides, repeats)
    peer = measured["img2dataset"]
    unequal = (
        f"{made_of}; not the same work: the peer also shrinks each image and encodes it again, ours does neither. The "
        "next row does"
    )
    equal = "both sides shrink and encode; ours also hashes pixels, and writes the table, tokens and tars"
    report(
        "index",
        [
            faster("index", measured["index"], peer, "images/s", 1.0, unequal),
            faster(
                "index, then shard at the same size",
                measured["both"],
                peer,
                "images/s",
                None,
                equal,
            ),
        ],
    )


if __name__ == "__main__":
    main()
