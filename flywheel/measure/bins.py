"""Difficulty bins: quantile bins route compute, fixed bins measure progress.

Bins count from 1 (easiest). Quantile bins are the paper's (Snell et al., 3.2) and move
with the model; fixed bins are edges on pass@1 that stay, so that a question which leaves
bin 5 really became easier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def quantile_bins(rates: Mapping[str, float], bins: int = 5) -> dict[str, int]:
    """Question id -> bin, by falling pass rate; sizes differ by at most one, ties go by id."""
    order = sorted(rates, key=lambda id: (-rates[id], id))
    return {id: 1 + place * bins // len(order) for place, id in enumerate(order)}


def quantile_edges(scores: Sequence[float], bins: int = 5) -> list[float]:
    """The bins - 1 falling edges that cut `scores` into equal parts, for `fixed_bin`.

    With them a question outside the set is binned by a score of its own, the mean PRM score
    of a probe, say. Raises ValueError on no scores.
    """
    if not len(scores):
        raise ValueError("quantile_edges: no scores")
    return [
        float(edge) for edge in np.quantile(np.asarray(scores, dtype=float), [1 - i / bins for i in range(1, bins)])
    ]


def fixed_bin(rate: float, edges: Sequence[float]) -> int:
    """The bin of a rate under falling `edges`; an edge belongs to the easier bin.

    A rate should be the quotient correct / samples: then one on an edge compares equal to it.
    """
    return 1 + sum(rate < edge for edge in edges)


def fixed_bins(rates: Mapping[str, float], edges: Sequence[float]) -> dict[str, int]:
    """Question id -> fixed bin of its pass rate."""
    return {id: fixed_bin(rate, edges) for id, rate in rates.items()}


def migration(before: Mapping[str, int], after: Mapping[str, int], bins: int = 5) -> list[list[int]]:
    """Counts of questions by (bin before, bin after): rows before, columns after.

    Raises ValueError unless both hold the same questions.
    """
    if before.keys() != after.keys():
        raise ValueError(f"migration: {len(before.keys() ^ after.keys())} questions are on one side only")
    matrix = np.zeros((bins, bins), dtype=int)
    for id, bin in before.items():
        matrix[bin - 1, after[id] - 1] += 1
    return matrix.tolist()


def migration_null(first: Mapping[str, float], again: Mapping[str, float], edges: Sequence[float]) -> list[list[int]]:
    """The migration that sampling alone gives: fixed bins from two independent draws of one model.

    `first` and `again`: question id -> pass rate. A question binned by a finite sample moves
    when it is sampled afresh though nothing was learned (regression to the mean), so gains
    are read beside this matrix. Both draws want the size of the draws that are compared:
    halves of one sample are noisier, and overstate the null.
    """
    return migration(fixed_bins(first, edges), fixed_bins(again, edges), len(edges) + 1)


def left_bin(matrix: Sequence[Sequence[float]], bin: int) -> float | None:
    """The share of `bin`'s questions that ended in another bin; None where it held none."""
    row = matrix[bin - 1]
    return 1 - row[bin - 1] / sum(row) if sum(row) else None
