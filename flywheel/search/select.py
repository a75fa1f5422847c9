"""From many answers to one (Snell et al., 5.1 and 6.1). Pure functions, no gold.

Answers that differ only in writing are one answer (`answer_key`); None, where no answer
could be parsed, never wins. Ties go to the answer that appeared first.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum

from flywheel.problems.grading import answer_key

Answers = Sequence[str | None]
Key = Callable[[str], str]


def weighted(answers: Answers, scores: Sequence[float], key: Key = answer_key) -> str | None:
    """Best-of-N weighted: the answer whose solutions have the largest sum of scores.

    `answers[i]` has the verifier's score `scores[i]` >= 0. Returns the winner as it was
    first written; None where no answer could be parsed.
    """
    return _heaviest(answers, scores, key)[0]


def majority(answers: Answers, key: Key = answer_key) -> str | None:
    """The most frequent answer."""
    return weighted(answers, [1.0] * len(answers), key)


def argmax(answers: Answers, scores: Sequence[float]) -> str | None:
    """Plain best-of-N: the answer of the one solution of highest score."""
    parsed = [(answer, score) for answer, score in zip(answers, scores, strict=True) if answer is not None]
    return max(parsed, key=lambda item: item[1])[0] if parsed else None


def hierarchical(chains: Sequence[tuple[Answers, Sequence[float]]], key: Key = answer_key) -> str | None:
    """Best-of-N weighted within each revision chain, then across the chains' winners (6.1).

    A winner enters the second vote with the sum of scores that it won its chain with.
    """
    winners = [_heaviest(answers, scores, key) for answers, scores in chains]
    return weighted([answer for answer, _ in winners], [weight for _, weight in winners], key)


def _heaviest(answers: Answers, scores: Sequence[float], key: Key) -> tuple[str | None, float]:
    groups: dict[str, tuple[str, list[float]]] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            groups.setdefault(key(answer), (answer, []))[1].append(score)
    # fsum: the exact sum does not depend on the order, so neither does the winner
    return max(
        ((answer, fsum(group)) for answer, group in groups.values()), key=lambda item: item[1], default=(None, 0.0)
    )


# ---- curves: what selection would have answered from fewer of the samples ------------


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
