"""Reductions: which tokens of captions that are too long are kept, for a whole batch at once (CLIPA, arXiv 2305.07017).

Captions of a batch lie end to end. Short ones stay as they are, and the order of tokens is always kept. What a caption
keeps depends on itself and its own random word alone, never on the batch around it.

`syntax` differs from the published code in three ways (which keeps `room` words, tagged before cleaning, by an
unstable sort): pieces are counted, not words, so that no noun is cut off afterwards; equal classes keep the order of
the caption, so that all machines agree; and captions that fit are not respelt.
"""

# Shapes: B captions, T their tokens end to end, W their words end to end

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clipgraft.data.draws import as_uniform, draw_bits
from clipgraft.data.words import CLASSES


def block_start(length_B: np.ndarray, room: int, bits_B: np.ndarray) -> np.ndarray:
    """First token of a block of `room` tokens, uniform over all places; 0 for captions that fit."""
    num_places_B = np.maximum(length_B - room + 1, 1)
    return (as_uniform(bits_B) * num_places_B).astype(np.int64)


def keep_random(length_B: np.ndarray, room: int, bits_B: np.ndarray) -> np.ndarray:
    """Any `room` tokens of each caption, all subsets alike.

    Args:
        length_B: tokens per caption.
        room: how many may stay.
        bits_B: a random word per caption, uint64.

    Returns:
        What stays, bool [T].
    """
    owner_T, column_T = _owners(length_B), spread(np.zeros_like(length_B), length_B)
    noise_T = draw_bits(0, bits_B[owner_T], column_T, 1)[:, 0]
    # Captions stay in order, their tokens are shuffled; 40 bits of noise, and a tie goes to the earlier token.
    key_T = owner_T.astype(np.uint64) << np.uint64(40) | noise_T >> np.uint64(24)
    place_T = np.empty_like(column_T)
    place_T[np.argsort(key_T, kind="stable")] = column_T
    return place_T < room


def keep_syntax(
    length_B: np.ndarray,
    class_T: np.ndarray,
    begins_T: np.ndarray,
    room: int,
    bits_B: np.ndarray | None = None,
) -> np.ndarray:
    """Whole words that fit into `room`: nouns first, then adjectives, verbs, others; earlier words first.

    A word too long for what room is left is passed over. If nothing fits, the first word is cut.

    Args:
        length_B: tokens per caption.
        class_T: of the word of each token, place in `CLASSES`.
        begins_T: whether a token begins a word.
        room: how many tokens may stay.
        bits_B: a random word per caption, uint64: words of one class then come in an order drawn by it.

    Returns:
        What stays, bool [T].
    """
    words = _Words.of(length_B, begins_T)
    # From here to the end of the walk, words stand in the order of their worth.
    order_W = words.by_class(class_T, bits_B)
    wanted_W = words.size_W[order_W]
    is_kept_W = np.zeros(len(order_W), bool)
    room_B = np.full(len(length_B), room)
    active, rank = np.flatnonzero(words.num_B), 0
    while len(active):
        word = words.first_B[active] + rank
        fits = wanted_W[word] <= room_B[active]
        is_kept_W[word] = fits
        room_B[active] -= wanted_W[word] * fits
        rank += 1
        active = active[(room_B[active] > 0) & (rank < words.num_B[active])]

    kept_W = np.empty_like(is_kept_W)
    kept_W[order_W] = is_kept_W
    kept_T = np.repeat(kept_W, words.size_W)
    nothing_fits = (room_B == room) & (words.num_B > 0)
    cut = words.begin_W[order_W[words.first_B[nothing_fits]]]
    kept_T[spread(cut, np.full(len(cut), room))] = True
    return kept_T


def keep_syntax_words(
    length_B: np.ndarray,
    class_T: np.ndarray,
    begins_T: np.ndarray,
    room: int,
    bits_B: np.ndarray | None = None,
) -> np.ndarray:
    """CLIPA's published rule: `room` words by class, and of what they are made of the first `room` tokens.

    Arguments and result are those of `keep_syntax`.
    """
    words = _Words.of(length_B, begins_T)
    kept_W = np.empty(len(words.owner_W), bool)
    kept_W[words.by_class(class_T, bits_B)] = words.number_W < room
    return _cut(length_B, np.repeat(kept_W, words.size_W), room)


