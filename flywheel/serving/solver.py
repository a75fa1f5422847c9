"""Answer one question: choose the strategy, search, and bill every token of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from flywheel.ledger import metered
from flywheel.problems.grading import answer_key
from flywheel.records import Candidate, Outcome, Question
from flywheel.search.adaptive import Adaptive, certainty, votes
from flywheel.search.limit import OutOfTokens, limited
from flywheel.search.plan import Plan
from flywheel.search.probe import by_probe
from flywheel.search.run import search
from flywheel.search.strategy import Searcher, Strategy


@dataclass(frozen=True)
class Ask:
    """How to answer. `strategy`: None lets the plan choose by difficulty, or, without a plan, samples adaptively.

    `budget`: generations, for the plan. `tokens`: a hard limit on all tokens of a question; None: no limit.
    """

    strategy: Strategy | None = None
    budget: int = 16
    tokens: int | None = None


@dataclass(frozen=True)
class Solved:
    """The answer to a question, and its bill.

    share: the answer's share of the (PRM-weighted) votes. certainty: the probability that it stays ahead if sampling
    goes on. guide: what chose the strategy: `asked`, `plan` if it has one strategy for all bins, else `head` or, in a
    round without one, `probe`, or `adaptive` without a plan. bin: the guessed difficulty bin. tokens = prompt +
    generated + scored; `cached` of them came from the prefix cache. best: the highest-scored solution with this answer,
    or of all if there is no answer. cut_off: the limit on tokens ended the search.
    """

    answer: str | None
    share: float
    certainty: float
    strategy: str
    guide: str
    bin: int | None
    tokens: int
    prompt: int
    generated: int
    scored: int
    cached: int
    seconds: float
    cut_off: bool
    best: Candidate | None
    candidates: Sequence[Candidate]


@dataclass(frozen=True)
class Solver:
    """Open models, and the plan made for them, if any; `probe`: samples that guess a question's bin by `edges`."""

    searcher: Searcher
    plan: Plan | None
    edges: Sequence[float]
    probe: int

    async def solve(self, question: Question, ask: Ask, tag: str = "solve") -> Solved:
        """Raises TooLong if the question does not fit the model; `question.id` must be unique among those under way."""
        searcher = limited(self.searcher, ask.tokens) if ask.tokens else self.searcher
        outcomes: list[Outcome] = []

        async def run(strategy: Strategy, part: str) -> Outcome:
            outcomes.append(await search(strategy, question, searcher, tag=f"{tag}/{part}"))
            return outcomes[-1]

        started, bin = time.monotonic(), None
        with metered() as spent:
            strategy, guide = self.known(ask)
            if guide == "head":
                try:
                    bin = await searcher.head.bin(question)
                except OutOfTokens:  # the limit does not cover the question, so no search will find anything
                    bin = max(entry.bin for entry in self.plan.entries)
                strategy = self.plan.strategy(bin, self.budget(ask.budget))
            if strategy:
                done = await run(strategy, strategy.name)
            else:
                done = await by_probe(self.plan, self.budget(ask.budget), self.probe, self.edges, run)
                strategy, bin = done.strategy, done.bin
        best, share, sure = confidence(done.candidates, done.answer)
        return Solved(
            answer=done.answer,
            share=share,
            certainty=sure,
            strategy=strategy.name,
            guide=guide,
            bin=bin,
            tokens=spent.tokens,
            prompt=spent.prompt,
            generated=spent.generated,
            scored=spent.scored,
            cached=spent.cached,
            seconds=time.monotonic() - started,
            cut_off=any(outcome.cut_off for outcome in outcomes),
            best=best,
            candidates=done.candidates,
        )

    def known(self, ask: Ask) -> tuple[Strategy | None, str]:
        """(the strategy if the difficulty is not needed to choose it, what chooses it)."""
        if ask.strategy or not self.plan:
            return (ask.strategy, "asked") if ask.strategy else (Adaptive(ask.budget), "adaptive")
        options = {entry.strategy for entry in self.plan.entries if entry.budget == self.budget(ask.budget)}
        guide = "head" if self.searcher.head else "probe"
        return (options.pop(), "plan") if len(options) == 1 else (None, guide)

    def budget(self, asked: int) -> int:
        """The largest budget of the plan that is not above `asked`, or its smallest."""
        budgets = sorted({entry.budget for entry in self.plan.entries})
        return max((budget for budget in budgets if budget <= asked), default=budgets[0])


def confidence(candidates: Sequence[Candidate], answer: str | None) -> tuple[Candidate | None, float, float]:
    """(the best candidate with `answer`, the answer's share of the votes, the certainty that it stays ahead)."""
    if answer is None:
        return max(candidates, key=lambda c: c.score, default=None), 0.0, 0.0
    cast, key = votes(candidates), answer_key(answer)
    given = [c for c in candidates if c.solution.answer is not None and answer_key(c.solution.answer) == key]
    ahead = certainty(cast) if cast[key] == max(cast.values()) else 1 - certainty(cast)
    return max(given, key=lambda c: c.score), cast[key] / (sum(cast.values()) or 1.0), ahead
