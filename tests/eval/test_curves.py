"""Accuracy curves from a pool of samples, against cases worked by hand."""

import random

import pytest

from eval.curves import SELECT, Scored, accuracy_at

POOL = [
    Scored("7", 0.9, True),
    Scored("7", 0.8, True),
    Scored("4", 0.5, False),
    Scored("4", 0.4, False),
    Scored("4", 0.3, False),
    Scored(None, 0.0, False),
]


def test_a_curve_at_the_whole_pool_is_the_selection_itself():
    rng = random.Random(0)
    assert accuracy_at(POOL, 6, SELECT["weighted"], 1, rng) == 1.0  # 1.7 against 1.2
    assert accuracy_at(POOL, 6, SELECT["majority"], 1, rng) == 0.0  # two against three
    assert accuracy_at(POOL, 6, SELECT["best"], 1, rng) == 1.0


def test_a_curve_at_one_sample_is_the_pass_rate_and_the_best_of_a_perfect_scorer_is_pass_at_k():
    rng = random.Random(0)
    for select in SELECT.values():
        assert accuracy_at(POOL, 1, select, 4000, rng) == pytest.approx(2 / 6, abs=0.03)
    assert accuracy_at(POOL, 3, SELECT["best"], 4000, rng) == pytest.approx(0.8, abs=0.03)  # 1 - C(4, 3) / C(6, 3)
    with pytest.raises(ValueError, match="pool of 6"):
        accuracy_at(POOL, 7, SELECT["weighted"], 1, rng)
