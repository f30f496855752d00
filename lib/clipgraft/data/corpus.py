"""Corpus: the captions of a training set, split, tagged and encoded once; writes what `Tokens` reads.

A corpus has few words and repeats them, so captions become numbers of words first: each word is encoded once, and
counting, classes and pieces are then operations on whole arrays.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipgraft.data.parallel import Progress, parallel_map
from clipgraft.data.reduce import spread
from clipgraft.data.tokens import BEGINS
from clipgraft.data.vocabulary import Encoder, clip_merges
from clipgraft.data.wordpiece import WordPieces, basic_words
from clipgraft.data.words import first_sentence, load_tagger, split_words, tag_words

log = logging.getLogger(__name__)

Split = Callable[[str], list[str]]

_CHUNK = 4096  # captions per task
_WORTH_A_WORKER = 50_000  # captions; a worker needs seconds to load a tagger

# Shapes: N samples, C captions, W words of captions end to end, T their tokens, V different words, P their pieces


@dataclass(frozen=True)
class _Part:
    """Some captions: their words as numbers, the classes of the words, how many words each has, and its first sentence."""

    word_W: np.ndarray
    class_W: np.ndarray
    num_words_C: np.ndarray
    num_first_C: np.ndarray


def write_tokens(
    captions: Sequence[Sequence[str]],
    caption_kinds: Sequence[Sequence[str]],
    vocabulary: str,
    tagger: str,
    samples_id: str,
    folder: Path,
    threads: int = 1,
    wordpiece: Path | None = None,
) -> dict[str, Any]:
    """Split, tag and encode the captions of a training set and write `tokens/`.

    Args:
        captions: of each sample, at least one.
        caption_kinds: of each caption.
        vocabulary: `corpus`, `full` or `wordpiece`.
        tagger: `textblob` or `nltk`.
        samples_id: of the index.
        folder: to write into.
        threads: worker processes.
        wordpiece: a BERT `vocab.txt`; None: one is made from the captions.

    Returns:
        vocab_size and num_tokens.

    Raises:
        ConfigError: if the tagger has no model, or `wordpiece` is no vocabulary.
    """
    load_tagger(tagger)
    split = basic_words if vocabulary == "wordpiece" else split_words
    words, parts = _read(captions, tagger, split, threads)
    count_V = np.zeros(len(words), np.int64)
    for part in parts:
        count_V += np.bincount(part.word_W, minlength=len(words))
    encoder = _encoder(vocabulary, words, count_V, wordpiece)
    ids_V = [encoder.encode_word(word) for word in words]
    folder.mkdir()
    num_tokens = _write_pieces(folder, ids_V, count_V, encoder.vocab_size, parts)
    kinds = _write_samples(folder, caption_kinds)
    encoder.write(folder / encoder.file)
    about = {
        "vocab_size": encoder.vocab_size,
        "start_id": encoder.start_id,
        "end_id": encoder.end_id,
        "samples_id": samples_id,
        "num_words": sum(len(part.word_W) for part in parts),
        "vocabulary": vocabulary,
        "tagger": tagger,
        "caption_kinds": kinds,
    }
    (folder / "tokens.json").write_text(json.dumps(about, indent=1) + "\n")
    num_captions = sum(map(len, captions))
    log.info(
        "%s tokens in %s captions (mean %.1f)   vocabulary %s: %s",
        f"{num_tokens:,}",
        f"{num_captions:,}",
        num_tokens / num_captions,
        vocabulary,
        f"{encoder.vocab_size:,}",
    )
    return {"vocab_size": encoder.vocab_size, "num_tokens": num_tokens}


def _encoder(
    vocabulary: str, words: Sequence[str], count_V: np.ndarray, wordpiece: Path | None
) -> Encoder | WordPieces:
    if vocabulary == "wordpiece":
        return (
            WordPieces.read(wordpiece)
            if wordpiece
            else WordPieces.of_words(words, count_V.tolist())
        )
    encoder = Encoder(clip_merges())
    if vocabulary == "corpus":
        for word in words:
            encoder.encode_word(word)
        encoder = Encoder([merge for merge in encoder.merges if merge in encoder.used])
    return encoder


def _read(
    captions: Sequence[Sequence[str]], tagger: str, split: Split, threads: int
) -> tuple[list[str], list[_Part]]:
    """All different words, and the captions as numbers of words."""
    num_captions = sum(map(len, captions))
    progress = Progress("tagged", num_captions, unit="captions")
    number_of: dict[str, int] = {}
    parts = []
    tasks = ((tagger, split, chunk) for chunk in _chunks(captions))
    num_workers = min(threads, num_captions // _WORTH_A_WORKER)
    for words, part in parallel_map(_read_chunk, tasks, num_workers):
        numbers = [number_of.setdefault(word, len(number_of)) for word in words]
        word_W = np.array(numbers, np.int32)[part.word_W]
        parts.append(replace(part, word_W=word_W))
        progress.add(len(part.num_words_C))
    progress.done()
    return list(number_of), parts


def _chunks(captions: Iterable[Sequence[str]]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for several in captions:
        chunk += several
        if len(chunk) >= _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _read_chunk(task: tuple[str, Split, list[str]]) -> tuple[list[str], _Part]:
    """Some captions with words numbered among themselves (in a worker)."""
    tagger, split, captions = task
    words_C = [split(caption) for caption in captions]
    number_of: dict[str, int] = {}
    numbers = [number_of.setdefault(word, len(number_of)) for words in words_C for word in words]
    num_words_C = np.array([len(words) for words in words_C], np.int32)
    firsts = [first_sentence(caption) for caption in captions]
    num_first_C = np.array(
        [
            len(words if first is None else split(first))
            for words, first in zip(words_C, firsts, strict=True)
        ],
        np.int32,
    )
    return list(number_of), _Part(
        np.array(numbers, np.int32), tag_words(tagger, words_C), num_words_C, num_first_C
    )


# --- writing ------------------------------------------------------------------------------------------------


def _write_pieces(
    folder: Path,
    ids_V: list[list[int]],
    count_V: np.ndarray,
    vocab_size: int,
    parts: list[_Part],
) -> int:
    """Write the arrays per token and the offsets of captions; returns the number of tokens."""
    ids_P = np.array([number for ids in ids_V for number in ids], np.int64)
    size_V = np.array([len(ids) for ids in ids_V], np.int64)
    first_V = np.cumsum(size_V) - size_V
    num_tokens = int(count_V @ size_V)
    id_type = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    ids = (ids_P[spread(first_V[part.word_W], size_V[part.word_W])] for part in parts)
    bits = (_word_bits(part.class_W, size_V[part.word_W]) for part in parts)
    counts = (np.repeat(count_V[part.word_W], size_V[part.word_W]) for part in parts)
    _write_array(folder / "ids.npy", id_type, num_tokens, ids)
    _write_array(folder / "words.npy", np.dtype(np.uint8), num_tokens, bits)
    _write_array(folder / "frequency.npy", np.dtype(np.uint32), num_tokens, counts)
    lengths = [_sums(size_V[part.word_W], part.num_words_C) for part in parts]
    np.save(folder / "caption_offsets.npy", _offsets(np.concatenate(lengths)))
    firsts = [
        _first_sums(size_V[part.word_W], part.num_words_C, part.num_first_C) for part in parts
    ]
    np.save(folder / "sentences.npy", np.concatenate(firsts).astype(np.uint32))
    return num_tokens


def _word_bits(class_W: np.ndarray, size_W: np.ndarray) -> np.ndarray:
    bits_T = np.repeat(class_W, size_W)
    bits_T[np.cumsum(size_W) - size_W] |= BEGINS
    return bits_T


def _write_array(path: Path, dtype: np.dtype, length: int, blocks: Iterable[np.ndarray]) -> None:
    """Write an array that is never in memory as a whole."""
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (length,),
    }
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(block.astype(dtype).tobytes())


def _write_samples(folder: Path, caption_kinds: Sequence[Sequence[str]]) -> list[str]:
    """Write the kinds and the offsets of samples; returns the names of the kinds."""
    kinds = sorted({kind for several in caption_kinds for kind in several})
    number_of = {kind: number for number, kind in enumerate(kinds)}
    numbers = [number_of[kind] for several in caption_kinds for kind in several]
    np.save(folder / "caption_kinds.npy", np.array(numbers, np.min_scalar_type(len(kinds))))
    lengths = np.array([len(several) for several in caption_kinds], np.int64)
    np.save(folder / "sample_offsets.npy", _offsets(lengths))
    return kinds


def _sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sums of so many neighbours each; of none, 0."""
    return np.diff(_offsets(values)[_offsets(lengths)])


def _first_sums(values: np.ndarray, lengths: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """Sums of the first few of so many neighbours each."""
    sums, begins = _offsets(values), _offsets(lengths)[:-1]
    return sums[begins + np.minimum(firsts, lengths)] - sums[begins]


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
