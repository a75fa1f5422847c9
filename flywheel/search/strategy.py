"""The base class of strategies, and what they share: sampling a solution and scoring solutions with the PRM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, ClassVar, Self

from pydantic import Field

from flywheel.ledger import metered
from flywheel.models.driver import drawing
from flywheel.models.engine import Engine, Sampling
from flywheel.models.prm import Prm, aggregate, together
from flywheel.models.prompts import Prompts
from flywheel.models.steps import Reader
from flywheel.recipe import SampleSpec
from flywheel.records import Candidate, Question, Role, Solution
from flywheel.search.head import Head
from flywheel.search.select import weighted

Temperature = Annotated[float, Field(gt=0, le=2)] | None  # None: `sample.temperature`


class Unfit(Exception):
    """A strategy cannot spend this budget; args are (strategy, reason)."""


class Strategy(ABC):
    """One way to spend a budget on one question.

    A subclass is a frozen dataclass in a file of this package, listed in `strategies.py`. It defines its recipe
    options (`at`), its name, the models that it needs (`maker`, `judged`), how it searches (`run`), how it selects its
    `answer`, and which of its candidates a smaller strategy of its kind would have drawn (`covers`, `part`).
    """

    kind: ClassVar[str]
    maker: ClassVar[Role] = Role.POLICY  # the model that writes the solutions; a subclass may make it a field
    # one answer, or independent samples and a vote: what search has to beat; a subclass may make it a property
    simple: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def at(cls, budget: int, **options) -> Self:
        """The strategy that spends `budget` generations; the keyword arguments are its recipe options.

        Raises Unfit if the budget and options do not fit together.
        """

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique name for figures, tables and ids, e.g. `beam:16:4`."""

    @property
    def label(self) -> str:
        """Two short lines for a cell of a picture."""
        return self.name.replace(":", "\n", 1)

    @property
    def generations(self) -> int:
        """The budget that it spends (see `at`): final answers, at most."""
        return self.n

    @property
    def judged(self) -> bool:
        """Whether the strategy needs PRM scores; a majority vote does not."""
        return True

    @abstractmethod
    async def run(self, question: Question, searcher: Searcher, tag: str) -> Sequence[Candidate]:
        """Search one question. Returns all candidates in order; their solution ids are `question/tag/number`."""

    def answer(self, candidates: Sequence[Candidate]) -> str | None:
        """The selected answer, by default best-of-N weighted; None if no candidate has an answer."""
        return weighted([c.solution.answer for c in candidates], [c.score for c in candidates])

    def covers(self, other: Strategy) -> bool:
        """Whether the candidates of this strategy include all that `other` would draw."""
        return self == other

    def part(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """The candidates that this strategy would have drawn. `candidates` are those of a strategy that covers it."""
        return candidates

    def to_dict(self) -> dict:
        """The fields and the `kind`, as `strategies.from_dict` reads them."""
        return {"kind": self.kind, **{item.name: getattr(self, item.name) for item in fields(self)}}


def option(text: str, value: object, usual: object) -> str:
    """The part of a strategy's name for one option: `:text` + value, or empty if it has its default `usual`."""
    return "" if value == usual else f":{text}{value}"


# ---- models, sampling and scoring ------------------------------------------------------


@dataclass
class Kept:
    """What a search has made so far: candidates by solution id, and (PRM step values, score) by solution tokens."""

    candidates: dict[str, Candidate] = field(default_factory=dict)
    judged: dict[tuple[int, ...], tuple[tuple[float, ...], float]] = field(default_factory=dict)

    def found(self) -> tuple[Candidate, ...]:
        """The candidates in the order of their numbers, with PRM values where they were scored."""
        out = []
        for candidate in sorted(self.candidates.values(), key=lambda c: int(c.solution.id.rpartition("/")[2])):
            if not candidate.values and candidate.solution.tokens in self.judged:
                values, score = self.judged[candidate.solution.tokens]
                candidate = replace(candidate, values=values, score=score)
            out.append(candidate)
        return tuple(out)


@dataclass(frozen=True)
class Searcher:
    """The models and prompts of a search; a model is None if the round has none.

    `sample`: limits for a whole solution. `kept`: collects partial results if a token limit may cut the search off.
    `head`: guesses a question's difficulty, where a plan is followed.
    """

    policy: Engine | None
    prm: Prm | None
    reviser: Engine | None
    prompts: Prompts
    reader: Reader
    sample: SampleSpec
    kept: Kept | None = None
    head: Head | None = None

    def maker(self, strategy: Strategy) -> Engine | None:
        return self.policy if strategy.maker == Role.POLICY else self.reviser

    def can(self, strategy: Strategy) -> bool:
        """Whether the models that `strategy` needs are loaded."""
        return self.maker(strategy) is not None and (self.prm is not None or not strategy.judged)

    def sampling(self, temperature: float | None = None) -> Sampling:
        """Sampling parameters for a whole solution; `temperature`: in place of the recipe's, 0 for greedy."""
        usual = self.reader.sampling(self.sample)
        return usual if temperature is None else replace(usual, temperature=temperature)


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
    temperature: float | None = None,
) -> Candidate:
    """Sample one whole solution for `prompt`: a candidate with its cost in tokens and no PRM values yet.

    `draw`: id of the independent draw that the solution belongs to; its own id if None. `temperature`: as in
    `Searcher.sampling`.
    """
    with metered() as spent, drawing(id):
        [done] = await engine.generate(prompt, searcher.sampling(temperature), purpose=purpose)
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


async def draw(
    strategy: Strategy,
    searcher: Searcher,
    question: Question,
    tag: str,
    numbers: Iterable[int],
    temperature: float | None,
) -> list[Candidate]:
    """Independent whole solutions by the strategy's maker, which sees the question alone; `numbers` end their ids.

    temperature: as in `Searcher.sampling`.
    """
    engine = searcher.maker(strategy)
    prompt = searcher.prompts.solve(question, strategy.maker == Role.POLICY and engine.bare)
    return await together(
        attempt(
            engine,
            prompt,
            searcher,
            question,
            purpose=strategy.kind,
            id=f"{question.id}/{tag}/{number}",
            temperature=temperature,
        )
        for number in numbers
    )


async def judge(
    question: Question,
    candidates: Sequence[Candidate],
    prm: Prm,
    kept: Kept | None = None,
    before: Sequence[Candidate] = (),
) -> tuple[Candidate, ...]:
    """The candidates with PRM values and scores. Candidates without an answer are not scored: they cannot win.

    Equal solutions are scored once and the cost is charged to the first; one that equals a solution scored `before`
    costs nothing. If the score is the last step's value, only that value is computed.
    """
    values: dict[tuple[int, ...], tuple[float, ...]] = {c.solution.tokens: c.values for c in before if c.values}
    first: dict[tuple[int, ...], Solution] = {}
    for candidate in candidates:
        if candidate.solution.answer is not None and candidate.solution.tokens not in values:
            first.setdefault(candidate.solution.tokens, candidate.solution)

    async def read(solution: Solution) -> tuple[int, int]:
        with metered() as spent:
            found = await prm.values(question, solution.steps, since=-1 if prm.aggregate == "last" else 0)
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
