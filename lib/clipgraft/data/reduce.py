"""Reductions: which tokens of captions that are too long are kept, for a whole batch at once (CLIPA, arXiv 2305.07017).

Captions of a batch lie end to end. Short ones stay as they are, and the order of tokens is always kept. What a caption
keeps depends on itself and its own random word alone, never on the batch around it.

`syntax` differs from the published code in three ways (which keeps `room` words, tagged before cleaning, by an
unstable sort): pieces are counted, not words, so that no noun is cut off afterwards; equal classes keep the order of
the caption, so that all machines agree; and captions that fit are not respelt.
"""

# Shapes: B captions, T their tokens end to end, W their words end to end

from __future__ import annotations

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
    length_B: np.ndarray, class_T: np.ndarray, begins_T: np.ndarray, room: int
) -> np.ndarray:
    """Whole words that fit into `room`: nouns first, then adjectives, verbs, others; earlier words first.

    A word too long for what room is left is passed over. If nothing fits, the first word is cut.

    Args:
        length_B: tokens per caption.
        class_T: of the word of each token, place in `CLASSES`.
        begins_T: whether a token begins a word.
        room: how many tokens may stay.

    Returns:
        What stays, bool [T].
    """
    begin_W = np.flatnonzero(begins_T)
    size_W = np.diff(begin_W, append=len(begins_T))
    owner_W = _owners(length_B)[begin_W]
    num_words_B = np.bincount(owner_W, minlength=len(length_B))
    first_B = np.cumsum(num_words_B) - num_words_B

    # From here to the end of the walk, words stand in the order of their worth.
    order_W = np.argsort(owner_W * len(CLASSES) + class_T[begin_W], kind="stable")
    wanted_W = size_W[order_W]
    is_kept_W = np.zeros(len(order_W), bool)
    room_B = np.full(len(length_B), room)
    active = np.arange(len(length_B))
    for rank in range(num_words_B.max(initial=0)):
        active = active[(room_B[active] > 0) & (rank < num_words_B[active])]
        word = first_B[active] + rank
        fits = wanted_W[word] <= room_B[active]
        is_kept_W[word] = fits
        room_B[active] -= wanted_W[word] * fits

    kept_W = np.empty_like(is_kept_W)
    kept_W[order_W] = is_kept_W
    kept_T = np.repeat(kept_W, size_W)
    nothing_fits = (room_B == room) & (num_words_B > 0)
    cut = begin_W[order_W[first_B[nothing_fits]]]
    kept_T[spread(cut, np.full(len(cut), room))] = True
    return kept_T


def spread(begin_B: np.ndarray, length_B: np.ndarray) -> np.ndarray:
    """Places of several ranges, end to end: begin, begin + 1, ... begin + length - 1, then the next range."""
    shift_B = begin_B - (np.cumsum(length_B) - length_B)
    return np.repeat(shift_B, length_B) + np.arange(length_B.sum())


def count_kept(length_B: np.ndarray, kept_T: np.ndarray) -> np.ndarray:
    """How many tokens each caption keeps [B]."""
    return np.bincount(_owners(length_B)[kept_T], minlength=len(length_B))


def frame(
    ids_T: np.ndarray, length_B: np.ndarray, text_length: int, start_id: int, end_id: int
) -> np.ndarray:
    """Rows of a batch: the start token, a caption that fits, the end token, zeros.

    Returns:
        int64 [B, text_length].
    """
    text_BL = np.zeros((len(length_B), text_length), np.int64)
    text_BL[:, 0] = start_id
    column_L = np.arange(text_length - 1)
    text_BL[:, 1:][column_L < length_B[:, None]] = ids_T
    text_BL[np.arange(len(length_B)), length_B + 1] = end_id
    return text_BL


def _owners(length_B: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(length_B)), length_B)
