"""Combine rows of several runs into claims with an interval and a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eval.claims.rows import Row
from flywheel.measure.stats import bootstrap_runs


@dataclass(frozen=True)
class Claim:
    """`ours` with its 95% interval [low, high]; a row of claims.json."""

    id: str
    claim: str
    paper: str
    ours: float
    low: float
    high: float
    verdict: str
    unit: str
    runs: list[float]  # the mean of each run
    command: str


def verdict(low: float, high: float, zero: float = 0.0, most: float | None = None) -> str:
    """`holds` if the whole interval is above `zero` (below `most`), `fails` if it is wholly beyond, else `undecided`.

    `no difference` if it is `zero` itself: both sides gave the same answers everywhere.
    """
    if most is not None:
        return verdict(-high, -low, -most)
    if low == high == zero:
        return "no difference"
    return "holds" if low > zero else "fails" if high < zero else "undecided"


def spread(rows: Mapping[str, Row], own: Sequence[str], every: Sequence[str]) -> dict[str, Row]:
    """Rows over the questions `own` as rows over the questions `every`, with NaN for the others."""
    place, out = [every.index(question) for question in own], {}
    for id, row in rows.items():
        values = np.full(len(every), np.nan)
        values[place] = row.values
        out[id] = replace(row, values=values)
    return out


def combine(runs: Sequence[Mapping[str, Row]], command: str) -> list[Claim]:
    """Each claim over all runs that have its row; rows must be over the same questions in the same order.

    `ours` is the mean of the runs' means, its interval a bootstrap over questions and runs.
    """
    claims = []
    for id in dict.fromkeys(id for rows in runs for id in rows):
        found = [row for rows in runs if (row := rows.get(id)) and not np.isnan(row.values).all()]
        if found:
            mean, low, high = bootstrap_runs([row.values for row in found])
            first, alone = found[0], [float(np.nanmean(row.values)) for row in found]
            decided = verdict(low, high, first.zero, first.most)
            claims.append(Claim(id, first.claim, first.paper, mean, low, high, decided, first.unit, alone, command))
    return claims
