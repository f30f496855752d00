"""Tokens: captions as numbers, made once by `index` (`data/corpus.py`); a batch is drawn and cut to length without a Python loop.

The folder `tokens/` holds flat arrays, which are memory-mapped, so that an index of any size opens at once:

    ids.npy              [T]      token ids, captions end to end, without start and end
    words.npy            [T]      uint8: class of the token's word (bits 0-1), whether it begins the word (bit 2)
    frequency.npy        [T]      uint32: how often the token's word occurs in all captions
    caption_offsets.npy  [C + 1]  where each caption begins in the arrays above
    caption_kinds.npy    [C]      kind of each caption: its place in `caption_kinds` of tokens.json
    sentences.npy        [C]      uint32: how many tokens the first sentence of each caption has
    sample_offsets.npy   [N + 1]  where the captions of each sample begin
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clipgraft.config import ConfigError
from clipgraft.data.reduce import (
    block_start,
    count_kept,
    frame,
    keep_frequency,
    keep_random,
    keep_syntax,
    keep_syntax_words,
    room_for_text,
    spread,
)
from clipgraft.data.vocabulary import Encoder
from clipgraft.data.wordpiece import WordPieces
from clipgraft.data.words import clean_text
from clipgraft.reductions import TRUNCATE, FrequencyText, SyntaxText, TextReduction

CLASS, BEGINS = 3, 4  # bits of words.npy


class Tokens:
    """Token ids of all captions of a training set.

    Attributes:
        samples_id: of the index.
        kinds: names of the kinds of captions.
        vocabulary: its kind, `corpus`, `full` or `wordpiece`.
        vocab_size, start_id, end_id: of the vocabulary; WordPiece has no end token.
        tokenizer: its file.
        num_words: words of all captions.
        frequency: how often the word of each token occurs, as `frequency.npy`.
    """

    def __init__(self, folder: Path) -> None:
        """Open `tokens/` of an index."""
        about = json.loads((folder / "tokens.json").read_text())
        self.vocab_size: int = about["vocab_size"]
        self.start_id: int = about["start_id"]
        self.end_id: int | None = about["end_id"]
        self.vocabulary: str = about["vocabulary"]
        self.samples_id: str = about["samples_id"]
        self.kinds: list[str] = about["caption_kinds"]
        self.num_words: int = about["num_words"]
        encoder = WordPieces if self.vocabulary == "wordpiece" else Encoder
        self.tokenizer = folder / encoder.file
        self.frequency = _mapped(folder / "frequency.npy")
        self._ids = _mapped(folder / "ids.npy")
        self._words = _mapped(folder / "words.npy")
        self._captions = _mapped(folder / "caption_offsets.npy")
        self._kinds = _mapped(folder / "caption_kinds.npy")
        self._samples = _mapped(folder / "sample_offsets.npy")
        self._sentences = _mapped(folder / "sentences.npy")

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

    @property
    def num_captions(self) -> int:
        """Of all samples together."""
        return len(self._captions) - 1

    def captions_of(self, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the first caption of each sample [B], and how many it has [B]; the others follow the first."""
        first_B = self._samples[rows_B]
        return first_B, self._samples[rows_B + 1] - first_B

    def span_of(self, first: int, stop: int) -> tuple[int, int]:
        """First caption of neighbouring samples first .. stop - 1, and that of the next sample."""
        return int(self._samples[first]), int(self._samples[stop])

    def first_sentence(self, caption_B: np.ndarray) -> np.ndarray:
        """Tokens of the first sentence of each caption, int64 [B]."""
        return self._sentences[caption_B].astype(np.int64)

    def check_weights(self, weights: Mapping[str, float]) -> None:
        """Look through all samples, so that training does not find out in the middle.

        Raises:
            ConfigError: if the data lack a kind, or a sample has no caption of a kind that is drawn.
        """
        if weights:
            is_drawn_C = (self._weight_of_kinds(weights) > 0)[self._kinds]
            self._must_have(weights, np.logical_or.reduceat(is_drawn_C, self._samples[:-1]))

    def choose(
        self, rows_B: np.ndarray, uniform_B: np.ndarray, weights: Mapping[str, float]
    ) -> np.ndarray:
        """Draw a caption of each sample.

        Args:
            rows_B: samples.
            uniform_B: a random number in [0, 1) for each.
            weights: how often each kind is drawn, and then one of its captions, all alike. Kinds that a sample lacks
                leave their share to its other kinds; kinds that are not named are not drawn. Empty: all captions of a
                sample alike.

        Returns:
            Numbers of captions, int64 [B].

        Raises:
            ConfigError: as `check_weights`.
        """
        first_B, count_B = self.captions_of(rows_B)
        if not weights:
            return first_B + (uniform_B * count_B).astype(np.int64)
        weight_K = self._weight_of_kinds(weights)
        column_M = np.arange(count_B.max(initial=1))  # of the sample with most captions
        is_there_BM = column_M < count_B[:, None]
        kind_BM = self._kinds[first_B[:, None] + np.where(is_there_BM, column_M, 0)]
        weight_BM = np.zeros(kind_BM.shape)
        for kind in np.flatnonzero(weight_K):
            is_kind_BM = is_there_BM & (kind_BM == kind)
            share_B = weight_K[kind] / np.maximum(is_kind_BM.sum(axis=1), 1)
            weight_BM += is_kind_BM * share_B[:, None]
        sum_BM = weight_BM.cumsum(axis=1)
        self._must_have(weights, sum_BM[:, -1] > 0, rows_B)
        return first_B + (sum_BM <= (uniform_B * sum_BM[:, -1])[:, None]).sum(axis=1)

    def encode(
        self,
        caption_B: np.ndarray,
        text_length: int,
        reduction: TextReduction = TRUNCATE,
        bits_B: np.ndarray | None = None,
        length_B: np.ndarray | None = None,
    ) -> np.ndarray:
        """Captions with start and end (if the vocabulary has one), padded with zeros; too long ones are reduced.

        Args:
            caption_B: numbers of captions.
            text_length: tokens per caption, with those.
            reduction: which tokens stay (see `data/reduce.py`).
            bits_B: a random word for each, uint64; truncate and plain syntax do without.
            length_B: how many tokens of each caption are read; by default all.

        Returns:
            int64 [B, text_length].
        """
        room = room_for_text(text_length, self.end_id)
        begin_B = self._captions[caption_B]
        if length_B is None:
            length_B = self._captions[caption_B + 1] - begin_B
        if reduction.kind == "block":
            assert bits_B is not None
            begin_B = begin_B + block_start(length_B, room, bits_B)
        if reduction.kind in ("truncate", "block"):
            length_B = np.minimum(length_B, room)
            place_T = spread(begin_B, length_B)
        else:
            place_T = spread(begin_B, length_B)
            kept_T = self._keep(reduction, place_T, length_B, room, bits_B)
            place_T, length_B = place_T[kept_T], count_kept(length_B, kept_T)
        return frame(self._ids[place_T], length_B, text_length, self.start_id, self.end_id)

    def _keep(
        self,
        reduction: TextReduction,
        place_T: np.ndarray,
        length_B: np.ndarray,
        room: int,
        bits_B: np.ndarray | None,
    ) -> np.ndarray:
        if isinstance(reduction, SyntaxText):
            keep = keep_syntax_words if reduction.compat else keep_syntax
            ties_B = bits_B if reduction.tie == "random" else None
            words_T = self._words[place_T]
            return keep(length_B, words_T & CLASS, (words_T & BEGINS) > 0, room, ties_B)
        assert bits_B is not None, reduction
        if isinstance(reduction, FrequencyText):
            share_T = self.frequency[place_T] / self.num_words
            chance_T = np.sqrt(reduction.threshold / share_T)
            begins_T = (self._words[place_T] & BEGINS) > 0
            return keep_frequency(length_B, chance_T, begins_T, room, bits_B)
        return keep_random(length_B, room, bits_B)

    def _weight_of_kinds(self, weights: Mapping[str, float]) -> np.ndarray:
        for kind in weights:
            if kind not in self.kinds:
                raise ConfigError(
                    f"captions = {dict(weights)}: the data have no captions of kind `{kind}`, "
                    f"only {', '.join(self.kinds)}. Hint: kinds get their names under `download`"
                )
        return np.array([weights.get(kind, 0.0) for kind in self.kinds])

    def _must_have(
        self, weights: Mapping[str, float], has_B: np.ndarray, rows_B: np.ndarray | None = None
    ) -> None:
        if has_B.all():
            return
        lacking = np.flatnonzero(~has_B)
        row = int(lacking[0] if rows_B is None else rows_B[lacking[0]])
        codes = np.unique(self._kinds[self._samples[row] : self._samples[row + 1]])
        kinds = ", ".join(self.kinds[code] for code in codes)
        raise ConfigError(
            f"captions = {dict(weights)}: {len(lacking):,} of {len(has_B):,} samples have no caption of a kind that is "
            f"drawn, e.g. sample {row}, which has {kinds}. Hint: give {kinds} a weight; a tiny one makes it the last resort"
        )


