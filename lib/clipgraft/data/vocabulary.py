"""Vocabulary: CLIP's byte pair encoding, with all its merges or only those that the training captions use.

A vocabulary is a merges file that open_clip's SimpleTokenizer reads. With fewer merges the pieces of the captions stay
the same, letter by letter, and a small model does not carry a table of 49,408 rows. Encoding is done by our own
`Encoder`, because importing open_clip costs `index` three seconds; a test holds the two together.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

Merge = tuple[str, str]

_NUM_BYTES = 256
_NUM_MERGES = 49152 - _NUM_BYTES - 2  # of CLIP's file, which has more lines than CLIP uses


class Encoder:
    """CLIP's byte pair encoding with given merges; remembers which merges were used."""

    file: ClassVar[str] = "merges.txt.gz"

    def __init__(self, merges: Sequence[Merge]) -> None:
        """Number the pieces: bytes, bytes that end a word, merges, start, end."""
        self.merges = list(merges)
        letters = _letters()
        ordered = [letters[byte] for byte in _byte_order()]
        pieces = (
            ordered + [letter + "</w>" for letter in ordered] + ["".join(merge) for merge in merges]
        )
        self._id_of = {piece: number for number, piece in enumerate(pieces)}
        self._letters = letters
        self._ranks = {merge: rank for rank, merge in enumerate(self.merges)}
        self.used: set[Merge] = set()
        self.start_id, self.end_id = len(pieces), len(pieces) + 1
        self.vocab_size = len(pieces) + 2

    def write(self, path: Path) -> None:
        """Write the merges so that open_clip reads them."""
        write_merges(path, self.merges)

    def encode_word(self, word: str) -> list[int]:
        """Ids of the pieces of one word of `split_words`."""
        parts = [self._letters[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            rank, pair = min(
                (self._ranks.get(pair, len(self._ranks)), pair) for pair in pairwise(parts)
            )
            if rank == len(self._ranks):
                break
            self.used.add(pair)
            parts = _join(parts, pair)
        return [self._id_of[part] for part in parts]


def clip_merges() -> list[Merge]:
    """The merges of CLIP's vocabulary, from open_clip's package, without importing it."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    return read_merges(path)


def read_merges(path: Path) -> list[Merge]:
    """Merges of a file in CLIP's format: a header, then one merge per line."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : _NUM_MERGES + 1]
    pairs = (line.split() for line in lines if line)
    return [(left, right) for left, right in pairs]


def is_same_vocabulary(one: Path, other: Path) -> bool:
    """Whether two tokenizer files, merges or pieces, number the pieces of any text alike."""
    if one.suffix != other.suffix:
        return False
    if one.suffix == ".gz":
        # CLIP's own file has a header of its own, and more lines than CLIP uses.
        return read_merges(one) == read_merges(other)
    return one.read_bytes() == other.read_bytes()


def write_merges(path: Path, merges: Sequence[Merge]) -> None:
    """Write merges so that open_clip reads them, and equal merges are equal bytes."""
    # No newline at the end: open_clip would count an empty merge.
    text = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)])
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
        file.write(text.encode())
    path.write_bytes(buffer.getvalue())


def _join(parts: list[str], pair: Merge) -> list[str]:
    joined, i = [], 0
    while i < len(parts):
        if i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair:
            joined.append(parts[i] + parts[i + 1])
            i += 2
        else:
            joined.append(parts[i])
            i += 1
    return joined


def _byte_order() -> list[int]:
    """Bytes in the order of their ids: those with a visible Latin-1 character first."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return visible + [byte for byte in range(_NUM_BYTES) if byte not in set(visible)]


def _letters() -> dict[int, str]:
    """A visible character for each byte; invisible ones are lifted above Latin-1."""
    order = _byte_order()
    num_visible = 94 + 12 + 82
    return {
        byte: chr(byte if i < num_visible else _NUM_BYTES + i - num_visible)
        for i, byte in enumerate(order)
    }
