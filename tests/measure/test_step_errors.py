"""The first wrong step by threshold, on values made by hand."""

from __future__ import annotations

import pytest

from flywheel.measure.step_errors import best_threshold, step_errors

VALUES = [(0.9, 0.8, 0.7), (0.9, 0.2, 0.1), (0.4, 0.3), (0.9, 0.6)]
WRONG = [None, 1, 1, None]  # the third is called wrong a step too early wherever its second step is


def test_f1_is_the_harmonic_mean_of_both_accuracies():
    found = step_errors(VALUES, WRONG, 0.5)
    assert (found.on_wrong, found.on_right) == (0.5, 1.0) and found.f1 == pytest.approx(2 / 3)
    assert step_errors(VALUES, WRONG, 0.35).f1 == 1.0  # 0.4 passes, 0.3 does not
    assert step_errors(VALUES, WRONG, 0.0).f1 == 0.0  # nothing is called wrong
    assert step_errors(VALUES, WRONG, best_threshold(VALUES, WRONG)).f1 == 1.0


def test_without_both_kinds_of_solutions_there_is_no_f1():
    for wrong in ([None] * 4, [0] * 4):
        with pytest.raises(ValueError, match="with and without an error"):
            step_errors(VALUES, wrong, 0.5)
