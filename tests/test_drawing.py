"""The numbers behind the figures of the report page; test_report.py draws them all."""

import numpy as np
import pytest

from rlhf_jax.pages import drawing


def test_series_skips_gaps_and_thins_by_means():
    rows = [
        {'step': 1, 'x': 1.0},
        {'step': 2},
        {'step': 3, 'x': None},
        {'step': 4, 'x': 4},
    ]
    steps, values = drawing.series(rows, 'x')
    assert steps.tolist() == [1, 4] and values.tolist() == [1, 4]
    many = [{'step': i, 'x': i % 2} for i in range(2 * drawing.MAX_POINTS)]
    steps, values = drawing.series(many, 'x')
    assert len(steps) == drawing.MAX_POINTS and set(values) == {0.5}
    assert steps[0] == 0.5  # the mean of steps 0 and 1


def test_smooth_is_a_mean_that_starts_at_the_first_point():
    values = np.arange(80.0)  # windows of 2 to each side
    got = drawing.smooth(values)
    assert got[0] == 0 and got[1] == 1  # shrunk to nothing, then to 0, 1, 2
    assert got[40] == 40
    assert got[79] == (77 + 78 + 79) / 3  # one-sided at the end


def test_wilson_interval_by_hand():
    # 8 of 10: Wilson's 95% interval is [0.4902, 0.9433]
    low, high = drawing.wilson(np.array([0.8]), np.array([10.0]))[:, 0]
    assert 0.8 - low == pytest.approx(0.4902, abs=1e-4)
    assert 0.8 + high == pytest.approx(0.9433, abs=1e-4)
