"""The inverse scaling law in numbers: what a halving of the tokens costs, by size, and how sure that is.

For each size, drop = a log2(full / reduced) is fitted through the origin. Runs are independent given size and
length, so the bootstrap draws lengths (the same for all sizes, which share their curvature) and, within each
length, seeds. With the two or three seeds of a sweep a length alone says little about the spread: residuals are
pooled over all lengths and sizes, and widened by sqrt(S / (S - 1)), since S seeds lie too close to their own mean.
"""

# Shapes: L lengths (the full one left out), S seeds, Z sizes, P points of a fit, R resamples

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 95.0  # per cent of the resamples that lie in an interval


@dataclass(frozen=True)
class Cell:
    """Runs of one size and length that differ in their seed.

    Attributes:
        tokens: of the sequence.
        scores: per cent, one per seed.
    """

    tokens: int
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.scores))


@dataclass(frozen=True)
class Ladder:
    """One size at every length, the longest first.

    Attributes:
        num_params: of the model.
        cells: at least two lengths; the first is what the others are held against.
    """

    num_params: int
    cells: tuple[Cell, ...]

    @property
    def halvings_L(self) -> np.ndarray:
        """How often the full length was halved, for each shorter length."""
        return np.log2([self.cells[0].tokens / cell.tokens for cell in self.cells[1:]])


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; without one where runs have no second seed to differ from."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, draws_R: np.ndarray) -> Estimate:
        """The interval that holds `LEVEL` per cent of the draws."""
        low, high = np.percentile(draws_R, [50 - LEVEL / 2, 50 + LEVEL / 2])
        return cls(value, float(low), float(high))

    def __str__(self) -> str:
        """As in a sentence."""
        interval = "" if self.low is None else f" ({self.low:z.2f} to {self.high:z.2f})"
        return f"{self.value:z.2f}{interval}"


@dataclass(frozen=True)
class Law:
    """What a sweep says.

    Attributes:
        slopes: of each size, in points per halving.
        trend: how much the slope changes with each doubling of the parameters; None for one size.
        num_seeds: of the cell that has fewest; with 1 nothing is known of how runs differ by chance.
    """

    slopes: tuple[Estimate, ...]
    trend: Estimate | None
    num_seeds: int

    @property
    def verdict(self) -> str:
        """`shows`, `does not show` or `shows the opposite of`; without seeds and sizes nothing is shown."""
        if self.trend is None or self.trend.low is None or self.trend.high is None:
            return "does not show"
        if self.trend.high < 0:
            return "shows"
        return "shows the opposite of" if self.trend.low > 0 else "does not show"


def fit_slope(halvings_P: np.ndarray, drop_P: np.ndarray) -> float:
    """Least squares through the origin."""
    return float(halvings_P @ drop_P / (halvings_P @ halvings_P))


def fit_law(ladders: Sequence[Ladder], num_resamples: int, seed: int) -> Law:
    """Slopes of all sizes and their trend, with bootstrap intervals.

    Args:
        ladders: one per size.
        num_resamples: of the bootstrap.
        seed: of its draws.
    """
    num_seeds = min(len(cell.scores) for ladder in ladders for cell in ladder.cells)
    doublings_Z = np.log2([ladder.num_params for ladder in ladders])
    has_trend = len(set(doublings_Z)) > 1
    slopes_Z = np.array([_slope_of(ladder) for ladder in ladders])
    if num_seeds < 2:
        trend = Estimate(float(_trend(doublings_Z, slopes_Z))) if has_trend else None
        return Law(tuple(Estimate(float(slope)) for slope in slopes_Z), trend, num_seeds)
    slopes_ZR = _redrawn(ladders, num_resamples, np.random.default_rng(seed))
    slopes = tuple(map(Estimate.of, slopes_Z.tolist(), slopes_ZR))
    if not has_trend:
        return Law(slopes, None, num_seeds)
    trend_R = _trend(doublings_Z, slopes_ZR)
    return Law(slopes, Estimate.of(float(_trend(doublings_Z, slopes_Z)), trend_R), num_seeds)


def _slope_of(ladder: Ladder) -> float:
    full, *shorter = ladder.cells
    halvings_P = np.repeat(ladder.halvings_L, [len(cell.scores) for cell in shorter])
    return fit_slope(halvings_P, full.mean - np.concatenate([cell.scores for cell in shorter]))


def _redrawn(ladders: Sequence[Ladder], num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Slopes of all sizes `[Z, R]` after lengths and seeds were drawn anew."""
    residuals = _residuals([cell for ladder in ladders for cell in ladder.cells])
    longest = max(len(ladder.halvings_L) for ladder in ladders)
    place_RL = rng.random((num_resamples, longest))
    return np.stack([_redrawn_slope(ladder, residuals, place_RL, rng) for ladder in ladders])


def _residuals(cells: Sequence[Cell]) -> np.ndarray:
    """How runs differ from the mean of their seeds, as widely as they do from the true one."""
    found = [
        (np.array(cell.scores) - cell.mean) * np.sqrt(len(cell.scores) / (len(cell.scores) - 1))
        for cell in cells
    ]
    return np.concatenate(found)


def _redrawn_slope(
    ladder: Ladder, residuals: np.ndarray, place_RL: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    num_resamples = len(place_RL)

    def means_R(cell: Cell) -> np.ndarray:
        drawn_RS = rng.choice(residuals, (num_resamples, len(cell.scores)))
        return cell.mean + drawn_RS.mean(axis=1)

    full_R = means_R(ladder.cells[0])
    drop_RL = np.stack([full_R - means_R(cell) for cell in ladder.cells[1:]], axis=1)
    weight_L = np.array([len(cell.scores) for cell in ladder.cells[1:]])
    num_lengths = drop_RL.shape[1]
    chosen_RL = (place_RL[:, :num_lengths] * num_lengths).astype(int)
    x_RL, w_RL = ladder.halvings_L[chosen_RL], weight_L[chosen_RL]
    y_RL = np.take_along_axis(drop_RL, chosen_RL, axis=1)
    return (w_RL * x_RL * y_RL).sum(axis=1) / (w_RL * x_RL**2).sum(axis=1)


def _trend(doublings_Z: np.ndarray, slopes_Z: np.ndarray) -> np.ndarray:
    """Slope of the slopes (`[Z]` or `[Z, R]`) over the doublings of the parameters."""
    centred_Z = doublings_Z - doublings_Z.mean()
    return centred_Z @ slopes_Z / (centred_Z @ centred_Z)
