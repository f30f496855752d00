"""Samples: what `index` accepted, and what it did not. Row i is sample i; images stay where the download left them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clipgraft.config import ConfigError
from clipgraft.data.images import decode
from clipgraft.data.tars import read_range

SCHEMA = pa.schema(
    {
        "uid": pa.string(),
        "captions": pa.list_(pa.string()),
        "caption_kinds": pa.list_(pa.string()),
        "source": pa.string(),
        "tar": pa.string(),
        "image_offset": pa.int64(),
        "image_bytes": pa.int64(),
        "image_crc": pa.uint32(),
        "width": pa.int32(),
        "height": pa.int32(),
        "labels": pa.string(),
        "pixel_hash": pa.string(),
        "perceptual_hash": pa.uint64(),
    }
)

REJECTS = pa.schema(
    {
        "uid": pa.string(),
        "reason": pa.string(),
        "detail": pa.string(),
        "tar": pa.string(),
        "image_offset": pa.int64(),
        "image_bytes": pa.int64(),
    }
)

ROWS = 2**16  # read and written at once: an Arrow array of lists holds no more than 2 GiB of text


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row of `rejects.parquet`; where its image is, if it has one."""

    uid: str
    reason: str
    detail: str
    tar: str | None = None
    image_offset: int | None = None
    image_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """A row of `samples.parquet`."""

    uid: str
    captions: list[str]
    caption_kinds: list[str]
    source: str
    tar: str
    image_offset: int
    image_bytes: int
    image_crc: int
    width: int
    height: int
    labels: str
    pixel_hash: str
    perceptual_hash: int

    def rejected(self, reason: str, detail: str) -> Rejected:
        """The sample after all among the rejects."""
        return Rejected(self.uid, reason, detail, self.tar, self.image_offset, self.image_bytes)


class Samples:
    """The samples of an index.

    Attributes:
        samples_id: hash of the uid column; arrays per sample carry it.
        label_names: label name -> class names, whose places are the class numbers.
        download: folder that relative tar names refer to.
    """

    def __init__(self, folder: Path) -> None:
        """Read the table of an index folder."""
        about = json.loads((folder / "samples.json").read_text())
        self.samples_id: str = about["samples_id"]
        self.label_names: dict[str, list[str]] = about["label_names"]
        self.download = folder / about["download"]
        self._table = read_columns(folder / "samples.parquet")
        self._tar = self._table["tar"]
        self._captions = self._table["captions"]
        self._offset = self._table["image_offset"].to_numpy()
        self._size = self._table["image_bytes"].to_numpy()
        self._crc = self._table["image_crc"].to_numpy()

    @classmethod
    def open(cls, index_folder: Path) -> Samples:
        """Open an index.

        Raises:
            ConfigError: if the folder is no index, or its table does not belong to it.
        """
        folder = Path(index_folder)
        if not (folder / "samples.json").is_file():
            raise ConfigError(
                f"{folder} is no index: it has no samples.json. Hint: run the stage `index` first"
            )
        try:
            samples = cls(folder)
        except KeyError as error:
            raise ConfigError(
                f"{folder}/samples.parquet has no column {error}: it is of another version. Hint: run snakemake again"
            ) from None
        if samples_id_of(samples.uids()) != samples.samples_id:
            raise ConfigError(
                f"{folder}/samples.parquet does not belong to samples.json. Hint: run `index` again"
            )
        return samples

    def __len__(self) -> int:
        return self._table.num_rows

    def uids(self) -> list[str]:
        """Names of all samples."""
        return list(self._table["uid"].to_pylist())

    def captions(self, row: int) -> list[str]:
        """Captions of a sample; none if it has labels alone."""
        return list(self._captions[int(row)].as_py())

    def all_captions(self) -> list[list[str]]:
        """Captions of all samples."""
        return list(self._captions.to_pylist())

    def all_caption_kinds(self) -> list[list[str]]:
        """The kind of each caption of all samples."""
        return list(self._table["caption_kinds"].to_pylist())

    def labels(self, name: str) -> np.ndarray:
        """Class numbers of one label [N], in the order of `label_names`; -1 where a sample has none.

        Raises:
            ConfigError: if the data has no such label.
        """
        if name not in self.label_names:
            known = ", ".join(self.label_names) or "none"
            raise ConfigError(f"the data has no label {name!r}. Hint: its labels: {known}")
        numbers = {value: number for number, value in enumerate(self.label_names[name])}
        rows = (json.loads(text) for text in self._table["labels"].to_pylist())
        return np.array([numbers.get(row.get(name), -1) for row in rows], np.int64)

    def image_bytes(self, row: int) -> bytes:
        """The image file as it came: JPEG, PNG or another format.

        Raises:
            ConfigError: if it is not what was indexed; names its file.
        """
        return read_range(*self.place(row), self.checksum(row))

    def pixels(self, row: int) -> np.ndarray:
        """The decoded image, uint8 RGB [height, width, 3]."""
        return decode(self.image_bytes(row))

    def image(self, row: int) -> Image.Image:
        """The picture: upright, RGB."""
        return Image.fromarray(self.pixels(row))

    def checksum(self, row: int) -> int:
        """CRC-32 of a sample's image."""
        return int(self._crc[row])

    def place(self, row: int) -> tuple[Path, int, int]:
        """File, offset and length of a sample's image."""
        path = self.download / self._tar[int(row)].as_py()  # an absolute name stays itself
        return path, int(self._offset[row]), int(self._size[row])


class Captions:
    """Captions of neighbouring samples, of an index that may be larger than memory: one row group is held at a time."""

    def __init__(self, index_folder: Path) -> None:
        """Open the table of an index."""
        self._file = pq.ParquetFile(Path(index_folder) / "samples.parquet")
        about = self._file.metadata
        sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        self._first = np.cumsum([0, *sizes])
        self._held: tuple[int, pa.Array | None] = (-1, None)

    def of_rows(self, first: int, stop: int) -> list[str]:
        """All captions of samples first .. stop - 1, end to end."""
        texts: list[str] = []
        while first < stop:
            group = int(np.searchsorted(self._first, first, side="right")) - 1
            begin, end = self._first[group : group + 2]
            if self._held[0] != group:
                column = self._file.read_row_group(group, ["captions"])["captions"]
                self._held = group, column.combine_chunks()
            assert self._held[1] is not None
            part = self._held[1].slice(first - begin, min(stop, end) - first)
            texts += part.flatten().to_pylist()
            first = min(stop, int(end))
        return texts


def read_columns(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of one file, or all, in chunks of `ROWS`.

    `pq.read_table` would import pandas first, a quarter of a second for each job, and `ParquetFile.read` makes lists one
    array, if it can.
    """
    with pq.ParquetFile(path) as file:
        fields = [field for field in file.schema_arrow if columns is None or field.name in columns]
        schema = pa.schema(fields, file.schema_arrow.metadata)
        return pa.Table.from_batches(file.iter_batches(ROWS, columns=columns), schema)


def picture_sizes(index_folder: Path) -> np.ndarray:
    """Width and height of all pictures, uint32 [N, 2]."""
    table = read_columns(Path(index_folder) / "samples.parquet", ["width", "height"])
    return np.stack([table[name].to_numpy() for name in ("width", "height")], 1).astype(np.uint32)


def samples_id_of(uids: Iterable[str]) -> str:
    """16 hex digits that name these samples in this order."""
    return hashlib.sha256("\n".join(uids).encode()).hexdigest()[:16]
