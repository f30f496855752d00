"""Tokens: captions as numbers, made once by `index`, cut to length per batch without a Python loop.

CLIP's byte pair encoding is open_clip's; a vocabulary here is a merges file that open_clip's SimpleTokenizer reads.
`corpus` keeps only those merges that the training captions use: their pieces stay the same, letter by letter, and
a small model does not carry a table of 49,408 rows. Encoding is done by our own `Encoder`, because importing
open_clip costs `index` eight seconds; a test holds the two together.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import regex

from clipgraft.config import ConfigError

log = logging.getLogger(__name__)

Merge = tuple[str, str]

_NUM_BYTES = 256
_NUM_MERGES = 49152 - _NUM_BYTES - 2  # of CLIP's file, which has more lines than CLIP uses
_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


class Tokens:
    """Token ids of all captions of a training set, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Open `tokens/` of an index."""
        about = json.loads((folder / "tokens.json").read_text())
        self.vocab_size: int = about["vocab_size"]
        self.start_id: int = about["start_id"]
        self.end_id: int = about["end_id"]
        self.samples_id: str = about["samples_id"]
        self.merges = folder / "merges.txt.gz"
        self._ids = np.load(folder / "ids.npy", mmap_mode="r")
        self._captions = np.load(folder / "caption_offsets.npy")
        self._samples = np.load(folder / "sample_offsets.npy")

    @classmethod
    def open(cls, index_folder: Path) -> Tokens:
        """Open the tokens of an index.

        Raises:
            ConfigError: if the index has none.
        """
        folder = Path(index_folder) / "tokens"
        if not (folder / "tokens.json").is_file():
            raise ConfigError(
                f"index {index_folder} has no tokens. Hint: only the data set `train` is tokenized"
            )
        return cls(folder)

    def num_captions(self, rows: np.ndarray) -> np.ndarray:
        """How many captions each of some samples has."""
        return np.asarray(self._samples[rows + 1] - self._samples[rows])

    def batch(self, rows: np.ndarray, text_length: int, choice: np.ndarray) -> np.ndarray:
        """Captions of some samples, truncated, with start and end, padded with zeros.

        Args:
            rows: samples [B].
            text_length: tokens per caption, with start and end.
            choice: which caption of each sample [B]; counted round.

        Returns:
            int64 [B, text_length].
        """
        first, num_captions = self._samples[rows], self._samples[rows + 1] - self._samples[rows]
        caption = first + choice % num_captions
        begin = self._captions[caption]
        lengths = self._captions[caption + 1] - begin
        return _frame(self._ids, begin, lengths, text_length, self.start_id, self.end_id)


class Tokenizer:
    """Encodes any text with a merges file, through open_clip's SimpleTokenizer."""

    def __init__(self, merges: Path) -> None:
        """Read the vocabulary; imports open_clip."""
        with warnings.catch_warnings():
            # open_clip leaves its merges file to the garbage collector, on import and again here.
            warnings.simplefilter("ignore", ResourceWarning)
            from open_clip import SimpleTokenizer

            self._tokenizer = SimpleTokenizer(bpe_path=str(merges))
        self.vocab_size = int(self._tokenizer.vocab_size)
        self.start_id = int(self._tokenizer.sot_token_id)
        self.end_id = int(self._tokenizer.eot_token_id)

    def encode_batch(self, texts: Sequence[str], text_length: int) -> np.ndarray:
        """Token ids int64 [B, text_length], truncated, with start and end, padded with zeros."""
        ids = [self._tokenizer.encode(text) for text in texts]
        return truncate(ids, text_length, self.start_id, self.end_id)


def truncate(ids: Sequence[Sequence[int]], text_length: int, start: int, end: int) -> np.ndarray:
    """Cut id lists to `text_length` tokens with start and end; shorter ones are padded with zeros.

    Returns:
        int64 [len(ids), text_length].
    """
    lengths = np.array([len(each) for each in ids], np.int64)
    flat = (
        np.concatenate([np.asarray(each, np.int64) for each in ids])
        if len(ids)
        else np.zeros(0, np.int64)
    )
    return _frame(flat, np.cumsum(lengths) - lengths, lengths, text_length, start, end)


