"""Shards: the training images once more, at the size that a phase needs, in row order.

Plain WebDataset tars that `tar` and `webdataset` read, plus an offset index: a row is found without reading the
rows before it. A large picture is decoded and shrunk once here instead of once per epoch; a JPEG that is small
enough keeps its bytes. Tars are byte for byte reproducible.
"""

from __future__ import annotations

import json
import logging
import mmap
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipgraft.config import ConfigError
from clipgraft.data.images import shrink
from clipgraft.data.parallel import Progress, parallel_map
from clipgraft.data.samples import Samples
from clipgraft.data.tars import add_member, read_range
from clipgraft.settings import ShardJob

log = logging.getLogger(__name__)

_CHUNK = 128  # images per task


class Shards:
    """JPEG bytes by row, memory-mapped.

    Attributes:
        samples_id: of the index the shards were made from.
        short_side: stored images are at most this large, in pixels.
    """

    def __init__(self, folder: Path) -> None:
        """Map the tars of a shard folder."""
        about = json.loads((folder / "shard.json").read_text())
        self.samples_id: str = about["samples_id"]
        self.short_side: int = about["short_side"]
        self._places = np.load(folder / "offsets.npy")
        num_tars = int(self._places[-1, 0]) + 1
        self._tars = [_map(folder / _tar_name(number)) for number in range(num_tars)]

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Open a shard folder.

        Raises:
            ConfigError: if it is none, or its parts do not belong together.
        """
        folder = Path(folder)
        if not (folder / "shard.json").is_file():
            raise ConfigError(
                f"{folder} holds no shards: it has no shard.json. Hint: run the stage `shard` first"
            )
        shards = cls(folder)
        last = shards._places[-1]
        if len(shards._tars[last[0]]) < last[1] + last[2]:
            raise ConfigError(
                f"{folder}/{_tar_name(int(last[0]))} is too short. Hint: run the stage `shard` again"
            )
        return shards

    def __len__(self) -> int:
        return len(self._places)

    def jpeg(self, row: int) -> bytes:
        """The stored image of a sample."""
        number, offset, length = self._places[row]
        return self._tars[number][offset : offset + length]


def write_shards(settings: ShardJob, index_folder: Path, out: Path, threads: int) -> dict[str, Any]:
    """Write all images of an index as tars, in row order.

    Args:
        settings: training size, room for crops, quality, samples per tar.
        index_folder: the index.
        out: existing folder to write into.
        threads: worker processes.

    Returns:
        Facts for the manifest.
    """
    samples = Samples.open(index_folder)
    short_side = round(settings.image_size * settings.oversize)
    log.info(
        "%s images   short side at most %d px   quality %d",
        f"{len(samples):,}",
        short_side,
        settings.quality,
    )
    tasks = (
        _task(samples, first, short_side, settings.quality)
        for first in range(0, len(samples), _CHUNK)
    )
    images = (
        image
        for chunk in parallel_map(_shrink, tasks, min(threads, len(samples) // 512))
        for image in chunk
    )
    places = _write_tars(samples, images, settings.samples_per_tar, out)
    np.save(out / "offsets.npy", places)
    about = {
        "num_samples": len(samples),
        "samples_id": samples.samples_id,
        "short_side": short_side,
        "samples_per_tar": settings.samples_per_tar,
    }
    (out / "shard.json").write_text(json.dumps(about, indent=1) + "\n")
    num_bytes = int(places[:, 2].sum())
    log.info(
        "%s tars, mean %.1f KB per image", f"{places[-1, 0] + 1:,}", num_bytes / len(samples) / 1000
    )
    return {"num_samples": len(samples), "image_bytes": num_bytes}


@dataclass(frozen=True)
class _Task:
    """Images for one worker to shrink."""

    places: list[tuple[Path, int, int]]
    short_side: int
    quality: int


def _task(samples: Samples, first: int, short_side: int, quality: int) -> _Task:
    rows = range(first, min(first + _CHUNK, len(samples)))
    return _Task([samples.place(row) for row in rows], short_side, quality)


def _shrink(task: _Task) -> list[bytes]:
    return [shrink(read_range(*place), task.short_side, task.quality) for place in task.places]


def _write_tars(
    samples: Samples, images: Iterator[bytes], samples_per_tar: int, out: Path
) -> np.ndarray:
    """Write tars; returns tar number, offset and length of each image [N, 3]."""
    uids, captions = samples.uids(), samples.all_captions()
    places = np.zeros((len(samples), 3), np.int64)
    progress = Progress("stored", len(samples))
    for number, first in enumerate(range(0, len(samples), samples_per_tar)):
        with tarfile.open(out / _tar_name(number), "w") as tar:
            for row in range(first, min(first + samples_per_tar, len(samples))):
                image = next(images)
                places[row] = number, add_member(tar, f"{row:09d}.jpg", image), len(image)
                about = json.dumps(
                    {"captions": captions[row], "uid": uids[row]}, ensure_ascii=False
                )
                add_member(tar, f"{row:09d}.json", about.encode())
                progress.add(1)
    progress.done()
    return places


def _tar_name(number: int) -> str:
    return f"{number:06d}.tar"


def _map(path: Path) -> mmap.mmap:
    if not path.is_file():
        raise ConfigError(f"{path} is missing. Hint: run the stage `shard` again")
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
