"""Accuracy of answer selection from n samples of a question, estimated from a larger pool."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flywheel.search.select import argmax, majority, weighted


@dataclass(frozen=True, slots=True)
class Scored:
    """One graded sample of a pool: answer (or None), PRM score in [0, 1], whether it is correct."""

    answer: str | None
    score: float
    correct: bool


Select = Callable[[Sequence[Scored]], str | None]  # pool -> answer; other records with these three fields work too
SELECT: dict[str, Select] = {
    "weighted": lambda pool: weighted([s.answer for s in pool], [s.score for s in pool]),
    "majority": lambda pool: majority([s.answer for s in pool]),
    "best": lambda pool: argmax([s.answer for s in pool], [s.score for s in pool]),
}


def is_right(pool: Sequence[Scored], select: Select) -> bool:
    """Whether the answer that `select` chooses from the pool is right; None is wrong."""
    answer = select(pool)
    return answer is not None and next(s.correct for s in pool if s.answer == answer)


def accuracy_at(pool: Sequence[Scored], n: int, select: Select, draws: int, rng: random.Random) -> float:
    """Estimate P(the answer selected from n samples is right) for one question, in [0, 1].

    The mean over `draws` random subsets of size n without replacement, or exact for n = len(pool). Raises ValueError
    if n is not in 1..len(pool).
    """
    if not 1 <= n <= len(pool):
        raise ValueError(f"accuracy_at: n = {n} of a pool of {len(pool)}")
    subsets = [pool] if n == len(pool) else [rng.sample(pool, n) for _ in range(draws)]
    return sum(is_right(subset, select) for subset in subsets) / len(subsets)
