"""What a strategy is, and the two things that all of them do: sample solutions and judge them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Self

from flywheel.ledger import metered
from flywheel.models.engine import Engine, Sampling
from flywheel.models.prm import Prm, aggregate, together
from flywheel.models.prompts import Prompts
from flywheel.models.steps import Reader
from flywheel.recipe import SampleSpec
from flywheel.records import Candidate, Question, Role, Solution
from flywheel.search.select import weighted


class Unfit(Exception):
    """A strategy that cannot spend a budget: (what, why)."""


class Strategy(ABC):
    """One way to spend a budget on one question.

    A subclass is a frozen dataclass, one file of this package and one line in `strategies.py`. It says its recipe
    options (`at`), its name, the models that it needs (`maker`, `judged`), how it searches (`run`), how it selects its
    `answer`, and which of its draws another strategy of its kind would have made too (`covers`, `part`).
    """

    kind: ClassVar[str]
    maker: ClassVar[Role] = Role.POLICY  # the model that writes the solutions; a subclass may make it a field

    @classmethod
    @abstractmethod
    def at(cls, budget: int, **options) -> Self:
        """The strategy that spends `budget` generations; its keyword arguments are the options of a recipe.

        Raises Unfit where the budget does not allow it.
        """

    @property
    @abstractmethod
    def name(self) -> str:
        """In figures, tables and ids, e.g. `beam:16:4`. Different strategies have different names."""

    @property
    def label(self) -> str:
        """Two short lines for a cell of a picture."""
        return self.name.replace(":", "\n", 1)

    @property
    def judged(self) -> bool:
        """Whether it needs the PRM's scores; a majority vote does not."""
        return True

    @abstractmethod
    async def run(self, question: Question, searcher: Searcher, tag: str) -> Sequence[Candidate]:
        """Search one question; the ids of its solutions are `question/tag/number`. All candidates, in their order."""

    def answer(self, candidates: Sequence[Candidate]) -> str | None:
        """The answer that its candidates give: best-of-N weighted. None where no candidate has an answer."""
        return weighted([c.solution.answer for c in candidates], [c.score for c in candidates])

    def covers(self, other: Strategy) -> bool:
        """Whether the draws of this strategy hold those of `other`."""
        return self == other

    def part(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Those of the `candidates` of a strategy that covers this one which this one would have drawn."""
        return candidates

    def to_dict(self) -> dict:
        """The fields and the `kind`; `strategies.from_dict` reads it back."""
        return {"kind": self.kind, **{item.name: getattr(self, item.name) for item in fields(self)}}


def option(text: str, value: object, usual: object) -> str:
    """`:text` + value where an option is not the usual one, for a strategy's name."""
    return "" if value == usual else f":{text}{value}"


# ---- what a strategy works with --------------------------------------------------------


@dataclass
class Kept:
    """What a search has made so far: candidates by id, and the PRM's values and score of their tokens."""

    candidates: dict[str, Candidate] = field(default_factory=dict)
    judged: dict[tuple[int, ...], tuple[tuple[float, ...], float]] = field(default_factory=dict)

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
class Searcher:
    """The models and prompts of a search; a model is None where a round has none.

    `sample` limits a whole solution. `kept` collects what was made, where a limit on tokens may cut the search off.
    """

    policy: Engine | None
    prm: Prm | None
    reviser: Engine | None
    prompts: Prompts
    reader: Reader
    sample: SampleSpec
    kept: Kept | None = None

    def maker(self, strategy: Strategy) -> Engine | None:
        return self.policy if strategy.maker == Role.POLICY else self.reviser

    def can(self, strategy: Strategy) -> bool:
        """Whether the models that `strategy` needs are there."""
        return self.maker(strategy) is not None and (self.prm is not None or not strategy.judged)

    def sampling(self) -> Sampling:
        """How a whole solution is sampled."""
        return Sampling(self.sample.max_tokens, self.sample.temperature, self.sample.top_p, self.reader.stop)


async def attempt(
    engine: Engine,
    prompt: Sequence[int],
    searcher: Searcher,
    question: Question,
    *,
    purpose: str,
    id: str,
    draw: str | None = None,
    parent: str | None = None,
    attempt: int = 1,
) -> Candidate:
    """Sample one whole solution after `prompt`: a candidate that knows its cost and is not judged yet.

    `draw` names the independent draw that the solution belongs to: its own id if None.
    """
    with metered() as spent:
        [done] = await engine.generate(prompt, searcher.sampling(), purpose=purpose)
    solution = searcher.reader.solution(
        done.tokens,
        done.finish,
        id=id,
        question_id=question.id,
        purpose=purpose,
        model=engine.name,
        draw=draw,
        parent=parent,
        attempt=attempt,
    )
    made = Candidate(solution, cost=spent.tokens, cached=spent.cached)
    if searcher.kept:
        searcher.kept.candidates[id] = made
    return made


async def judge(
    question: Question,
    candidates: Sequence[Candidate],
    prm: Prm,
    kept: Kept | None = None,
    before: Sequence[Candidate] = (),
) -> tuple[Candidate, ...]:
    """The candidates with PRM values. One without an answer is not judged: it cannot win.

    Equal solutions are judged once, and the first of them bears the cost; one that equals a solution judged `before`
    costs nothing. Where the last step's value is the score, it alone is asked for.
    """
    values: dict[tuple[int, ...], tuple[float, ...]] = {c.solution.tokens: c.values for c in before if c.values}
    first: dict[tuple[int, ...], Solution] = {}
    for candidate in candidates:
        if candidate.solution.answer is not None and candidate.solution.tokens not in values:
            first.setdefault(candidate.solution.tokens, candidate.solution)

    async def read(solution: Solution) -> tuple[int, int]:
        with metered() as spent:
            if prm.aggregate == "last":
                found = (await prm.value(question, solution.steps),)
            else:
                found = await prm.values(question, solution.steps)
        values[solution.tokens] = found
        if kept:
            kept.judged[solution.tokens] = (found, aggregate(found, prm.aggregate))
        return spent.tokens, spent.cached

    costs = dict(zip([s.id for s in first.values()], await together(map(read, first.values()))))
    out = []
    for candidate in candidates:
        if candidate.solution.answer is not None:
            found = values[candidate.solution.tokens]
            cost, cached = costs.get(candidate.solution.id, (0, 0))
            score = aggregate(found, prm.aggregate)
            candidate = replace(candidate, values=found, score=score, score_cost=cost, score_cached=cached)
        out.append(candidate)
    return tuple(out)
