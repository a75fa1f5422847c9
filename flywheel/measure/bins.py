"""Difficulty bins: quantile bins choose the strategy for a question, fixed bins measure progress.

Bins count from 1 (easiest). Quantile bins (Snell et al. 2024, section 3.2) are computed anew for every model. Fixed
bins have constant edges on pass@1, so a question that leaves bin 5 has become easier for the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def quantile_bins(rates: Mapping[str, float], bins: int = 5) -> dict[str, int]:
    """Question id -> bin by descending pass rate; bin sizes differ by at most one, ties are ordered by id."""
    order = sorted(rates, key=lambda id: (-rates[id], id))
    return {id: 1 + place * bins // len(order) for place, id in enumerate(order)}


def quantile_edges(scores: Sequence[float], bins: int = 5) -> list[float]:
    """The `bins` - 1 descending edges that divide `scores` into equal parts, for `fixed_bin`.

    With them, a new question can be binned by its own score, e.g. the mean PRM score of a few samples. Raises
    ValueError if `scores` is empty.
    """
    if not len(scores):
        raise ValueError("quantile_edges: no scores")
    return np.quantile(np.asarray(scores, dtype=float), [1 - i / bins for i in range(1, bins)]).tolist()


def fixed_bin(rate: float, edges: Sequence[float]) -> int:
    """The bin of a rate under descending `edges`; a rate equal to an edge is in the easier bin.

    Compute the rate as correct / samples, so that a rate on an edge equals it exactly in floating point.
    """
    return 1 + sum(rate < edge for edge in edges)


def fixed_bins(rates: Mapping[str, float], edges: Sequence[float]) -> dict[str, int]:
    """Question id -> fixed bin of its pass rate."""
    return {id: fixed_bin(rate, edges) for id, rate in rates.items()}


def migration(before: Mapping[str, int], after: Mapping[str, int], bins: int = 5) -> list[list[int]]:
    """(bins, bins) counts of questions: rows are bins before, columns bins after.

    Raises ValueError unless both have the same questions.
    """
    if before.keys() != after.keys():
        raise ValueError(f"migration: {len(before.keys() ^ after.keys())} questions are on one side only")
    matrix = np.zeros((bins, bins), dtype=int)
    for id, bin in before.items():
        matrix[bin - 1, after[id] - 1] += 1
    return matrix.tolist()


def left_bin(matrix: Sequence[Sequence[float]], bin: int) -> float | None:
    """The fraction of the questions of `bin` that ended in another bin; None if the bin was empty."""
    row = matrix[bin - 1]
    return 1 - row[bin - 1] / sum(row) if sum(row) else None
