"""Chain arithmetic with misconceptions: questions, facts, and right derivations.

A question is a start value and k operations, all arithmetic modulo 47: ``5 +3 *2 -6``.  A *fact* is a
pair (value, operation).  The imperfect author of the seed corpus knows each fact with a fixed
probability and has one misconception about it; the grader of the corpus knows each fact better than
the author, and shares the misconception where it does not.  Everything here follows from LAB_SEED.

A solution is text, one step a line and the answer last; each line restates the value it starts from::

    5 +3 =8
    8 *2 =16
    Answer 16
"""

from __future__ import annotations

import random
from dataclasses import dataclass

P = 47
OPS = ("+3", "+5", "+8", "+11", "+17", "-2", "-6", "-9", "-13", "*2", "*3", "*5", "*7", "*10")
MAX_K = 16
LAB_SEED = 2408_03314


@dataclass(frozen=True)
class Class_:
    """A class of facts: its fraction of all facts, and how often author and grader know a fact of it."""

    share: float
    author: float
    grader: float


CLASSES = (Class_(0.60, 0.98, 0.99), Class_(0.22, 0.80, 0.93), Class_(0.11, 0.50, 0.82), Class_(0.07, 0.15, 0.70))
MISCONCEPTION_SHARE = 0.7  # of the author's wrong results; the others are random values


@dataclass(frozen=True)
class Fact:
    """A fact about (value, op): the right result, the misconception, and the class."""

    value: int
    op: str
    right: int
    misconception: int
    class_: Class_


def apply(value: int, op: str) -> int:
    """The right result of one operation, in 0 to P - 1."""
    n = int(op[1:])
    match op[0]:
        case "+":
            return (value + n) % P
        case "-":
            return (value - n) % P
        case "*":
            return (value * n) % P
    raise ValueError(f"not an operation: {op!r}")


def _facts(seed: int) -> dict[tuple[int, str], Fact]:
    rng = random.Random(seed)
    pairs = [(value, op) for value in range(P) for op in OPS]
    rng.shuffle(pairs)
    facts, at, share = {}, 0, 0.0
    for class_ in CLASSES:
        share += class_.share
        end = round(share * len(pairs))
        for value, op in pairs[at:end]:
            right = apply(value, op)
            facts[value, op] = Fact(value, op, right, other(rng, right), class_)
        at = end
    return facts


def other(rng: random.Random, right: int) -> int:
    """A uniformly random value other than `right`."""
    return (right + rng.randrange(1, P)) % P


FACTS = _facts(LAB_SEED)


def make_question(rng: random.Random, k: int) -> str:
    """A uniformly random question of k operations."""
    return " ".join([str(rng.randrange(P)), *(rng.choice(OPS) for _ in range(k))])


def parse_question(text: str) -> tuple[int, tuple[str, ...]]:
    """``5 +3 *2`` -> (5, ("+3", "*2")). Raises ValueError if it is not a question."""
    start, *ops = text.split()
    value = int(start)
    if not ops or not 0 <= value < P or any(op not in OPS for op in ops):
        raise ValueError(f"not a question: {text!r}")
    return value, tuple(ops)


def facts_of(question: str) -> list[Fact]:
    """The facts that the right derivation of the question uses, in order."""
    value, ops = parse_question(question)
    facts = []
    for op in ops:
        facts.append(FACTS[value, op])
        value = facts[-1].right
    return facts


def answer_of(question: str) -> str:
    return str(facts_of(question)[-1].right)


def derivation(question: str) -> list[str]:
    """The lines of the only right solution; the last one is the answer."""
    facts = facts_of(question)
    return [f"{fact.value} {fact.op} ={fact.right}" for fact in facts] + [f"Answer {facts[-1].right}"]


def parse_step(line: str) -> tuple[int, str, int] | None:
    """``5 +3 =8`` -> (5, "+3", 8); None if the line is not a step."""
    words = line.split()
    if len(words) != 3 or words[1] not in OPS or not words[2].startswith("="):
        return None
    value, result = words[0], words[2][1:]
    if not (value.isdigit() and result.isdigit() and int(value) < P and int(result) < P):
        return None
    return int(value), words[1], int(result)


def step_is_right(line: str) -> bool:
    """Whether the line is a step with the right result for its own value and operation."""
    step = parse_step(line)
    return step is not None and apply(step[0], step[1]) == step[2]


def parse_solution(text: str) -> tuple[list[str], str | None]:
    """(the lines before the answer, the answer or None) of a text; anything after the answer is ignored."""
    steps = []
    for line in text.strip().split("\n"):
        words = line.split()
        if words[:1] == ["Answer"]:
            return steps, words[1] if len(words) == 2 and words[1].isdigit() else None
        steps.append(line.strip())
    return steps, None


def right_so_far(question: str, lines: list[str]) -> list[bool]:
    """For every line of a solution (answer included): whether it and all lines before it are right."""
    truth = derivation(question)
    verdicts, good = [], True
    for i, line in enumerate(lines):
        good = good and i < len(truth) and line.split() == truth[i].split()
        verdicts.append(good)
    return verdicts


def steps_are_right(question: str, solution: str) -> bool:
    """Whether every step and the answer of a solution are right. Recipes name this function as step checker."""
    lines = [line for line in solution.strip().split("\n") if line.strip()]
    return len(lines) == len(derivation(question)) and all(right_so_far(question, lines))
