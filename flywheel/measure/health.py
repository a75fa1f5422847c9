"""Detect a broken adapter by its samples.

A policy that writes the same text for every question, repeats steps or never ends may still pass the gate's test by
luck, so the gate refuses one with such a fault and names it. `copies` detects a reviser that repeats its last attempt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from flywheel.records import Finish, Solution

MIN_ENTROPY = 0.5  # a policy with less has collapsed
LENGTH_RATIO = (1 / 3, 3.0)  # allowed range of mean length / mean length of the last policy
MAX_RISE = 0.3  # allowed increase of the fraction of repeated or truncated samples
COPIES = 0.8  # a reviser with a larger fraction of copies is not used


@dataclass(frozen=True, slots=True)
class Health:
    """Figures of a set of samples.

    entropy: of the distribution of texts, divided by log(number of questions): 0 if all samples are the same text,
        1 if each question has one text that differs from the others', above 1 if a question's samples differ too.
    tokens: the mean length.
    repeated, truncated: the fractions of samples in which a step occurs twice, and that were truncated.
    """

    entropy: float
    tokens: float
    repeated: float
    truncated: float


def health(solutions: Iterable[Solution]) -> Health:
    """The figures of `solutions`; entropy is 1 for a single question. Raises ValueError if there are no solutions."""
    counts: Counter[int] = Counter()  # by hash: the texts themselves may be more than memory holds
    questions: set[str] = set()
    tokens = repeated = truncated = 0
    for s in solutions:
        counts[hash(s.text)] += 1
        questions.add(s.question_id)
        tokens, repeated = tokens + s.generated, repeated + repeats(s)
        truncated += s.finish is Finish.LENGTH
    if not (n := counts.total()):
        raise ValueError("health: no solutions")
    entropy = sum(c / n * math.log(n / c) for c in counts.values())
    return Health(
        entropy=entropy / math.log(len(questions)) if len(questions) > 1 else 1.0,
        tokens=tokens / n,
        repeated=repeated / n,
        truncated=truncated / n,
    )


def repeats(solution: Solution) -> bool:
    """Whether some step occurs twice, blank ones aside."""
    texts = [text for step in solution.steps if (text := step.text.strip())]
    return len(set(texts)) < len(texts)


def faults(now: Health, before: Health) -> list[str]:
    """Faults of a new policy (`now`) that the last one (`before`) did not have, one line per fault."""
    found = []
    if now.entropy < MIN_ENTROPY <= before.entropy:
        found.append(
            f"collapsed: entropy of its samples {now.entropy:.2f} x log(questions), {before.entropy:.2f} before"
        )
    for name in ("repeated", "truncated"):
        new, old = getattr(now, name), getattr(before, name)
        if new > old + MAX_RISE:
            found.append(f"{name}: {new:.0%} of samples, {old:.0%} before")
    if not LENGTH_RATIO[0] <= now.tokens / max(before.tokens, 1e-9) <= LENGTH_RATIO[1]:
        found.append(f"mean length {now.tokens:.0f} tokens, {before.tokens:.0f} before")
    return found


def copies(chains: Iterable[Sequence[tuple[Solution, bool]]]) -> float:
    """The fraction of attempts after an incorrect one that repeat it token by token; 0 if there are none.

    `chains`: each the (attempt, whether it is correct) pairs of a revision chain, in order.
    """
    after_incorrect = [
        new.tokens == last.tokens for chain in chains for (last, correct), (new, _) in pairwise(chain) if not correct
    ]
    return sum(after_incorrect) / len(after_incorrect) if after_incorrect else 0.0