def _frame(
    ids: np.ndarray, begin: np.ndarray, lengths: np.ndarray, text_length: int, start: int, end: int
) -> np.ndarray:
    column = np.arange(text_length - 2)
    lengths = np.minimum(lengths, text_length - 2)
    is_content = column < lengths[:, None]
    out = np.zeros((len(begin), text_length), np.int64)
    out[:, 0] = start
    out[:, 1:-1][is_content] = ids[(begin[:, None] + column)[is_content]]
    out[np.arange(len(begin)), lengths + 1] = end
    return out


# --- making a vocabulary and encoding the training captions ------------------------------------------------


class Encoder:
    """CLIP's byte pair encoding with given merges; remembers words and the merges they used."""

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
        self._words: dict[str, list[str]] = {}
        self.used: set[Merge] = set()
        self.start_id, self.end_id = len(pieces), len(pieces) + 1
        self.vocab_size = len(pieces) + 2

    def pieces(self, text: str) -> list[str]:
        """Pieces of a text, after CLIP's cleaning: mended Unicode, no HTML, lower case."""
        return [piece for word in _WORD.findall(_clean(text)) for piece in self._split(word)]

    def encode(self, text: str) -> list[int]:
        """Ids of the pieces, without start and end."""
        return [self._id_of[piece] for piece in self.pieces(text)]

    def _split(self, word: str) -> list[str]:
        known = self._words.get(word)
        if known is not None:
            return known
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
        self._words[word] = parts
        return parts


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


def write_merges(path: Path, merges: Sequence[Merge]) -> None:
    """Write merges so that open_clip reads them, and equal merges are equal bytes."""
    # No newline at the end: open_clip would count an empty merge.
    text = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)])
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
        file.write(text.encode())
    path.write_bytes(buffer.getvalue())


def write_tokens(
    captions: Sequence[Sequence[str]], vocabulary: str, samples_id: str, folder: Path
) -> dict[str, Any]:
    """Encode the captions of a training set and write `tokens/`.

    Args:
        captions: of each sample, at least one.
        vocabulary: `corpus` or `full`.
        samples_id: of the index.
        folder: to write into.

    Returns:
        vocab_size and num_tokens.
    """
    encoder = Encoder(clip_merges())
    flat = [caption for several in captions for caption in several]
    if vocabulary == "corpus":
        for caption in flat:
            encoder.pieces(caption)
        encoder = Encoder([merge for merge in encoder.merges if merge in encoder.used])
    ids = [encoder.encode(caption) for caption in flat]
    about = {
        "vocab_size": encoder.vocab_size,
        "start_id": encoder.start_id,
        "end_id": encoder.end_id,
        "samples_id": samples_id,
        "vocabulary": vocabulary,
    }
    folder.mkdir()
    dtype = np.uint16 if encoder.vocab_size <= 2**16 else np.uint32
    np.save(folder / "ids.npy", np.fromiter((number for each in ids for number in each), dtype))
    np.save(folder / "caption_offsets.npy", _offsets(ids))
    np.save(folder / "sample_offsets.npy", _offsets(captions))
    write_merges(folder / "merges.txt.gz", encoder.merges)
    (folder / "tokens.json").write_text(json.dumps(about, indent=1) + "\n")
    num_tokens = sum(map(len, ids))
    log.info(
        "%s tokens in %s captions (mean %.1f)   vocabulary %s: %s of 49,408",
        f"{num_tokens:,}",
        f"{len(flat):,}",
        num_tokens / len(flat),
        vocabulary,
        f"{encoder.vocab_size:,}",
    )
    return {"vocab_size": encoder.vocab_size, "num_tokens": num_tokens}


def _offsets(lists: Sequence[Sequence[Any]]) -> np.ndarray:
    return np.cumsum([0, *map(len, lists)], dtype=np.int64)


def _clean(text: str) -> str:
    # Plain text needs no mending, and mending is what takes the time.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


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
