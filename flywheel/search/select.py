"""Select one answer among many (Snell et al., 5.1 and 6.1). Pure functions that see no gold answer.

Answers with the same `answer_key` count as one, so spelling does not matter. None (no answer
could be parsed) never wins. Ties go to the answer that appeared first.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from flywheel.problems.grading import answer_key

Answers = Sequence[str | None]


def weighted(answers: Answers, scores: Sequence[float]) -> str | None:
    """Best-of-N weighted: the answer whose solutions have the largest sum of scores.

    `scores[i]` >= 0 is the PRM score of `answers[i]`. Returns the first spelling of the
    winner, or None if no answer could be parsed.
    """
    groups: dict[str, tuple[str, list[float]]] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            groups.setdefault(answer_key(answer), (answer, []))[1].append(score)
    # fsum: the exact sum does not depend on the order, so neither does the winner
    heaviest = max(groups.values(), key=lambda group: fsum(group[1]), default=(None, []))
    return heaviest[0]


def majority(answers: Answers) -> str | None:
    """The most frequent answer."""
    return weighted(answers, [1.0] * len(answers))


def argmax(answers: Answers, scores: Sequence[float]) -> str | None:
    """Plain best-of-N: the answer of the highest-scoring solution."""
    parsed = [(answer, score) for answer, score in zip(answers, scores, strict=True) if answer is not None]
    return max(parsed, key=lambda item: item[1])[0] if parsed else None


def hierarchical(chains: Sequence[tuple[Answers, Sequence[float]]]) -> str | None:
    """Best-of-N weighted within each revision chain, then across the chains' winners (6.1).

    In the second vote each winner has the score of its best solution in its chain (appendix I).
    """
    winners = []
    for answers, scores in chains:
        if (won := weighted(answers, scores)) is not None:
            key = answer_key(won)
            best = max(s for a, s in zip(answers, scores, strict=True) if a is not None and answer_key(a) == key)
            winners.append((won, best))
    return weighted([answer for answer, _ in winners], [score for _, score in winners])
