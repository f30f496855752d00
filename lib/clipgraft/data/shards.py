"""Shards: the training images once more, at the size that a phase needs, in row order.

Two formats behind one interface. `jpeg`: plain WebDataset tars that `tar` and `webdataset` read; a large picture is
decoded and shrunk once here instead of once per epoch, a JPEG that is small enough keeps its bytes. `raw`: one npy
array of squares, to which pictures are squeezed (their true shape is kept beside, and crops undo the squeezing), so
that reading needs no decoder. A table of offsets, mapped from disk, finds a row without reading the rows before it.
Everything is byte for byte reproducible, and each image has a checksum, which is checked whenever it is read: hashing
all shards at the start of a job would take as long as reading them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import tarfile
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

from clipgraft.config import ConfigError
from clipgraft.data.crops import cut
from clipgraft.data.images import decode, open_image, shrink
from clipgraft.data.parallel import Progress, parallel_map
from clipgraft.data.samples import Samples
from clipgraft.data.tars import add_member, read_range
from clipgraft.settings import ShardJob

log = logging.getLogger(__name__)

_CHUNK = 128  # images per task
_RAW = "images.npy"
_OTHER_FILES = 512  # what a process may have open beside the shards
_REDUCTION_LEFT = 1.5  # after halving: enough for a crop to begin and end where it should

# One row per image. Width and height are those of the picture, or what they are in proportion to; `crc` is of the
# stored bytes and of these two.
_PLACE = np.dtype(
    [("file", "<u4"), ("offset", "<u8")]
    + [(name, "<u4") for name in ("length", "width", "height", "crc")]
)


class Shards:
    """Images by row. Threads may share it; it holds no pixels and grows with nothing.

    Attributes:
        samples_id: of the index the shards were made from.
        short_side: stored images are at most this large, in pixels.
        format: `jpeg` or `raw`.
    """

    def __init__(self, folder: Path) -> None:
        """Map the table of a shard folder and open its files; `open` says what may be wrong."""
        about = json.loads((folder / "shard.json").read_text())
        self.samples_id: str = about["samples_id"]
        self.short_side: int = about["short_side"]
        self.format: str = about["format"]
        self._places = np.load(folder / "offsets.npy", mmap_mode="r")
        _allow_files(len(about["file_bytes"]))
        self._paths = [folder / name for name in about["file_bytes"]]
        # Read by offset, not mapped: resident memory stays small, and a slow disk does not hold other threads up.
        self._files: list[int] = []
        weakref.finalize(self, _close, self._files)
        for name, size in about["file_bytes"].items():
            self._files.append(_open(folder / name, size))

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Open a shard folder.

        Raises:
            ConfigError: if it is none, a part is missing or was cut, or the system allows too few open files.
        """
        folder = Path(folder)
        if not (folder / "shard.json").is_file():
            raise ConfigError(
                f"{folder} holds no shards: it has no shard.json. Hint: run the stage `shard` first"
            )
        shards = cls(folder)
        if shards._places.dtype != _PLACE:
            raise ConfigError(
                f"{folder}/offsets.npy is of another version. Hint: run snakemake again"
            )
        return shards

    def __len__(self) -> int:
        return len(self._places)

    def sizes(self, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Widths and heights of pictures, int64 [B] each; of a squeezed one, before squeezing."""
        places_B = self._places[rows_B]
        return places_B["width"].astype(np.int64), places_B["height"].astype(np.int64)

    def jpeg(self, row: int) -> bytes:
        """The stored file of a sample (format jpeg)."""
        return self._read(*self._places[row].item())

    def squares(self, rows_B: np.ndarray, box_B4: np.ndarray, out_BHWC: np.ndarray) -> None:
        """Cut a part out of each of some pictures.

        Args:
            rows_B: samples.
            box_B4: left, top, right, bottom in 0..1.
            out_BHWC: uint8 [B, S, S, 3], filled.

        Raises:
            ConfigError: if an image is damaged; names its file and the row.
        """
        places_B = self._places[rows_B]
        halvings_B = _halvings(places_B, box_B4, out_BHWC.shape[1])
        items = zip(places_B.tolist(), halvings_B.tolist(), box_B4.tolist(), out_BHWC, strict=True)
        shape, is_raw = (self.short_side, self.short_side, 3), self.format == "raw"
        for i, (place, halvings, box, out) in enumerate(items):
            try:
                data = self._read(*place)
                if is_raw:
                    cut(np.frombuffer(data, np.uint8).reshape(shape), box, out)
                else:
                    cut(_decode(data, place[4], halvings), box, out)
            except ValueError as error:
                raise ConfigError(
                    f"{self._paths[place[0]]}: image of row {rows_B[i]}: {error}. "
                    "Hint: delete manifest.json beside it and run snakemake again"
                ) from None

    def _read(
        self, file: int, offset: int, length: int, width: int, height: int, crc: int
    ) -> bytes:
        data = os.pread(self._files[file], length, offset)
        if zlib.crc32(data, _crc_of_size(width, height)) != crc:
            raise ValueError("it is damaged (its checksum differs)")
        return data


def _crc_of_size(width: int, height: int) -> int:
    """What the checksum of an image begins with, so that it covers all of a row of the table."""
    return zlib.crc32(width.to_bytes(4, "little") + height.to_bytes(4, "little"))


def _halvings(places_B: np.ndarray, box_B4: np.ndarray, size: int) -> np.ndarray:
    """How often a JPEG may be halved while it is decoded, so that a crop is still reduced afterwards [B].

    Halves are the only reductions for which libjpeg-turbo has fast code.
    """
    across_B = (box_B4[:, 2] - box_B4[:, 0]) * places_B["width"]
    down_B = (box_B4[:, 3] - box_B4[:, 1]) * places_B["height"]
    reduction_B = np.minimum(across_B, down_B) / (_REDUCTION_LEFT * size)
    return np.floor(np.log2(reduction_B.clip(min=1))).astype(np.int64).clip(max=3)


def _decode(data: bytes, height: int, halvings: int) -> np.ndarray:
    """Pixels of a stored JPEG, which is upright and in RGB or grey."""
    least = math.ceil(height / 2**halvings) if halvings else 0
    try:
        # Colours are not smoothed: 6 % faster, and the SSIM of what a crop becomes is lower by 0.003.
        return np.asarray(
            simplejpeg.decode_jpeg(data, "RGB", fastupsample=True, min_height=least, strict=False)
        )
    except ValueError:
        return decode(data)  # Pillow reads more of what is damaged, or says what is wrong


def _open(path: Path, size: int) -> int:
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing. Hint: run the stage `shard` again") from None
    if (found := os.fstat(file).st_size) != size:
        os.close(file)
        raise ConfigError(
            f"{path} has {found:,} bytes instead of {size:,}. Hint: run the stage `shard` again"
        )
    return file


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _allow_files(count: int) -> None:
    """Let this process open a file per tar: the usual limit of 1,024 is a soft one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = len(os.listdir("/dev/fd")) + count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < need:
        if hard != resource.RLIM_INFINITY and hard < need:
            raise ConfigError(
                f"{count:,} tars, but the system allows {hard:,} open files (ulimit -Hn). "
                "Hint: a larger shard.samples_per_tar"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


# --- writing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """What is kept of an image."""

    data: bytes
    width: int
    height: int


@dataclass(frozen=True)
class _Task:
    """Images for one worker."""

    places: list[tuple[Path, int, int, int]]
    format: str
    short_side: int
    quality: int


def write_shards(settings: ShardJob, index_folder: Path, out: Path, threads: int) -> dict[str, Any]:
    """Write all images of an index, in row order.

    Args:
        settings: training size, room for crops, format, quality, samples per tar.
        index_folder: the index.
        out: existing folder to write into.
        threads: worker processes.

    Returns:
        Facts for the manifest.
    """
    samples = Samples.open(index_folder)
    short_side = round(settings.image_size * settings.oversize)
    log.info(
        "%s images   %s",
        f"{len(samples):,}",
        f"short side at most {short_side} px   quality {settings.quality}"
        if settings.format == "jpeg"
        else f"raw squares of {short_side} px",
    )
    tasks = (
        _task(samples, first, settings.format, short_side, settings.quality)
        for first in range(0, len(samples), _CHUNK)
    )
    images = (
        image
        for chunk in parallel_map(_store, tasks, min(threads, len(samples) // 512))
        for image in chunk
    )
    if settings.format == "raw":
        places = _write_raw(samples, images, short_side, out)
        names = [_RAW]
    else:
        places = _write_tars(samples, images, settings.samples_per_tar, out)
        names = [_tar_name(number) for number in range(int(places["file"][-1]) + 1)]
    np.save(out / "offsets.npy", places)
    about = {
        "num_samples": len(samples),
        "samples_id": samples.samples_id,
        "short_side": short_side,
        "format": settings.format,
        "file_bytes": {name: (out / name).stat().st_size for name in names},
    }
    (out / "shard.json").write_text(json.dumps(about, indent=1) + "\n")
    num_bytes = int(places["length"].sum(dtype=np.int64))
    log.info("%s files, mean %.1f KB per image", f"{len(names):,}", num_bytes / len(samples) / 1000)
    return {"num_samples": len(samples), "image_bytes": num_bytes}


def _task(samples: Samples, first: int, form: str, short_side: int, quality: int) -> _Task:
    rows = range(first, min(first + _CHUNK, len(samples)))
    return _Task(
        [(*samples.place(row), samples.checksum(row)) for row in rows], form, short_side, quality
    )


def _store(task: _Task) -> list[_Stored]:
    keep = _squeeze if task.format == "raw" else _reencode
    return [keep(read_range(*place), task) for place in task.places]


def _reencode(data: bytes, task: _Task) -> _Stored:
    image = shrink(data, task.short_side, task.quality)
    return _Stored(image, *open_image(image).size)


def _squeeze(data: bytes, task: _Task) -> _Stored:
    """All of a picture as a square: what is lost is resolution of the longer side, not its ends."""
    pixels = decode(data)
    height, width = pixels.shape[:2]
    side = task.short_side
    enlarges = min(height, width) < side
    how = cv2.INTER_CUBIC if enlarges else cv2.INTER_AREA
    return _Stored(cv2.resize(pixels, (side, side), interpolation=how).tobytes(), width, height)


def _write_raw(samples: Samples, images: Iterator[_Stored], side: int, out: Path) -> np.ndarray:
    """Write one npy array uint8 [N, side, side, 3]; returns places [N]."""
    places = np.zeros(len(samples), _PLACE)
    progress = Progress("stored", len(samples))
    about = {"descr": "|u1", "fortran_order": False, "shape": (len(samples), side, side, 3)}
    with (out / _RAW).open("wb") as file:
        np.lib.format.write_array_header_1_0(file, about)
        for row in range(len(samples)):
            image = next(images)
            places[row] = _place(0, file.tell(), image)
            file.write(image.data)
            progress.add(1)
    progress.done()
    return places


def _write_tars(
    samples: Samples, images: Iterator[_Stored], samples_per_tar: int, out: Path
) -> np.ndarray:
    """Write tars; returns places [N]."""
    uids = samples.uids()
    places = np.zeros(len(samples), _PLACE)
    progress = Progress("stored", len(samples))
    for number, first in enumerate(range(0, len(samples), samples_per_tar)):
        with tarfile.open(out / _tar_name(number), "w") as tar:
            for row in range(first, min(first + samples_per_tar, len(samples))):
                image = next(images)
                offset = add_member(tar, f"{row:09d}.jpg", image.data)
                places[row] = _place(number, offset, image)
                about = {"captions": samples.captions(row), "uid": uids[row]}
                text = json.dumps(about, ensure_ascii=False)
                add_member(tar, f"{row:09d}.json", text.encode())
                progress.add(1)
    progress.done()
    return places


def _place(file: int, offset: int, image: _Stored) -> tuple[int, ...]:
    crc = zlib.crc32(image.data, _crc_of_size(image.width, image.height))
    return file, offset, len(image.data), image.width, image.height, crc


def _tar_name(number: int) -> str:
    return f"{number:06d}.tar"
