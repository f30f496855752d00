"""Embeddings of references, computed once for a whole data set (stage `embed`), and read in training.

The folder holds flat arrays, which are memory-mapped, so that a data set of any size opens at once:

    image.npy       [N, A, D]  float16: each stored crop of each sample
    text.npy        [C, D]     float16: all captions, by the numbers that `Tokens` has for them
    sizes.npy       [N, 2]     uint32: width and height of the pictures; with several crops only
    reference.json             of which model and which samples, and what the crops were drawn with

With one crop a sample, the reference sees every picture as it does in evaluation, and training crops as it likes. Of
several, all random, training shows the model the very ones that the reference saw: what a crop is made of is not
stored but drawn again, a function of (seed, row, number of the crop), like all that the loader draws.
"""

# Shapes: N samples, A stored crops of each, C captions, D embedding, B local batch; E: images and texts of all references

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipgraft.config import ConfigError
from clipgraft.data.draws import draw_bits
from clipgraft.recipes import AugmentationSettings

ABOUT = "reference.json"
# Added to the seed of a job, which is smaller: other numbers than those of any loader.
_CHOICE = 2**32


@dataclass(frozen=True)
class StoredCrops:
    """Which crops of each sample there are.

    Attributes:
        num: of each sample.
        seed: that they were drawn from.
        sizes_N2: widths and heights of the pictures as the index has them: boxes are then the same whatever size the
            pictures are stored at.
        augmentation: what else was done to them.
    """

    num: int
    seed: int
    sizes_N2: np.ndarray
    augmentation: AugmentationSettings

    def choose(self, seed: int, rows_B: np.ndarray, visit_B: np.ndarray) -> np.ndarray:
        """The crop that each visit shows: in `num` visits of a sample all of them, in an order drawn anew.

        Args:
            seed: of the training.
            rows_B: samples.
            visit_B: how often each has been shown before.

        Returns:
            Numbers of crops, int64 [B].
        """
        cycle_B, place_B = np.divmod(np.asarray(visit_B), self.num)
        order_BA = draw_bits(seed + _CHOICE, rows_B, cycle_B, self.num).argsort(axis=1)
        return order_BA[np.arange(len(rows_B)), place_B]

    def sizes(self, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Widths and heights of pictures, int64 [B] each."""
        width_B, height_B = self.sizes_N2[rows_B].astype(np.int64).T
        return width_B, height_B


class ReferenceCache:
    """The stored embeddings of one reference. Threads may share it; memory grows with the rows that are read.

    Attributes:
        dim: of its embeddings.
        scale: 1 / tau that it was trained to.
        crops: the stored crops, if there are several of each sample.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        """Map the arrays; `open` says what may be wrong."""
        self.dim: int = about["dim"]
        self.scale: float = about["scale"]
        num, num_crops = about["num_samples"], about["crops"]
        self._image_NAD = _mapped(folder / "image.npy", (num, num_crops, self.dim))
        self._text_CD = _mapped(folder / "text.npy", (about["num_captions"], self.dim))
        self.crops: StoredCrops | None = None
        if num_crops > 1:
            sizes_N2 = _mapped(folder / "sizes.npy", (num, 2))
            augmentation = AugmentationSettings(**about["augmentation"])
            self.crops = StoredCrops(num_crops, about["seed"], sizes_N2, augmentation)

    @classmethod
    def open(
        cls, folder: Path, samples_id: str, num_captions: int, expected: dict[str, Any]
    ) -> ReferenceCache:
        """Open a folder of `embed`, and check that it is what training asks for.

        Args:
            folder: outputs of `embed` for a reference.
            samples_id: of the training set.
            num_captions: of the training set.
            expected: what `reference.json` must say besides, e.g. `model`.

        Raises:
            ConfigError: if it is none, is of other samples, of another reference or other crops, or if a file was cut.
        """
        path = Path(folder) / ABOUT
        try:
            about = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(
                f"{folder} holds no embeddings of a reference: it has no {ABOUT}. Hint: run the stage `embed` first"
            ) from None
        expected = {"samples_id": samples_id, "num_captions": num_captions, **expected}
        wrong = [key for key, value in expected.items() if about.get(key) != value]
        if wrong:
            pairs = [f"{key} = {about.get(key)}, not {expected[key]}" for key in wrong]
            raise ConfigError(
                f"{folder} holds other embeddings than training asks for: {'; '.join(pairs)}. "
                "Hint: run the stage `embed` again, with this index and this reference"
            )
        return cls(Path(folder), about)

    def read(
        self, rows_B: np.ndarray, captions_B: np.ndarray, crop_B: np.ndarray | None
    ) -> np.ndarray:
        """Images and texts of a batch side by side, float16 [B, 2 * D].

        Args:
            rows_B: samples.
            captions_B: numbers of their captions.
            crop_B: which of the stored crops; None: there is one.
        """
        crops = 0 if crop_B is None or self.crops is None else crop_B
        return np.concatenate([self._image_NAD[rows_B, crops], self._text_CD[captions_B]], axis=1)


def shared_crops(caches: Sequence[ReferenceCache]) -> StoredCrops | None:
    """The crops that training replays: those of the references that have several of each sample.

    Raises:
        ConfigError: if these are not the same.
    """
    several = [cache.crops for cache in caches if cache.crops is not None]
    drawn = [(crops.num, crops.seed, crops.augmentation) for crops in several]
    if any(other != drawn[0] for other in drawn):
        raise ConfigError(
            f"references: a visit shows one crop to all of them, but their stored crops differ: {drawn}. "
            "Hint: the same number of `crops`"
        )
    return several[0] if several else None


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}. Hint: run the stage `embed` again"
        ) from None
    if array.shape != shape:
        raise ConfigError(
            f"{path} has shape {list(array.shape)}, not {list(shape)}. Hint: run the stage `embed` again"
        )
    # Rows are wanted here and there: of what the kernel would read ahead, up to megabytes for each, nothing is of use.
    assert isinstance(array.base, mmap.mmap)
    array.base.madvise(mmap.MADV_RANDOM)
    return array.view(np.ndarray)
