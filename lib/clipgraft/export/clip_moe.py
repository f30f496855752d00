"""The released form of CLIP-MoE: one checkpoint with its key names (`models/released.py`)."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from clipgraft.checkpoint import Loaded
from clipgraft.clipmoe import check_words
from clipgraft.lean import open_clip
from clipgraft.models.released import released_state

log = logging.getLogger(__name__)

USAGE = """`clip_moe.pt` is a state dict with the names and shapes of CLIP-MoE's checkpoints, which its code reads. So does clipgraft:
`python -m clipgraft.clipmoe read FOLDER/clip_moe.pt OUT --top-k TOP_K`. No checkpoint says how many experts a token goes to.
"""


def write_clip_moe(loaded: Loaded, out: Path) -> None:
    """Write `clip_moe.pt`.

    Raises:
        ConfigError: if CLIP-MoE's code could not hold the model, or would read texts with another vocabulary.
    """
    check_words(loaded.spec, loaded.tokenizer, "the model has")
    state = released_state(loaded.model, loaded.spec)
    usual = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    preprocess = loaded.spec["preprocess"]
    if any(list(preprocess[key]) != list(value) for key, value in usual.items()):
        log.warning(
            "its images are not prepared as OpenAI's, which no checkpoint says: %s", preprocess
        )
    torch.save(state, out / "clip_moe.pt")
