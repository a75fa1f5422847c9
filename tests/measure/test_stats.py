"""Intervals against cases worked by hand."""

import numpy as np
import pytest

from flywheel.measure.stats import bootstrap_mean, bootstrap_runs, paired_gain


def test_a_bootstrap_interval_holds_the_mean_and_narrows_with_the_data():
    few, many = [0.0, 1.0] * 10, [0.0, 1.0] * 200
    mean, low, high = bootstrap_mean(few, seed=1)
    assert mean == 0.5 and 0.2 < low < 0.35 and 0.65 < high < 0.8  # 0.5 -+ 1.96 * 0.112
    _, low_many, high_many = bootstrap_mean(many, seed=1)
    assert high_many - low_many < 0.4 * (high - low)
    assert bootstrap_mean(few, seed=1) == bootstrap_mean(few, seed=1)


@pytest.mark.parametrize("values", [[0.3], [1, 1, 1], [0.0] * 50])
def test_constant_data_has_an_interval_of_no_width(values):
    assert bootstrap_mean(values) == (values[0],) * 3


@pytest.mark.parametrize("values", [[], [0.5, float("nan")]])
def test_no_data_or_a_nan_is_refused(values):
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean(values)


def test_a_paired_gain_sees_what_the_spread_between_questions_hides():
    before = [i / 40 for i in range(40)]
    after = [x + 0.05 + 0.01 * (i % 2) for i, x in enumerate(before)]
    gain, low, high = paired_gain(before, after)
    assert gain == pytest.approx(0.055) and 0.05 < low < gain < high < 0.06
    with pytest.raises(ValueError, match="same ones"):
        paired_gain(before, after[1:])


def test_runs_that_differ_widen_the_interval_and_runs_that_agree_share_their_questions():
    rng = np.random.default_rng(0)
    questions = rng.random(400)
    mean, low, high = bootstrap_mean(questions)
    same = bootstrap_runs([questions] * 3)  # three times the same run: no more is known
    assert same[0] == pytest.approx(mean) and same[1:] == pytest.approx((low, high), abs=0.01)
    apart = bootstrap_runs([questions - 0.3, questions, questions + 0.3])
    assert apart[0] == pytest.approx(mean) and apart[2] - apart[1] > 3 * (high - low)
    half = np.where(np.arange(400) < 200, questions, np.nan)
    assert bootstrap_runs([questions, half])[0] == pytest.approx((mean + questions[:200].mean()) / 2)
    lonely = np.full((2, 2), np.nan)
    lonely[0] = lonely[1, 0] = 1.0
    # a draw without the second run's only question counts the first alone
    assert bootstrap_runs(lonely) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="each run with a number"):
        bootstrap_runs([[1.0], [float("nan")]])
