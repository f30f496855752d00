"""Pseudo labels of the training set, as `cluster` writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from clipgraft.config import ConfigError


def read_labels(folder: Path, samples_id: str) -> np.ndarray:
    """Accumulated labels [N] of a cluster folder.

    Raises:
        ConfigError: if they are of other samples.
    """
    about = json.loads((folder / "clusters.json").read_text())
    if about["samples_id"] != samples_id:
        raise ConfigError(
            f"{folder} has labels of samples {about['samples_id']}, the data are {samples_id}"
        )
    return np.load(folder / "labels.npy")
