"""What every strategy works with, and the two things that all of them do: sample and judge."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from flywheel.engines.base import Engine, Sampling
from flywheel.ledger import metered
from flywheel.prm import Known, Prm, aggregate
from flywheel.prompts import Prompts
from flywheel.recipe import SampleSpec
from flywheel.records import Beam, BestOfN, Candidate, Question, Revise, Solution, Strategy
from flywheel.steps import Reader


@dataclass(frozen=True)
class Tools:
    """The models of a search; None where a round has none. `sample` limits a whole solution."""

    policy: Engine | None
    prm: Prm | None
    reviser: Engine | None
    prompts: Prompts
    reader: Reader
    sample: SampleSpec

    def can(self, strategy: Strategy) -> bool:
        """Whether the models that `strategy` needs are there."""
        match strategy:
            case BestOfN(select=select):
                return self.policy is not None and (select == "majority" or self.prm is not None)
            case Beam():
                return self.policy is not None and self.prm is not None
            case Revise(select=select):
                return self.reviser is not None and (select == "majority" or self.prm is not None)

    def sampling(self) -> Sampling:
        """How a whole solution is sampled."""
        return Sampling(self.sample.max_tokens, self.sample.temperature, self.sample.top_p, self.reader.stop)


@dataclass(frozen=True)
class Found:
    """What a strategy found. `extra`: counts that its figures want, by name."""

    candidates: tuple[Candidate, ...]
    extra: dict[str, float] = field(default_factory=dict)


async def attempt(
    engine: Engine,
    prompt: Sequence[int],
    tools: Tools,
    question: Question,
    *,
    purpose: str,
    id: str,
    origin: str,
    parent: str | None = None,
    attempt: int = 1,
) -> Candidate:
    """Sample one whole solution after `prompt`: a candidate that knows its cost and is not judged yet."""
    with metered() as spent:
        [done] = await engine.generate(prompt, tools.sampling(), purpose=purpose)
    solution = tools.reader.solution(done.tokens, done.finish, id=id, question_id=question.id, origin=f"{origin}:{engine.name}", parent=parent, attempt=attempt)
    return Candidate(solution, cost=spent.tokens)


async def judged(question: Question, candidates: Sequence[Candidate], prm: Prm) -> tuple[Candidate, ...]:
    """The candidates with PRM values. One without an answer is not judged: it cannot win.

    Equal solutions, and equal beginnings of solutions, are judged once, and the first of them
    bears the cost. Where the last step's value is the score, it alone is asked for.
    """
    first: dict[tuple[int, ...], Solution] = {}
    for candidate in candidates:
        if candidate.solution.answer is not None:
            first.setdefault(candidate.solution.tokens, candidate.solution)

    known: Known = {}

    async def judge(solution: Solution) -> tuple[tuple[float, ...], int]:
        with metered() as spent:
            last_only = prm.aggregate == "last"
            values = (await prm.value(question, solution.steps),) if last_only else await prm.values(question, solution.steps, known=known)
        return values, spent.tokens

    found = dict(zip(first, await asyncio.gather(*map(judge, first.values()))))
    out = []
    for candidate in candidates:
        solution = candidate.solution
        if solution.answer is not None:
            values, cost = found[solution.tokens]
            cost = cost if first[solution.tokens] is solution else 0
            candidate = Candidate(solution, values, aggregate(values, prm.aggregate), candidate.cost, cost)
        out.append(candidate)
    return tuple(out)
