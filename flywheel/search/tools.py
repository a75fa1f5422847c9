"""What every strategy works with, and the two things that all of them do: sample and judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from flywheel.ledger import metered
from flywheel.models.engine import Engine, Sampling
from flywheel.models.prm import Prm, aggregate, together
from flywheel.models.prompts import Prompts
from flywheel.models.steps import Reader
from flywheel.recipe import SampleSpec
from flywheel.records import Adaptive, Beam, BestOfN, Candidate, Question, Revise, Solution, Strategy


@dataclass
class Kept:
    """What a search has made so far: candidates by id, and what the PRM said of their tokens."""

    candidates: dict[str, Candidate] = field(default_factory=dict)
    judged: dict[tuple[int, ...], tuple[tuple[float, ...], float]] = field(default_factory=dict)  # values and score

    def found(self) -> tuple[Candidate, ...]:
        """The candidates in their order, with the values of those that were judged."""
        out = []
        for candidate in sorted(self.candidates.values(), key=lambda c: int(c.solution.id.rpartition("/")[2])):
            if not candidate.values and candidate.solution.tokens in self.judged:
                values, score = self.judged[candidate.solution.tokens]
                candidate = replace(candidate, values=values, score=score)
            out.append(candidate)
        return tuple(out)


@dataclass(frozen=True)
class Tools:
    """The models of a search; None where a round has none. `sample` limits a whole solution."""

    policy: Engine | None
    prm: Prm | None
    reviser: Engine | None
    prompts: Prompts
    reader: Reader
    sample: SampleSpec
    kept: Kept | None = None  # under a limit

    def can(self, strategy: Strategy) -> bool:
        """Whether the models that `strategy` needs are there."""
        match strategy:
            case BestOfN() | Beam() | Adaptive(maker="policy"):
                maker = self.policy
            case Revise() | Adaptive():
                maker = self.reviser
        return maker is not None and (self.prm is not None or not judges(strategy))

    def sampling(self) -> Sampling:
        """How a whole solution is sampled."""
        return Sampling(self.sample.max_tokens, self.sample.temperature, self.sample.top_p, self.reader.stop)


def judges(strategy: Strategy) -> bool:
    """Whether `strategy` needs the PRM's scores; a vote does not."""
    return isinstance(strategy, Beam | Adaptive) or strategy.select not in ("majority", "last")


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
    solution = tools.reader.solution(
        done.tokens,
        done.finish,
        id=id,
        question_id=question.id,
        origin=f"{origin}:{engine.name}",
        parent=parent,
        attempt=attempt,
    )
    made = Candidate(solution, cost=spent.tokens, cached=spent.cached)
    if tools.kept:
        tools.kept.candidates[id] = made
    return made


async def judged(
    question: Question, candidates: Sequence[Candidate], prm: Prm, kept: Kept | None = None
) -> tuple[Candidate, ...]:
    """The candidates with PRM values. One without an answer is not judged: it cannot win.

    Equal solutions are judged once, and the first of them bears the cost. Where the last
    step's value is the score, it alone is asked for.
    """
    first: dict[tuple[int, ...], Solution] = {}
    for candidate in candidates:
        if candidate.solution.answer is not None:
            first.setdefault(candidate.solution.tokens, candidate.solution)

    async def judge(solution: Solution) -> tuple[tuple[float, ...], int, int]:
        with metered() as spent:
            last_only = prm.aggregate == "last"
            values = (
                (await prm.value(question, solution.steps),)
                if last_only
                else await prm.values(question, solution.steps)
            )
        if kept:
            kept.judged[solution.tokens] = (values, aggregate(values, prm.aggregate))
        return values, spent.tokens, spent.cached

    found = dict(zip(first, await together(map(judge, first.values()))))
    out = []
    for candidate in candidates:
        solution = candidate.solution
        if solution.answer is not None:
            values, cost, cached = found[solution.tokens]
            if first[solution.tokens] is not solution:
                cost = cached = 0
            candidate = Candidate(
                solution, values, aggregate(values, prm.aggregate), candidate.cost, cost, candidate.cached, cached
            )
        out.append(candidate)
    return tuple(out)


async def judged_anew(
    question: Question, drawn: Sequence[Candidate], before: Sequence[Candidate], tools: Tools
) -> list[Candidate]:
    """`drawn`, judged; one that equals a solution judged `before` takes its score and costs nothing."""
    seen = {c.solution.tokens: c for c in before}
    fresh = iter(await judged(question, [c for c in drawn if c.solution.tokens not in seen], tools.prm, tools.kept))
    return [
        replace(c, values=seen[c.solution.tokens].values, score=seen[c.solution.tokens].score)
        if c.solution.tokens in seen
        else next(fresh)
        for c in drawn
    ]