class Tokenizer:
    """Encodes any text with a tokenizer file: WordPiece's, or merges, through open_clip's SimpleTokenizer.

    Attributes:
        vocab_size, start_id, end_id: of the vocabulary; WordPiece has no end token.
    """

    def __init__(self, file: Path) -> None:
        """Read the vocabulary; merges import open_clip."""
        if file.name == WordPieces.file:
            pieces = WordPieces.read(file)
            self._words: WordPieces | _Merges = pieces
            self.vocab_size, self.start_id, self.end_id = pieces.vocab_size, pieces.start_id, None
            return
        with warnings.catch_warnings():
            # open_clip leaves its merges file to the garbage collector.
            warnings.simplefilter("ignore", ResourceWarning)
            from clipgraft.lean import open_clip

            merges = open_clip.SimpleTokenizer(bpe_path=str(file))
        self._words = _Merges(merges)
        self.vocab_size = int(merges.vocab_size)
        self.start_id, self.end_id = int(merges.sot_token_id), int(merges.eot_token_id)

    @property
    def pieces(self) -> list[str]:
        """Each token for people; of merges, a hyphen says that the word goes on."""
        return self._words.pieces

    def encode_batch(self, texts: Sequence[str], text_length: int) -> np.ndarray:
        """Token ids int64 [B, text_length], truncated and framed as `Tokens.encode` does it."""
        room = room_for_text(text_length, self.end_id)
        ids = [self._words.encode(text)[:room] for text in texts]
        flat = [number for each in ids for number in each]
        length_B = np.array([len(each) for each in ids], np.int64)
        return frame(np.array(flat), length_B, text_length, self.start_id, self.end_id)


