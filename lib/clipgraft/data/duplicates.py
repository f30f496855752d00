"""Duplicates: two hashes of a picture, and finding what repeats without comparing all pairs.

Hashes are of the decoded picture, so a copy in another format counts as one. The pixel hash (64 bits of SHA-256)
finds equal pictures; the perceptual hash (pHash, see `perceptual_hash_of`) those that look alike. Which sample stays
depends on the order of rows alone: the first one, and then each that resembles none of those kept before it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import combinations
from math import comb

import cv2
import numpy as np

from clipgraft.data.parallel import Progress

# Shapes: N rows in question, M rows to look in, P pairs that may be alike

_BANDS = 4  # of 16 bits
_BLOCK = 2_048  # rows at a time
_MAX_PAIRS = 1 << 22  # held at once


def pixel_hash_of(pixels: np.ndarray) -> str:
    """16 hex digits for uint8 HWC pixels, their size included."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()[:16]


def perceptual_hash_of(pixels: np.ndarray) -> int:
    """64 bits that hardly change when a picture is resized, recompressed or made brighter.

    The pHash of Zauner (2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", 3.2.1): of the
    cosine transform of the grey picture at 32 x 32, whether each of the 8 x 8 lowest frequencies, without the mean,
    is above their median. Copies mostly differ in 8 bits or fewer, strangers in 32 on average. Pictures of
    one colour are all alike.

    Args:
        pixels: uint8 HWC RGB.
    """
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = np.rint(cv2.dct(small)[1:9, 1:9])  # rounded: a plain area has no frequencies
    bits = np.packbits(low.ravel() > np.median(low))
    return int.from_bytes(bits.tobytes(), "big")


def first_equal(hash_N: np.ndarray) -> np.ndarray:
    """The first row with the same hash, for each row; itself where it is the first. int64 [N]."""
    _, first, inverse = np.unique(hash_N, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


def first_near(hash_N: np.ndarray, max_bits: int) -> np.ndarray:
    """The first kept row that differs in at most `max_bits` bits; itself where the row is kept. int64 [N].

    Rows are taken in order: a row is kept if it resembles none of those kept before it, so a chain of pictures,
    each like the one before, is not lost altogether.

    Args:
        hash_N: perceptual hashes, uint64.
        max_bits: bits that may differ.
    """
    kept_N = np.arange(len(hash_N))
    # Kept rows in order, in parts more than twice as large as the next: a row is sorted again only with half as many more.
    parts: list[tuple[np.ndarray, _Sorted]] = []
    progress = Progress("compared", len(hash_N))
    for start in range(0, len(hash_N), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(hash_N)))
        progress.add(len(rows))
        for before, among in parts:
            match = _find(hash_N[rows], among, max_bits)
            kept_N[rows[match >= 0]] = before[match[match >= 0]]
            rows = rows[match < 0]
        is_near = np.bitwise_count(hash_N[rows, None] ^ hash_N[rows]) <= max_bits
        is_kept = np.ones(len(rows), bool)
        for i in np.flatnonzero(np.tril(is_near, -1).any(1)):
            earlier = np.flatnonzero(is_near[i, :i] & is_kept[:i])
            if len(earlier):
                is_kept[i], kept_N[rows[i]] = False, rows[earlier[0]]
        kept = rows[is_kept]
        while parts and len(parts[-1][0]) <= 2 * len(kept):
            kept = np.concatenate([parts.pop()[0], kept])
        parts.append((kept, _sorted(hash_N[kept], max_bits)))
    progress.done()
    return kept_N


def find_near(hash_N: np.ndarray, among_M: np.ndarray, max_bits: int) -> np.ndarray:
    """The first of `among_M` that differs in at most `max_bits` bits, for each row; -1 if none does. int64 [N].

    Multi-index hashing (Norouzi, Punjani, Fleet 2012, arXiv:1307.2982): of hashes cut into 4 bands, one band
    differs in at most a quarter of the bits, so only what agrees nearly in a band is compared.

    Args:
        hash_N: uint64.
        among_M: uint64.
        max_bits: bits that may differ.
    """
    return _find(hash_N, _sorted(among_M, max_bits), max_bits)


@dataclass(frozen=True)
class _Sorted:
    """Hashes to look in; few are compared with all, and have no bands.

    Attributes:
        hash_M: as they are.
        bands: for each, the order by its value, the hashes in it, and where each value begins.
    """

    hash_M: np.ndarray
    bands: list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def _sorted(hash_M: np.ndarray, max_bits: int) -> _Sorted:
    num_masks = sum(comb(16, count) for count in range(max_bits // _BANDS + 1))
    if len(hash_M) <= 64 * num_masks:  # fewer than the bands would name
        return _Sorted(hash_M, [])
    bands = []
    for band in range(_BANDS):
        value_M = _band(hash_M, band)
        order = np.argsort(value_M, kind="stable")
        start = np.searchsorted(value_M[order], np.arange(1 << 16, dtype=np.uint16), "left")
        bands.append((order, hash_M[order], np.append(start, len(order))))
    return _Sorted(hash_M, bands)


def _band(hashes: np.ndarray, band: int) -> np.ndarray:
    return (hashes >> np.uint64(16 * band)).astype(np.uint16)


def _find(hash_N: np.ndarray, among: _Sorted, max_bits: int) -> np.ndarray:
    if not len(among.hash_M):
        return np.full(len(hash_N), -1)
    found_N = np.full(len(hash_N), len(among.hash_M))
    if not among.bands:
        _compare_all(hash_N, among.hash_M, max_bits, found_N)
    masks = [
        sum(1 << bit for bit in bits)
        for count in range(max_bits // _BANDS + 1)
        for bits in combinations(range(16), count)
    ]
    for band, sorted_M in enumerate(among.bands):
        for mask in masks:
            bucket_N = _band(hash_N, band) ^ np.uint16(mask)
            _compare(hash_N, bucket_N, sorted_M, max_bits, found_N)
    return np.where(found_N < len(among.hash_M), found_N, -1)


def _compare_all(
    hash_N: np.ndarray, among_M: np.ndarray, max_bits: int, found_N: np.ndarray
) -> None:
    step = max(1, _MAX_PAIRS // len(among_M))
    for first in range(0, len(hash_N), step):
        rows = slice(first, first + step)
        is_near = np.bitwise_count(hash_N[rows, None] ^ among_M) <= max_bits
        has = is_near.any(1)
        found_N[rows][has] = is_near[has].argmax(1)


def _compare(
    hash_N: np.ndarray,
    bucket_N: np.ndarray,
    sorted_M: tuple[np.ndarray, np.ndarray, np.ndarray],
    max_bits: int,
    found_N: np.ndarray,
) -> None:
    """Compare each row with the hashes of its bucket; lowers `found_N`."""
    order, hash_M, start = sorted_M
    begin_N = start[bucket_N]
    num_N = start[bucket_N.astype(np.int64) + 1] - begin_N
    ends = np.cumsum(num_N)
    first = 0
    while first < len(hash_N):
        done = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _MAX_PAIRS, "right")))
        num, stop = num_N[first:last], ends[first:last] - done
        place_P = np.arange(stop[-1]) + np.repeat(begin_N[first:last] - (stop - num), num)
        differing_P = np.bitwise_count(np.repeat(hash_N[first:last], num) ^ hash_M[place_P])
        near = np.flatnonzero(differing_P <= max_bits)
        row = first + np.searchsorted(stop, near, "right")
        np.minimum.at(found_N, row, order[place_P[near]])
        first = last
