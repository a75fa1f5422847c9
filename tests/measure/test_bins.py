"""Bin edges, quantile sizes and migration against cases worked by hand."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel.measure.bins import fixed_bin, fixed_bins, left_bin, migration, quantile_bins, quantile_edges

EDGES = [0.8, 0.6, 0.4, 0.2]


def test_an_edge_belongs_to_the_easier_bin():
    rates = {"a": 1.0, "b": 0.8, "c": 0.79, "d": 0.6, "e": 0.4, "f": 0.2, "g": 0.19, "h": 0.0}
    assert fixed_bins(rates, EDGES) == {"a": 1, "b": 1, "c": 2, "d": 2, "e": 3, "f": 4, "g": 5, "h": 5}


@given(st.integers(1, 40))
def test_a_rate_on_an_edge_is_on_it_whatever_the_number_of_samples(fifth):
    for bin, edge in enumerate(EDGES, start=1):
        correct, samples = round(edge * 5) * fifth, 5 * fifth
        assert fixed_bin(correct / samples, EDGES) == bin
        assert fixed_bin((correct - 1) / samples, EDGES) > bin


@given(st.dictionaries(st.text(max_size=4), st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=60), st.integers(1, 7))
def test_quantile_bins_are_even_ordered_and_independent_of_the_order_of_questions(rates, bins):
    found = quantile_bins(rates, bins)
    sizes = [list(found.values()).count(b) for b in range(1, bins + 1)]
    assert sum(sizes) == len(rates) and max(sizes) - min(sizes) <= 1
    for a in rates:
        for b in rates:
            if (-rates[a], a) < (-rates[b], b):
                assert found[a] <= found[b]
    shuffled = random.Random(0).sample(list(rates.items()), len(rates))
    assert quantile_bins(dict(shuffled), bins) == found


def test_quantile_bins_by_hand():
    rates = {"q1": 0.1, "q2": 0.9, "q3": 0.5, "q4": 0.5, "q5": 0.0}
    assert quantile_bins(rates) == {"q2": 1, "q3": 2, "q4": 3, "q1": 4, "q5": 5}


def test_migration_has_rows_before_and_columns_after():
    before, after = {"a": 5, "b": 5, "c": 1, "d": 5}, {"a": 2, "b": 5, "c": 1, "d": 2}
    matrix = migration(before, after)
    assert matrix[4] == [0, 2, 0, 0, 1] and matrix[0] == [1, 0, 0, 0, 0] and sum(map(sum, matrix)) == 4
    assert left_bin(matrix, 5) == pytest.approx(2 / 3) and left_bin(matrix, 1) == 0.0 and left_bin(matrix, 3) is None
    with pytest.raises(ValueError, match="1 questions are on one side"):
        migration(before, {"a": 2, "b": 5, "c": 1})


def test_sampling_again_alone_moves_questions_near_an_edge():
    """The null shows the regression to the mean that a matrix of real rounds would hide in its gains."""
    rng = random.Random(0)

    def draw(samples: int) -> dict[str, float]:
        return {f"q{i}": sum(rng.random() < 0.22 for _ in range(samples)) / samples for i in range(400)}

    small, large = (migration(*(fixed_bins(draw(n), EDGES) for _ in range(2))) for n in (16, 1024))
    assert left_bin(small, 5) > 0.4  # nothing was learned, and yet they leave
    assert left_bin(large, 5) is None or left_bin(large, 5) > 0.8  # at 0.22 hardly any is in bin 5
    assert left_bin(large, 4) < 0.15 < left_bin(small, 4)


def test_quantile_edges_bin_a_new_question_as_its_rank_among_the_scores_would():
    scores = [0.1 * i for i in range(1, 11)]
    edges = quantile_edges(scores)
    assert edges == sorted(edges, reverse=True) and len(edges) == 4
    assert [fixed_bin(score, edges) for score in reversed(scores)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    with pytest.raises(ValueError, match="no scores"):
        quantile_edges([])
