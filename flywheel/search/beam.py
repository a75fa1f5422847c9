"""Beam and lookahead search against the PRM (Snell et al., 5.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from flywheel.models.engine import Completion, Sampling
from flywheel.models.prm import aggregate, together
from flywheel.recipe import Positive
from flywheel.records import Candidate, Finish, Question, Solution, Step
from flywheel.search.strategy import Searcher, Strategy, Temperature, Unfit, option

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Beam(Strategy):
    """`n` beams: keep the best n/width prefixes at each step, and continue each `width` times.

    With `lookahead` k > 0 a prefix is ranked with k more greedy steps (lookahead search): by the aggregate of the
    values of its own steps and of those. If the aggregate is the last value, that is the paper's rule, the value k
    steps on.
    """

    n: int
    width: int = 4
    max_rounds: int = 40
    lookahead: int = 0
    temperature: float | None = None  # None: the recipe's; of looked-ahead steps 0

    kind: ClassVar[str] = "beam"

    @classmethod
    def at(
        cls,
        budget: int,
        *,
        width: Positive | Literal["sqrt"] = 4,
        max_rounds: Positive = 40,
        lookahead: Annotated[int, Field(ge=0)] = 0,
        temperature: Temperature = None,
    ) -> Beam:
        """budget / (lookahead + 1) beams (5.2). A `width` of `sqrt` is the root of their number. Raises Unfit."""
        beams, rest = divmod(budget, lookahead + 1)
        if rest:
            raise Unfit(f"beam with lookahead {lookahead}", f"a beam costs {lookahead + 1}, which does not divide it")
        if width != "sqrt" and width > beams:
            raise Unfit(f"beam of width {width}", f"it has only {beams} beams")
        return cls(beams, isqrt(beams) if width == "sqrt" else width, max_rounds, lookahead, temperature)

    @property
    def name(self) -> str:
        return (
            f"beam:{self.n}:{self.width}"
            + option("rounds", self.max_rounds, 40)
            + option("lookahead", self.lookahead, 0)
            + option("t", self.temperature, None)
        )

    @property
    def generations(self) -> int:
        return self.n * (self.lookahead + 1)

    @property
    def label(self) -> str:
        return f"beam of {self.n}\nwidth {self.width}" + (f", lookahead {self.lookahead}" if self.lookahead else "")

    async def run(self, question: Question, searcher: Searcher, tag: str) -> Sequence[Candidate]:
        """Sample `n` first steps; then, step by step, keep the best n/width prefixes and continue each `width` times.

        Each finished solution shrinks the beam by one: the kept prefixes share `n` minus the number of finished
        solutions, so the search ends with exactly `n` candidates, as in the paper. It ends when all are finished or
        after min(`max_rounds`, `sample.max_steps`) steps; prefixes still open then are truncated, as is a solution
        that reaches `sample.max_tokens`.

        Identical prefixes are scored once and compete as one, or the beam would fill with copies of a likely step.
        """
        if not 1 <= self.width <= self.n:
            raise ValueError(f"beam: a width of 1 to {self.n} wanted, got {self.width}")
        return await StepSearch(self, self.keep, question, searcher, f"{question.id}/{tag}").run(self.max_rounds)

    def keep(self, alive: Sequence[Prefix], places: int) -> list[tuple[Prefix, int]]:
        """The best of the `alive` prefixes, each with its number of continuations; `places` of them in all."""
        best = sorted(alive, key=lambda prefix: -prefix.score)[: -(-places // self.width)]
        return [(prefix, places // len(best) + (i < places % len(best))) for i, prefix in enumerate(best)]


@dataclass(frozen=True, slots=True)
class Prefix:
    """The tokens of the steps so far, the PRM value after each step, the score by which it competes.

    `count`: how often it was drawn in its last step.
    """

    tokens: Tokens = ()
    values: tuple[float, ...] = ()
    score: float = 0.0
    count: int = 1


Keep = Callable[[Sequence[Prefix], int], list[tuple[Prefix, int]]]  # alive, places -> those that go on


class StepSearch:
    """One search step by step: the PRM values of prefixes, and the finished candidates.

    `strategy` says how many candidates there will be (`n`), at which `temperature`, and how far to look ahead
    (`lookahead`); `keep` which prefixes go on. `finished`: the value of a finished solution's last step; `open`: those
    of an open prefix's last step and of the steps looked ahead. Their keys lack trailing blank tokens.
    """

    def __init__(self, strategy, keep: Keep, question: Question, searcher: Searcher, id: str):
        self.strategy, self.keep, self.question, self.searcher, self.id = strategy, keep, question, searcher, id
        self.head = searcher.prompts.solve(question, searcher.policy.bare)
        self.finished: dict[Tokens, tuple[float, ...]] = {}
        self.open: dict[Tokens, tuple[float, ...]] = {} if strategy.lookahead else self.finished
        self.candidates: list[Candidate] = []

    async def run(self, rounds: int) -> tuple[Candidate, ...]:
        """Search for at most min(`rounds`, `sample.max_steps`) steps; returns `n` candidates."""
        kept = [(Prefix(), self.strategy.n)]  # a prefix, and how many continuations it gets
        last, number = min(rounds, self.searcher.sample.max_steps), 0
        while kept:
            number += 1
            kept = await self.step(kept, final=number >= last)
        return tuple(self.candidates)

    async def step(self, kept: Sequence[tuple[Prefix, int]], final: bool) -> list[tuple[Prefix, int]]:
        """Continue all kept prefixes by one step. Returns the prefixes to keep, each with its continuation count."""
        reader, how = self.searcher.reader, self.searcher.prm.aggregate
        grown = [item for group in await together(self.grow(*item) for item in kept) for item in group]
        ended: list[tuple[Prefix, Solution]] = []
        going: dict[Tokens, list[Prefix]] = {}  # the prefixes that each was continued from
        for prefix, step in grown:
            tokens = prefix.tokens + step.tokens
            full = final or step.finish is Finish.LENGTH or len(tokens) >= self.searcher.sample.max_tokens
            if (over := reader.ended(step, prefix.tokens)) or full:
                finish = Finish.STOP if over else Finish.LENGTH
                ended.append((prefix, self.solution(tokens, finish, len(self.candidates) + len(ended))))
            else:
                going.setdefault(tokens, []).append(prefix)
        await self.judge([solution for _, solution in ended if solution.answer is not None], list(going))
        for prefix, solution in ended:
            candidate = Candidate(solution)
            if solution.answer is not None:
                # a final stop or blank token adds no step, so its value replaces that of the last step
                values = (*prefix.values[: len(solution.steps) - 1], *self.finished[solution.tokens])
                candidate = Candidate(solution, values, aggregate(values, how))
            self.candidates.append(candidate)
            if self.searcher.kept:
                self.searcher.kept.candidates[solution.id] = candidate
        alive = []
        for tokens, drawn in going.items():
            own, *ahead = self.open[reader.trim(tokens)]
            values = (*drawn[-1].values, own)
            alive.append(Prefix(tokens, values, aggregate((*values, *ahead), how), len(drawn)))
        places = self.strategy.n - len(self.candidates)
        return self.keep(alive, places) if alive else []

    def sampling(self, tokens: Tokens, temperature: float | None = None) -> Sampling:
        """Sampling parameters for one more step after `tokens`, within `sample.max_tokens` for the whole solution."""
        usual, reader = self.searcher.sampling(), self.searcher.reader
        return replace(
            usual,
            max_tokens=usual.max_tokens - len(tokens),
            stop=reader.ends | reader.stop,
            done=reader.stopped if reader.stop_texts else None,
            temperature=usual.temperature if temperature is None else temperature,
        )

    async def grow(self, prefix: Prefix, count: int) -> list[tuple[Prefix, Completion]]:
        prompt, sampling = [*self.head, *prefix.tokens], self.sampling(prefix.tokens, self.strategy.temperature)
        return [
            (prefix, s)
            for s in await self.searcher.policy.generate(prompt, sampling, purpose=self.strategy.kind, n=count)
        ]

    def solution(self, tokens: Tokens, finish: Finish, number: int) -> Solution:
        """A finished solution. All solutions of one search are one independent draw: they share prefixes."""
        return self.searcher.reader.solution(
            tokens,
            finish,
            id=f"{self.id}/{number}",
            question_id=self.question.id,
            purpose=self.strategy.kind,
            model=self.searcher.policy.name,
            draw=self.id,
        )

    async def judge(self, finished: Sequence[Solution], going: Sequence[Tokens]) -> None:
        """Compute missing PRM values: of finished solutions as they are, of open prefixes after the lookahead."""
        reader = self.searcher.reader
        asked = [(self.finished, solution.tokens, partial(self.value, solution.steps)) for solution in finished]
        asked += [(self.open, reader.trim(tokens), partial(self.ahead, tokens)) for tokens in going]
        new = {(id(known), tokens): (known, tokens, read) for known, tokens, read in asked if tokens not in known}
        for (known, tokens, _), values in zip(new.values(), await together(read() for _, _, read in new.values())):
            known[tokens] = values

    async def value(self, steps: tuple[Step, ...], since: int = -1) -> tuple[float, ...]:
        if not steps:
            return (0.0,)
        return await self.searcher.prm.values(self.question, steps, since=since)

    async def ahead(self, tokens: Tokens) -> tuple[float, ...]:
        """The values of an open prefix's last step and of up to `lookahead` more steps at temperature 0.

        Only the last of them if nothing else counts (`prm.aggregate` is `last`).
        """
        reader, looked = self.searcher.reader, tokens
        own = len(reader.steps(tokens)) - 1
        for _ in range(self.strategy.lookahead):
            sampling = self.sampling(looked, temperature=0.0)
            [step] = await self.searcher.policy.generate([*self.head, *looked], sampling, purpose="lookahead")
            over = reader.ended(step, looked)
            looked += step.tokens
            if step.finish is Finish.LENGTH or over or len(looked) >= self.searcher.sample.max_tokens:
                break
        steps = reader.steps(reader.trim(looked) if self.strategy.lookahead else looked)
        return await self.value(steps, -1 if self.searcher.prm.aggregate == "last" else min(own, len(steps) - 1))
