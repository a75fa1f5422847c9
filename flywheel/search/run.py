"""Run one strategy on one question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flywheel.ledger import metered
from flywheel.records import Beam, BestOfN, Candidate, Outcome, Question, Revise, Strategy
from flywheel.search.beam import beam
from flywheel.search.best_of_n import best_of_n
from flywheel.search.plan import name
from flywheel.search.revise import revise
from flywheel.search.select import hierarchical, majority, weighted
from flywheel.search.tools import Tools


async def search(strategy: Strategy, question: Question, tools: Tools, *, tag: str) -> Outcome:
    """Search by `strategy` and select an answer. Solution ids are `question/tag/number`, so `tag` must be unique.

    Raises ValueError if `tools` lacks a model that the strategy needs, and TooLong if the
    question does not fit.
    """
    if not tools.can(strategy):
        raise ValueError(f"{name(strategy)}: needs a model that this search was not given")
    with metered() as spent:
        match strategy:
            case BestOfN():
                found = await best_of_n(strategy, question, tools, tag=tag)
            case Beam():
                found = await beam(strategy, question, tools, tag=tag)
            case Revise():
                found = await revise(strategy, question, tools, tag=tag)
    answer = select(strategy, found.candidates)
    return Outcome(question.id, name(strategy), found.candidates, answer, len(found.candidates), spent.tokens, found.extra)


def select(strategy: Strategy, candidates: Sequence[Candidate]) -> str | None:
    """The answer that `strategy` selects from its candidates."""
    answers, scores = [c.solution.answer for c in candidates], [c.score for c in candidates]
    match strategy:
        case BestOfN(select="majority") | Revise(select="majority"):
            return majority(answers)
        case BestOfN(select="weighted") | Beam():
            return weighted(answers, scores)
        case Revise(select="weighted"):
            starts = [i for i, c in enumerate(candidates) if c.solution.attempt == 1]
            return hierarchical([(answers[a:b], scores[a:b]) for a, b in zip(starts, [*starts[1:], len(answers)])])
        case _:
            raise ValueError(f"{name(strategy)}: select is `weighted` or `majority`")


def smaller(done: Strategy, outcome: Outcome, wanted: Strategy) -> Outcome | None:
    """What `wanted` would have found on the same draws, or None where `outcome` does not hold it.

    N samples hold the first n < N, a chain its own beginning, and a judged set the
    majority vote without its judge; tokens are those of the part alone.
    """
    match done, wanted:
        case BestOfN(), BestOfN() if wanted.n <= done.n:
            part = outcome.candidates[: wanted.n]
        case Revise(), Revise() if wanted.length <= done.length and (wanted.chains, wanted.context) == (done.chains, done.context):
            part = tuple(c for c in outcome.candidates if c.solution.attempt <= wanted.length)
        case _:
            return None
    if wanted.select == "majority":
        part = tuple(replace(c, values=(), score=0.0, score_cost=0) for c in part)
    elif done.select != "weighted":
        return None
    tokens = sum(c.cost + c.score_cost for c in part)
    duplicates = len(part) - len({c.solution.tokens for c in part})
    return Outcome(outcome.question_id, name(wanted), part, select(wanted, part), len(part), tokens, {"duplicates": duplicates})
