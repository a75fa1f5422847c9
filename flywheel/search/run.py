"""Run one strategy on one question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flywheel.ledger import metered
from flywheel.models.prm import together
from flywheel.records import Adaptive, Beam, BestOfN, Candidate, Outcome, Question, Revise, Strategy
from flywheel.search.adaptive import adaptive, stopped
from flywheel.search.beam import beam
from flywheel.search.best_of_n import best_of_n
from flywheel.search.limit import OutOfTokens, limited
from flywheel.search.plan import name
from flywheel.search.revise import revise
from flywheel.search.select import argmax, hierarchical, majority, weighted
from flywheel.search.tools import Found, Tools, judges


async def search(
    strategy: Strategy, question: Question, tools: Tools, *, tag: str, limit: int | None = None
) -> Outcome:
    """Search by `strategy` and select an answer. Solution ids are `question/tag/number`, so `tag` must be unique.

    With a `limit` no more than so many tokens are spent. A search that would need more is cut
    off (`cut_off` in `extra`) and answers with its finished solutions: by its own selection
    over those that were judged, by majority where that selects none. Raises ValueError if `tools` lacks a
    model that the strategy needs, and TooLong if the question does not fit.
    """
    if not tools.can(strategy):
        raise ValueError(f"{name(strategy)}: needs a model that this search was not given")
    if limit is not None:
        tools = limited(tools, limit)
    cut = False
    with metered() as spent:
        try:
            match strategy:
                case BestOfN():
                    found = await best_of_n(strategy, question, tools, tag=tag)
                case Beam():
                    found = await beam(strategy, question, tools, tag=tag)
                case Revise():
                    found = await revise(strategy, question, tools, tag=tag)
                case Adaptive():
                    found = await adaptive(strategy, question, tools, tag=tag)
        except OutOfTokens:
            found, cut = Found(tools.kept.found(), {"cut_off": 1}), True
    blind = cut and judges(strategy) and not any(c.values for c in found.candidates)
    answer = None if blind else select(strategy, found.candidates)
    if cut and answer is None:
        answer = majority([c.solution.answer for c in found.candidates])
    generations = len(found.candidates) * (1 + getattr(strategy, "lookahead", 0))
    return Outcome(
        question.id, name(strategy), found.candidates, answer, generations, spent.tokens, found.extra, spent.cached
    )


async def search_all(
    asked: Sequence[tuple[int, Strategy]], question: Question, tools: Tools, *, tag: str
) -> list[tuple[int, Strategy, Outcome]]:
    """Every (budget, strategy) of `asked` on one question, each draw made once.

    Of a kind the largest budget is drawn first, the judged one before the vote, the surest before
    the others: what is part of it is read off (`smaller`). Kinds are drawn at once: a step of the engine costs little more
    for more sequences.
    """
    order = sorted(asked, key=lambda item: (-item[0], not judges(item[1]), -getattr(item[1], "sure", 0)))
    kinds = [
        [item for item in order if type(item[1]) is kind]
        for kind in dict.fromkeys(type(strategy) for _, strategy in order)
    ]

    async def each(kind: list[tuple[int, Strategy]]) -> list[tuple[int, Strategy, Outcome]]:
        runs: dict[Strategy, Outcome] = {}
        out = []
        for budget, strategy in kind:
            outcome = next((o for o in (smaller(done, run, strategy) for done, run in runs.items()) if o), None)
            if outcome is None:
                outcome = runs[strategy] = await search(strategy, question, tools, tag=f"{tag}/{name(strategy)}")
            out.append((budget, strategy, outcome))
        return out

    return [item for group in await together(map(each, kinds)) for item in group]


def select(strategy: Strategy, candidates: Sequence[Candidate]) -> str | None:
    """The answer that `strategy` selects from its candidates."""
    answers, scores = [c.solution.answer for c in candidates], [c.score for c in candidates]
    match strategy:
        case BestOfN(select="majority") | Revise(select="majority"):
            return majority(answers)
        case BestOfN(select="weighted") | Beam() | Adaptive():
            return weighted(answers, scores)
        case BestOfN(select="best"):
            return argmax(answers, scores)
        case Revise(select="last"):
            return majority([c.solution.answer for c in candidates if c.solution.attempt == strategy.length])
        case Revise(select="weighted"):
            starts = [i for i, c in enumerate(candidates) if c.solution.attempt == 1]
            return hierarchical([(answers[a:b], scores[a:b]) for a, b in zip(starts, [*starts[1:], len(answers)])])
        case _:
            raise ValueError(f"{name(strategy)}: no such way to select")


def smaller(done: Strategy, outcome: Outcome, wanted: Strategy) -> Outcome | None:
    """What `wanted` would have found on the same draws, or None where `outcome` does not hold it.

    N samples hold the first n < N, and what a search of them that is sooner sure would have
    drawn; chains the first of them and their own beginnings; and a judged set a vote without
    its judge. Tokens are those of the part alone.
    """
    match done, wanted:
        case Adaptive(), Adaptive() if (
            wanted.n <= done.n and wanted.sure <= done.sure and (wanted.maker, wanted.step) == (done.maker, done.step)
        ):
            part = stopped(wanted, outcome.candidates)
        case BestOfN(), BestOfN() if wanted.n <= done.n:
            part = outcome.candidates[: wanted.n]
        case Revise(), Revise() if (
            wanted.length <= done.length and wanted.chains <= done.chains and wanted.context == done.context
        ):
            part = tuple(
                c for c in outcome.candidates[: wanted.chains * done.length] if c.solution.attempt <= wanted.length
            )
        case _:
            return None
    if not judges(wanted):
        part = tuple(replace(c, values=(), score=0.0, score_cost=0, score_cached=0) for c in part)
    elif not judges(done):
        return None
    tokens, cached = sum(c.cost + c.score_cost for c in part), sum(c.cached + c.score_cached for c in part)
    extra = (
        {"drawn": len(part)}
        if isinstance(wanted, Adaptive)
        else {"duplicates": len(part) - len({c.solution.tokens for c in part})}
    )
    return Outcome(outcome.question_id, name(wanted), part, select(wanted, part), len(part), tokens, extra, cached)