def keep_frequency(
    length_B: np.ndarray,
    chance_T: np.ndarray,
    begins_T: np.ndarray,
    room: int,
    bits_B: np.ndarray,
) -> np.ndarray:
    """CLIPF (arXiv 2412.16148): each word of a caption that is too long stays with a chance, the rarer the higher.

    What is then still too long is cut at the end: the words that are left are rare ones, drawn anew at each visit, so
    that their end is not always lost. If none is left, the one that was nearest to staying does.

    Args:
        length_B: tokens per caption.
        chance_T: of the word of each token to stay, above 0.
        begins_T: whether a token begins a word.
        room: how many tokens may stay.
        bits_B: a random word per caption, uint64.

    Returns:
        What stays, bool [T].
    """
    words = _Words.of(length_B, begins_T)
    ratio_W = as_uniform(words.noise(bits_B)) / chance_T[words.begin_W]
    lowest_B = np.full(len(length_B), np.inf)
    np.minimum.at(lowest_B, words.owner_W, ratio_W)
    is_lowest_W = ratio_W == lowest_B[words.owner_W]
    kept_W = (ratio_W < 1) | is_lowest_W | (length_B <= room)[words.owner_W]
    kept_T = np.repeat(kept_W, words.size_W)
    return _cut(length_B, kept_T, room)


@dataclass(frozen=True)
class _Words:
    """The words of a batch, end to end.

    Attributes:
        begin_W: token with which each begins.
        size_W: tokens of each.
        owner_W: caption of each.
        number_W: place of each in its caption.
        num_B: words per caption.
        first_B: first word of each caption.
    """

    begin_W: np.ndarray
    size_W: np.ndarray
    owner_W: np.ndarray
    number_W: np.ndarray
    num_B: np.ndarray
    first_B: np.ndarray

    @classmethod
    def of(cls, length_B: np.ndarray, begins_T: np.ndarray) -> _Words:
        begin_W = np.flatnonzero(begins_T)
        size_W = np.diff(begin_W, append=len(begins_T))
        owner_W = _owners(length_B)[begin_W]
        num_B = np.bincount(owner_W, minlength=len(length_B))
        first_B = np.cumsum(num_B) - num_B
        return cls(
            begin_W, size_W, owner_W, np.arange(len(begin_W)) - first_B[owner_W], num_B, first_B
        )

    def noise(self, bits_B: np.ndarray) -> np.ndarray:
        """A random word for each, which depends on its place in the caption alone."""
        return draw_bits(0, bits_B[self.owner_W], self.number_W, 1)[:, 0]

    def by_class(self, class_T: np.ndarray, bits_B: np.ndarray | None) -> np.ndarray:
        """Words in the order of their worth; captions stay in order, and so do words of one class, or are shuffled."""
        key_W = self.owner_W * len(CLASSES) + class_T[self.begin_W]
        if bits_B is not None:
            key_W = key_W.astype(np.uint64) << np.uint64(40) | self.noise(bits_B) >> np.uint64(24)
        elif len(self.num_B) * len(CLASSES) < 2**16:
            key_W = key_W.astype(np.uint16)  # three times as fast: numpy has a radix sort of these
        return np.argsort(key_W, kind="stable")


def spread(begin_B: np.ndarray, length_B: np.ndarray) -> np.ndarray:
    """Places of several ranges, end to end: begin, begin + 1, ... begin + length - 1, then the next range."""
    shift_B = begin_B - (np.cumsum(length_B) - length_B)
    return np.repeat(shift_B, length_B) + np.arange(length_B.sum())


def room_for_text(text_length: int, end_id: int | None) -> int:
    """Tokens of a row that the start token, and the end token if there is one, leave to the caption."""
    return text_length - (1 if end_id is None else 2)


def count_kept(length_B: np.ndarray, kept_T: np.ndarray) -> np.ndarray:
    """How many tokens each caption keeps [B]."""
    return np.bincount(_owners(length_B)[kept_T], minlength=len(length_B))


def frame(
    ids_T: np.ndarray, length_B: np.ndarray, text_length: int, start_id: int, end_id: int | None
) -> np.ndarray:
    """Rows of a batch: the start token, a caption that fits, the end token if there is one, zeros.

    Returns:
        int64 [B, text_length].
    """
    text_BL = np.zeros((len(length_B), text_length), np.int64)
    text_BL[:, 0] = start_id
    column_L = np.arange(text_length - 1)
    text_BL[:, 1:][column_L < length_B[:, None]] = ids_T
    if end_id is not None:
        text_BL[np.arange(len(length_B)), length_B + 1] = end_id
    return text_BL


def _cut(length_B: np.ndarray, kept_T: np.ndarray, room: int) -> np.ndarray:
    """Of what a caption keeps, the first `room` tokens."""
    sum_T = np.cumsum(kept_T)
    before_B = np.concatenate([[0], sum_T])[np.cumsum(length_B) - length_B]
    return kept_T & (sum_T - before_B[_owners(length_B)] <= room)


def _owners(length_B: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(length_B)), length_B)