class _Merges:
    """As `SimpleTokenizer.encode`, which cleans plain text at length, and spells a word again whenever it comes."""

    def __init__(self, merges: Any) -> None:
        self._merges = merges
        self._spelled: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        words = self._merges.pat.findall(clean_text(text).lower())
        return [number for word in words for number in self._spell(word)]

    @cached_property
    def pieces(self) -> list[str]:
        decoder, byte_of = self._merges.decoder, self._merges.byte_decoder
        return [
            _readable(decoder[number], byte_of) for number in range(int(self._merges.vocab_size))
        ]

    def _spell(self, word: str) -> list[int]:
        if word not in self._spelled:
            letters = "".join(self._merges.byte_encoder[byte] for byte in word.encode())
            pieces = self._merges.bpe(letters).split(" ")
            self._spelled[word] = [self._merges.encoder[piece] for piece in pieces]
        return self._spelled[word]


def _readable(piece: str, byte_of: Mapping[str, int]) -> str:
    """A piece of CLIP's byte pairs, in which characters stand for bytes."""
    letters = piece.removesuffix("</w>")
    if any(letter not in byte_of for letter in letters):  # start and end
        return piece
    text = bytes(byte_of[letter] for letter in letters).decode("utf-8", "replace")
    return text if piece.endswith("</w>") else f"{text}-"


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r").view(np.ndarray)
