"""What selection would have answered from fewer samples of a question, read off a larger pool."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flywheel.search.select import argmax, majority, weighted


@dataclass(frozen=True, slots=True)
class Scored:
    """One graded sample of a pool: its answer's key (or None), its PRM score, its verdict."""

    answer: str | None
    score: float
    correct: bool


Select = Callable[[Sequence[Scored]], str | None]  # returns an answer of the pool


def by_weight(pool: Sequence[Scored]) -> str | None:
    return weighted([s.answer for s in pool], [s.score for s in pool], key=str)


def by_majority(pool: Sequence[Scored]) -> str | None:
    return majority([s.answer for s in pool], key=str)


def by_argmax(pool: Sequence[Scored]) -> str | None:
    return argmax([s.answer for s in pool], [s.score for s in pool])


def accuracy_at(pool: Sequence[Scored], n: int, select: Select, draws: int, rng: random.Random) -> float:
    """P(the answer selected from n samples is right) for one question, from a larger pool.

    The mean over `draws` random subsets of size n without replacement; n = len(pool) is
    exact, with no draw. Raises ValueError if n is not in 1..len(pool).
    """
    if not 1 <= n <= len(pool):
        raise ValueError(f"accuracy_at: n = {n} of a pool of {len(pool)}")
    subsets = [pool] if n == len(pool) else [rng.sample(pool, n) for _ in range(draws)]
    return sum(_right(subset, select(subset)) for subset in subsets) / len(subsets)


def _right(pool: Sequence[Scored], answer: str | None) -> bool:
    return answer is not None and next(s.correct for s in pool if s.answer == answer)
