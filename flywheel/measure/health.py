"""Adapters that have gone wrong, told by what they write: figures, and the faults in them.

A policy that answers everything alike, repeats its steps or never ends can still raise a
number by luck; a gate that sees these figures refuses it by name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from flywheel.records import Finish, Solution

LEAST_ENTROPY = 0.5  # of what one text a question would have
LENGTHS = (1 / 3, 3.0)  # of the last round's mean
MORE = 0.3  # rise of a share
COPIES = 0.8  # share of a reviser's attempts that repeat the incorrect one before them


@dataclass(frozen=True, slots=True)
class Health:
    """entropy: of the texts of all samples, in units of log(questions): 0 if every question gets one and the same text,
    1 if each has a text of its own, more where samples differ too. tokens: mean length. repeated, truncated: shares of samples."""

    entropy: float
    tokens: float
    repeated: float
    truncated: float


def health(solutions: Sequence[Solution]) -> Health:
    """Raises ValueError without solutions; of a single question the entropy is 1, there being nothing to tell apart."""
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
    """Whether a step stands there twice."""
    texts = [step.text.strip() for step in solution.steps]
    return len(set(texts)) < len(texts)


def faults(now: Health, before: Health) -> list[str]:
    """What is wrong with the new policy beside the last one, each with its figure; empty if nothing is."""
    found = []
    if now.entropy < LEAST_ENTROPY <= before.entropy:
        found.append(
            f"collapsed: entropy of its samples {now.entropy:.2f} of log(questions), {before.entropy:.2f} before"
        )
    for name in ("repeated", "truncated"):
        is_now, was = getattr(now, name), getattr(before, name)
        if is_now > was + MORE:
            found.append(f"{name}: {is_now:.0%} of samples, {was:.0%} before")
    if not LENGTHS[0] <= now.tokens / max(before.tokens, 1e-9) <= LENGTHS[1]:
        found.append(f"mean length {now.tokens:.0f} tokens, {before.tokens:.0f} before")
    return found


def copies(chains: Iterable[Sequence[tuple[Solution, bool]]]) -> float:
    """Share of attempts after an incorrect one that are that very text again. Each chain: (attempt, right) in order."""
    after, same = 0, 0
    for chain in chains:
        for (last, right), (new, _) in pairwise(chain):
            if not right:
                after += 1
                same += new.tokens == last.tokens
    return same / after if after else 0.0


def figures(one: Health) -> dict[str, float]:
    return asdict(one)
