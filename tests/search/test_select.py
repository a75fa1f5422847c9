"""Selection and its curves against cases worked by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel.search.select import argmax, hierarchical, majority, weighted


def test_weighted_sums_the_scores_of_an_answer():
    answers = ["7", "12", "7", "12", "12", None]
    assert weighted(answers, [0.9, 0.5, 0.9, 0.6, 0.6, 1.0]) == "7"  # 1.8 against 1.7
    assert weighted(answers, [0.9, 0.6, 0.9, 0.7, 0.6, 1.0]) == "12"  # 1.8 against 1.9
    assert majority(answers) == "12"
    assert argmax(answers, [0.1, 0.5, 0.9, 0.6, 0.6, 1.0]) == "7"


def test_answers_that_differ_in_writing_only_are_one():
    answers = ["1,080", "5", "$1080$", "5.0", "1080"]
    assert majority(answers) == "1,080"  # as first written
    assert weighted(answers, [0.1, 0.9, 0.1, 0.9, 0.1]) == "5"


def test_no_parsable_answer_never_wins():
    assert weighted([None, None, "3"], [9.0, 9.0, 0.0]) == "3"
    assert majority([None, None, "3"]) == "3" and argmax([None, "3"], [1.0, 0.0]) == "3"
    for nothing in ([], [None, None]):
        scores = [1.0] * len(nothing)
        assert weighted(nothing, scores) is majority(nothing) is argmax(nothing, scores) is None


def test_ties_go_to_the_answer_that_came_first():
    assert majority(["b", "a", "a", "b"]) == "b"
    assert weighted(["a", "b"], [0.0, 0.0]) == "a"
    assert argmax(["b", "a"], [0.5, 0.5]) == "b"


def test_scores_and_answers_must_be_as_many():
    with pytest.raises(ValueError):
        weighted(["1", "2"], [0.5])


@settings(deadline=None)  # a busy machine is no fault
@given(st.lists(st.tuples(st.sampled_from(["1", "2", "3", None]), st.floats(0, 1)), max_size=12), st.randoms())
def test_the_winner_does_not_depend_on_the_order_unless_tied(pairs, rng):
    def sums(items):
        return {a: sum(sorted(s for b, s in items if b == a)) for a, _ in items if a is not None}

    totals = sorted(sums(pairs).values())
    shuffled = rng.sample(pairs, len(pairs))
    winner, again = (weighted([a for a, _ in p], [s for _, s in p]) for p in (pairs, shuffled))
    if len(totals) > 1 and totals[-1] - totals[-2] < 1e-9:
        assert sums(pairs)[again] == pytest.approx(sums(pairs)[winner])
    else:
        assert winner == again


def test_chains_are_selected_within_and_then_across():
    chains = [
        (["5", "8", "8"], [0.9, 0.5, 0.5]),  # 8 wins with 1.0, its best solution has 0.5
        (["5", "9", "5"], [0.3, 0.7, 0.3]),  # 9 wins with 0.7
        (["5", "8", None], [0.6, 0.1, 0.9]),  # 5 wins with 0.6
    ]
    assert hierarchical(chains) == "9"  # 0.7 against 0.5 and 0.6; by the chains' sums 8 would have won with 1.0
    pooled = [pair for answers, scores in chains for pair in zip(answers, scores)]
    assert weighted([a for a, _ in pooled], [s for _, s in pooled]) == "5"
    assert hierarchical([([None], [0.5])]) is None and hierarchical([]) is None
