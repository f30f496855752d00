"""Draws: random numbers that are a function of (seed, sample, epoch), for whole batches at once.

A batch needs a few numbers per sample (which caption, which crop, mirrored or not), and they must be the same for
any number of processes and threads and after any restart. A generator per sample would cost ten times the work it
is for; a counter hashed by splitmix64 (Steele, Lea, Flood 2014) costs nothing, for all samples in one go.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def draw_bits(seed: int, rows_B: np.ndarray, epoch_B: np.ndarray | int, count: int) -> np.ndarray:
    """`count` random words per sample.

    Args:
        seed: of the job.
        rows_B: sample numbers.
        epoch_B: how often each has been visited before.
        count: words per sample; a larger count leaves the first ones as they are.

    Returns:
        uint64 [B, count].
    """
    with np.errstate(over="ignore"):
        key_B = _mix(np.asarray(np.uint64(seed) + _GOLDEN))
        key_B = _mix(key_B ^ np.asarray(rows_B).astype(np.uint64) * _GOLDEN)
        key_B = _mix(key_B ^ np.asarray(epoch_B).astype(np.uint64) * _GOLDEN)
        counter = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        return _mix(key_B[:, None] + counter)


def as_uniform(bits: np.ndarray) -> np.ndarray:
    """Words as float64 in [0, 1)."""
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection in which every input bit changes half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
