"""Small models of every kind: what they are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clipgraft.data.vocabulary import Encoder, clip_merges, write_merges
from clipgraft.data.wordpiece import WordPieces
from clipgraft.data.words import split_words

SIDE, LENGTH = 32, 12
TEXTS = [
    "a red circle",
    "Two  dogs' bones, isn't it? 1984!",
    "a",
    "one word after another until no room is left for any of them at all",
]
VOCABULARIES = ("corpus", "full", "wordpiece")


def write_vocabulary(folder: Path, kind: str) -> tuple[Path, int]:
    """A tokenizer file, and how many tokens it has."""
    if kind == "wordpiece":
        words = sorted({word for text in TEXTS for word in text.lower().split()})
        pieces = WordPieces.of_words(words, [1] * len(words))
        pieces.write(folder / "vocab.txt")
        return folder / "vocab.txt", pieces.vocab_size
    encoder = Encoder(clip_merges())
    if kind == "corpus":
        for text in TEXTS:
            for word in split_words(text):
                encoder.encode_word(word)
        encoder = Encoder([merge for merge in encoder.merges if merge in encoder.used])
    write_merges(folder / "merges.txt.gz", encoder.merges)
    return folder / "merges.txt.gz", encoder.vocab_size


def model_config(vocab_size: int, changes: dict[str, Any]) -> dict[str, Any]:
    vision = {"image_size": SIDE, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
    text = {
        "context_length": LENGTH,
        "vocab_size": vocab_size,
        "width": 48,
        "heads": 4,
        "layers": 2,
    }
    base = {"embed_dim": 24, "quick_gelu": False, "custom_text": True}
    return {
        **base,
        **{key: value for key, value in changes.items() if not key.endswith("_cfg")},
        "vision_cfg": vision | changes.get("vision_cfg", {}),
        "text_cfg": text | changes.get("text_cfg", {}),
    }


def images() -> torch.Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
