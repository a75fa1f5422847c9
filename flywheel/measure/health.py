"""Signs of a broken adapter in what it writes.

A policy that gives every question the same text, repeats its steps or never ends can raise a figure by luck; the gate
refuses one that shows such a fault, and names it. A reviser that only copies its last attempt is told the same way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from flywheel.records import Finish, Solution

MIN_ENTROPY = 0.5  # below it, a policy has collapsed
LENGTH_RATIO = (1 / 3, 3.0)  # of the mean length to that of the last policy
MAX_RISE = 0.3  # of the fraction of repeated or truncated samples
COPIES = 0.8  # a reviser whose fraction of copies is above this is not used


@dataclass(frozen=True, slots=True)
class Health:
    """Figures of a set of samples.

    entropy: of the distribution of their texts, divided by log(number of questions): 0 if all questions get the same
        text, 1 if each has one text of its own, above 1 if the samples of a question differ too.
    tokens: the mean length.
    repeated, truncated: the fractions of samples in which a step occurs twice, and that hit the limit on tokens.
    """

    entropy: float
    tokens: float
    repeated: float
    truncated: float


def health(solutions: Sequence[Solution]) -> Health:
    """Raises ValueError without solutions. With a single question the entropy is 1: there is nothing to compare."""
    if not solutions:
        raise ValueError("health: no solutions")
    n, questions = len(solutions), len({s.question_id for s in solutions})
    counts = Counter(s.text for s in solutions)
    entropy = sum(c / n * math.log(n / c) for c in counts.values())
    return Health(
        entropy=entropy / math.log(questions) if questions > 1 else 1.0,
        tokens=sum(len(s.tokens) for s in solutions) / n,
        repeated=sum(repeats(s) for s in solutions) / n,
        truncated=sum(s.finish is Finish.LENGTH for s in solutions) / n,
    )


def repeats(solution: Solution) -> bool:
    """Whether some step occurs twice."""
    texts = [step.text.strip() for step in solution.steps]
    return len(set(texts)) < len(texts)


def faults(now: Health, before: Health) -> list[str]:
    """What is wrong with a new policy (`now`) that was not with the last one (`before`), one line a fault."""
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
    """The fraction of attempts after an incorrect one that repeat it token by token; 0 where there are none.

    A chain holds its (attempt, whether it is correct) in order.
    """
    after_incorrect = [
        new.tokens == last.tokens for chain in chains for (last, correct), (new, _) in pairwise(chain) if not correct
    ]
    return sum(after_incorrect) / len(after_incorrect) if after_incorrect else 0.0


def figures(one: Health) -> dict[str, float]:
    """As a manifest holds them."""
    return asdict(one)
