"""Run one strategy, or several, on one question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flywheel.ledger import metered
from flywheel.models.driver import drawing
from flywheel.models.prm import together
from flywheel.records import Candidate, Outcome, Question
from flywheel.search.limit import OutOfTokens
from flywheel.search.select import majority
from flywheel.search.strategy import Searcher, Strategy


async def search(strategy: Strategy, question: Question, searcher: Searcher, *, tag: str) -> Outcome:
    """Search by `strategy` and select an answer. Solution ids are `question/tag/number`, so `tag` must be unique.

    A search by a `limited` searcher that needs more tokens is cut off and answers with its finished solutions, by the
    strategy's selection; if that selects none, or needs scores and there are none, by majority. Raises ValueError if
    `searcher` lacks a model that the strategy needs, and TooLong if the question does not fit the model.
    """
    if not searcher.can(strategy):
        raise ValueError(f"{strategy.name}: needs a model that this search was not given")
    cut_off = False
    with metered() as spent, drawing(f"{question.id}/{tag}"):
        try:
            candidates = tuple(await strategy.run(question, searcher, tag))
        except OutOfTokens:
            candidates, cut_off = searcher.kept.found(), True
    answer = selected(strategy, candidates, cut_off)
    return Outcome(question.id, strategy.name, candidates, answer, spent.tokens, spent.cached, cut_off)


def selected(strategy: Strategy, candidates: Sequence[Candidate], cut_off: bool) -> str | None:
    """The answer of `strategy`; of a search that was cut off by majority, if that is none or lacks the scores."""
    unjudged = cut_off and strategy.judged and not any(c.values for c in candidates)
    answer = None if unjudged else strategy.answer(candidates)
    return majority([c.solution.answer for c in candidates]) if cut_off and answer is None else answer


async def search_all(
    asked: Sequence[tuple[int, Strategy]], question: Question, searcher: Searcher, *, tag: str
) -> list[tuple[int, Strategy, Outcome]]:
    """Run every (budget, strategy) of `asked` on one question, reusing candidates.

    Within a kind, a strategy that covers others runs first, and their outcomes are derived from its candidates. Kinds
    run concurrently, because larger batches cost the engine little more per step.
    """
    covered = {strategy: sum(strategy.covers(other) for _, other in asked) for _, strategy in asked}
    order = sorted(asked, key=lambda item: (-item[0], -covered[item[1]]))
    kinds: dict[str, list[tuple[int, Strategy]]] = {}
    for budget, strategy in order:
        kinds.setdefault(strategy.kind, []).append((budget, strategy))

    async def one_kind(group: list[tuple[int, Strategy]]) -> list[tuple[int, Strategy, Outcome]]:
        runs: dict[Strategy, Outcome] = {}
        out = []
        for budget, strategy in group:
            done = next((run for run in runs if run.covers(strategy)), None)
            if done is None:
                runs[strategy] = await search(strategy, question, searcher, tag=f"{tag}/{strategy.name}")
            out.append((budget, strategy, read_off(done, runs[done], strategy) if done else runs[strategy]))
        return out

    return [item for group in await together(map(one_kind, kinds.values())) for item in group]


def read_off(done: Strategy, outcome: Outcome, wanted: Strategy) -> Outcome:
    """The outcome of `wanted`, from the `outcome` of `done`, which covers it. Counts only the tokens `wanted` needs."""
    if done == wanted:
        return outcome
    part: Sequence[Candidate] = wanted.part(outcome.candidates)
    if wanted.judged:  # equal solutions are scored once: the first of those that `wanted` has pays for it
        costs = {c.solution.tokens: (c.score_cost, c.score_cached) for c in outcome.candidates if c.score_cost}
        paid = [costs.pop(c.solution.tokens, (0, 0)) for c in part]
        part = [replace(c, score_cost=cost, score_cached=cached) for c, (cost, cached) in zip(part, paid)]
    else:
        part = [replace(c, values=(), score=0.0, score_cost=0, score_cached=0) for c in part]
    if not sum(c.cost for c in part):
        raise ValueError(f"{done.name}: what its candidates cost is not known, so {wanted.name} cannot be read off it")
    tokens, cached = sum(c.cost + c.score_cost for c in part), sum(c.cached + c.score_cached for c in part)
    return Outcome(outcome.question_id, wanted.name, tuple(part), wanted.answer(part), tokens, cached)
