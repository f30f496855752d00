from __future__ import annotations

import numpy as np

from clipgraft.data.draws import as_uniform, draw_bits


def test_a_function_of_each_sample_alone() -> None:
    rows = np.array([5, 0, 7_000_000_000])
    whole = draw_bits(3, rows, 2, 4)
    assert whole.shape == (3, 4) and whole.dtype == np.uint64
    for i, row in enumerate(rows):
        assert (draw_bits(3, np.array([row]), 2, 4) == whole[i]).all()
    assert (draw_bits(3, rows, 2, 2) == whole[:, :2]).all()
    assert (draw_bits(3, rows, np.array([2, 1, 2]), 4)[[0, 2]] == whole[[0, 2]]).all()


def test_all_different_and_uniform() -> None:
    rows = np.arange(20_000)
    many = [draw_bits(seed, rows, epoch, 3) for seed in (0, 1) for epoch in (0, 1)]
    assert len(np.unique(np.concatenate(many))) == 4 * 3 * len(rows)
    values = as_uniform(many[0])
    assert values.min() >= 0 and values.max() < 1
    counts = np.stack([np.histogram(values[:, k], 10, (0, 1))[0] for k in range(3)])
    # 20,000 draws in 10 bins: the standard deviation of a count is 42.
    assert np.abs(counts - 2_000).max() < 5 * 42
    for k in range(2):
        assert abs(np.corrcoef(values[:, k], values[:, k + 1])[0, 1]) < 4 / np.sqrt(len(rows))
    assert abs(np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1]) < 4 / np.sqrt(len(rows))
