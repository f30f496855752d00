"""Data sets in numbered tars, as CLIP_benchmark and DataComp lay them out.

classnames.txt                             one class per line; the number of the line is the label
zeroshot_classification_templates.txt      one prompt per line, with {c}
dataset_type.txt                           optional: classification, retrieval or multilabel
test/nshards.txt, test/0.tar, 1.tar, ...   KEY.webp (png, jpg, jpeg) with .cls (label), .npy (groups), .txt (captions)
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipgraft.config import ConfigError
from clipgraft.data.tars import Members, list_samples, read_range, too_large
from clipgraft.evaluation.evalset.pictures import Pictures

_IMAGES = ("webp", "png", "jpg", "jpeg")  # the first of a sample is taken


@dataclass(frozen=True)
class TarSet:
    """Samples of a data set, in the order of its tars.

    Attributes:
        folder: of the data set.
        places: tar and members of each sample.
        pictures: their images.
    """

    folder: Path
    places: list[tuple[Path, Members]]
    pictures: Pictures

    def file(self, row: int, extension: str) -> bytes:
        """The bytes of one file of a sample.

        Raises:
            ConfigError: if the sample has no such file.
        """
        tar, members = self.places[row]
        if extension not in members:
            raise ConfigError(
                f"{self.pictures.names[row]} has no .{extension}, only {', '.join(members)}. Hint: is {self.folder} "
                "whole, and of the kind that its task needs?"
            )
        return read_range(tar, *members[extension])

    def labels(self, num_classes: int) -> np.ndarray:
        """Class numbers int64 [N], from `.cls`.

        Raises:
            ConfigError: if one is no number, or there is no class of that number.
        """
        label_N = np.empty(len(self.places), np.int64)
        for row, name in enumerate(self.pictures.names):
            text = self.file(row, "cls").strip()
            if not text.isdigit() or len(text) > 9 or int(text) >= num_classes:
                raise ConfigError(
                    f"{name}: label {text[:40].decode(errors='replace')!r}, but {self.folder / 'classnames.txt'} names "
                    f"classes 0 to {num_classes - 1}. Hint: do both come from the same data set?"
                )
            label_N[row] = int(text)
        return label_N

    def metadata(self, num_columns: int | None = None) -> np.ndarray:
        """Rows of `.npy`, [N, num_columns].

        Raises:
            ConfigError: if one is no array, or has another number of columns.
        """
        rows = []
        for row, name in enumerate(self.pictures.names):
            try:
                value = np.lib.format.read_array(
                    io.BytesIO(self.file(row, "npy")), allow_pickle=False
                ).reshape(-1)
            except (ValueError, EOFError, MemoryError) as error:  # of a shape that is too large
                raise ConfigError(f"{name}: its .npy is no array: {error}") from None
            num_columns = len(value) if num_columns is None else num_columns
            if len(value) != num_columns:
                raise ConfigError(
                    f"{name}: its .npy has {len(value)} columns instead of {num_columns}"
                )
            rows.append(value)
        return np.stack(rows)

    def captions(self) -> list[list[str]]:
        """Captions of each sample, from `.txt`, one per line; what is escaped inside of one stays, as for CLIP_benchmark.

        Raises:
            ConfigError: if a sample has none.
        """
        texts = [
            as_text(self.file(row, "txt"), f"{name}: its .txt").splitlines()
            for row, name in enumerate(self.pictures.names)
        ]
        for name, own in zip(self.pictures.names, texts, strict=True):
            if not own:
                raise ConfigError(f"{name} has no caption. Hint: its .txt has one per line")
        return texts


def open_tars(folder: Path) -> TarSet:
    """List the samples of a data set; tars that are missing are noted, what is damaged is an error.

    Raises:
        ConfigError: if the layout is another, a tar is damaged, a sample has no image, or there are no samples.
    """
    counter = folder / "test" / "nshards.txt"
    text = as_text(counter.read_bytes(), str(counter)).strip()
    if not re.fullmatch("0*[1-9][0-9]{0,5}", text):  # a million tars are more than there are
        raise ConfigError(f"{counter} must hold the number of tars, it holds {text[:40]!r}")
    tars = [folder / "test" / f"{number}.tar" for number in range(int(text))]
    absent = [tar.name for tar in tars if not tar.is_file()]
    if len(absent) == len(tars):
        raise ConfigError(
            f"{folder / 'test'} has none of the {len(tars)} tars that nshards.txt says: 0.tar ..."
        )
    notes = [f"{len(absent)} of {len(tars)} tars missing: {_some(absent)}"] if absent else []
    places, names = [], []
    for tar in tars:
        for key, members in list_samples(tar) if tar.name not in absent else []:
            if not any(extension in members for extension in _IMAGES):
                raise ConfigError(
                    f"{tar}: {key} has no image (webp, png, jpg), only {', '.join(members)}"
                )
            if detail := too_large(members):
                raise ConfigError(f"{tar}: {key}: {detail}. Hint: download the data set again")
            places.append((tar, members))
            names.append(f"{tar}: {key}")
    if not places:
        raise ConfigError(
            f"{folder / 'test'}: no samples in its {len(tars) - len(absent)} tars. Hint: hidden files do not count"
        )

    def image_bytes(row: int) -> bytes:
        tar, members = places[row]
        extension = next(extension for extension in _IMAGES if extension in members)
        return read_range(tar, *members[extension])

    return TarSet(folder, places, Pictures(names, image_bytes, notes))


def as_text(data: bytes, where: str) -> str:
    """Text of a file.

    Raises:
        ConfigError: if it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8: {error}. Hint: convert it") from None


def read_lines(folder: Path, name: str) -> list[str]:
    """Lines of `classnames.txt` or of the templates, without blanks around them.

    Raises:
        ConfigError: if the file is missing or empty.
    """
    path = folder / name
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist. Hint: {folder.name} needs it for zero-shot classification"
        )
    lines = [line.strip() for line in as_text(path.read_bytes(), str(path)).splitlines()]
    if not lines:
        raise ConfigError(f"{path} is empty")
    return lines


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
