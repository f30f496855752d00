"""Laws of the fit: against numpy's own, against planted slopes, and how often it claims what is not there."""

import numpy as np
import pytest

from clipgraft.report.slopes import Cell, Estimate, Ladder, fit_law, fit_slope

TOKENS = (40, 20, 10, 5)
PARAMS = (1_000_000, 4_000_000, 16_000_000)


def ladders(slopes, num_seeds: int, spread: float, rng) -> list[Ladder]:
    """Sizes of which each halving costs so many points, with noise."""
    return [
        Ladder(
            num,
            tuple(
                Cell(t, tuple(60 - a * np.log2(40 / t) + spread * rng.normal(size=num_seeds)))
                for t in TOKENS
            ),
        )
        for num, a in zip(PARAMS, slopes, strict=True)
    ]


def test_the_slope_is_that_of_least_squares_through_the_origin():
    rng = np.random.default_rng(0)
    x, y = rng.random(12), rng.normal(size=12)
    expected = np.linalg.lstsq(x[:, None], y, rcond=None)[0][0]
    assert fit_slope(x, y) == pytest.approx(expected)


def test_slopes_and_trend_of_noisy_runs_are_those_of_numpy():
    found = ladders((3, 2, 1), 3, 0.8, np.random.default_rng(1))
    law = fit_law(found, 10, 0)
    expected = []
    for ladder in found:
        full = np.mean(ladder.cells[0].scores)
        pairs = [(np.log2(40 / c.tokens), full - s) for c in ladder.cells[1:] for s in c.scores]
        x, y = np.array(pairs).T
        expected.append(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])
    assert [slope.value for slope in law.slopes] == pytest.approx(expected)
    assert law.trend.value == pytest.approx(np.polyfit(np.log2(PARAMS), expected, 1)[0])


@pytest.mark.parametrize(
    ("slopes", "verdict"),
    [
        ((3, 2, 1), "shows"),
        ((1, 2, 3), "shows the opposite of"),
        ((2, 2, 2), "does not show"),
    ],
)
def test_planted_slopes_are_found_again(slopes, verdict):
    exact = fit_law(ladders(slopes, 2, 0.0, np.random.default_rng(0)), 1000, 0)
    assert [slope.value for slope in exact.slopes] == pytest.approx(slopes)
    assert exact.trend.value == pytest.approx((slopes[2] - slopes[0]) / 4)
    noisy = fit_law(ladders(slopes, 2, 0.4, np.random.default_rng(3)), 1000, 0)
    assert noisy.verdict == verdict
    for slope, planted in zip(noisy.slopes, slopes, strict=True):
        assert slope.low < planted < slope.high


def test_the_published_slopes_fall_with_size():
    """CLIPA (arXiv:2305.07017), figure of accuracy against compute: S/16, B/16, L/16."""
    published = {
        22e6: (56.7, 56.05, 54.75, 53.9, 50.5),
        86e6: (64.1, 63.6, 62.9, 62.1, 59.9),
        304e6: (69.2, 69.0, 68.9, 68.1, 66.2),
    }
    tokens = (197, 101, 50, 37, 17)
    found = [
        Ladder(int(num), tuple(Cell(t, (s,)) for t, s in zip(tokens, scores, strict=True)))
        for num, scores in published.items()
    ]
    small, base, large = (slope.value for slope in fit_law(found, 1000, 0).slopes)
    assert small > base > large > 0


def test_intervals_hold_what_was_planted_and_nothing_is_claimed_where_nothing_is():
    rng = np.random.default_rng(5)
    laws = [fit_law(ladders((2, 2, 2), 2, 1.0, rng), 400, 0) for _ in range(200)]
    held = np.mean([slope.low < 2 < slope.high for law in laws for slope in law.slopes])
    assert 0.9 < held < 0.995  # 95 % are meant
    assert np.mean([law.verdict != "does not show" for law in laws]) < 0.08


def test_the_interval_is_as_wide_as_the_spread_between_seeds_makes_it():
    """One shorter length and one size: a = (full - short) / x, whose variance is known."""
    rng = np.random.default_rng(6)
    scores = rng.normal(size=(2, 400))
    ladder = Ladder(1000, (Cell(40, tuple(scores[0])), Cell(10, tuple(scores[1]))))
    slope = fit_law([ladder], 4000, 0).slopes[0]
    error = np.sqrt(scores.var(axis=1, ddof=1).sum() / 400) / np.log2(40 / 10)
    assert (slope.high - slope.low) / 2 == pytest.approx(1.96 * error, rel=0.06)


def test_one_seed_or_one_size_shows_nothing():
    rng = np.random.default_rng(0)
    alone = fit_law(ladders((3, 2, 1), 1, 0.0, rng), 1000, 0)
    assert alone.verdict == "does not show" and alone.slopes[0].low is None
    assert alone.trend is not None and alone.trend.value < 0
    one_size = fit_law(ladders((3, 2, 1), 2, 0.1, rng)[:1], 1000, 0)
    assert one_size.verdict == "does not show" and one_size.trend is None


def test_the_same_seed_draws_the_same_intervals():
    found = ladders((3, 2, 1), 2, 1.0, np.random.default_rng(2))
    assert fit_law(found, 1000, 4) == fit_law(found, 1000, 4)
    assert fit_law(found, 1000, 4) != fit_law(found, 1000, 5)


def test_nothing_is_never_less_than_nothing():
    assert str(Estimate(-0.001, -0.004, 0.004)) == "0.00 (0.00 to 0.00)"
