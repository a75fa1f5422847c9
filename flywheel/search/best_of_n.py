"""Best-of-N: N independent solutions (Snell et al., 5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from flywheel.records import Candidate, Question
from flywheel.search.select import argmax, majority
from flywheel.search.strategy import Searcher, Strategy, Temperature, draw, judge, option

Select = Literal["weighted", "majority", "best"]


@dataclass(frozen=True)
class BestOfN(Strategy):
    """`n` independent samples. `select`: `weighted` or `majority` vote, or `best`, the highest-scoring sample."""

    n: int
    select: Select = "weighted"
    temperature: float | None = None

    kind: ClassVar[str] = "best_of_n"
    simple: ClassVar[bool] = True

    @classmethod
    def at(cls, budget: int, *, select: Select = "weighted", temperature: Temperature = None) -> BestOfN:
        return cls(budget, select, temperature)

    @property
    def name(self) -> str:
        return f"best_of_n:{self.n}:{self.select}" + option("t", self.temperature, None)

    @property
    def label(self) -> str:
        return f"best of {self.n}\n{self.select}"

    @property
    def judged(self) -> bool:
        return self.select != "majority"

    async def run(self, question: Question, searcher: Searcher, tag: str) -> Sequence[Candidate]:
        candidates = await draw(self, searcher, question, tag, range(self.n), self.temperature)
        return await judge(question, candidates, searcher.prm, searcher.kept) if self.judged else candidates

    def answer(self, candidates: Sequence[Candidate]) -> str | None:
        match self.select:
            case "weighted":
                return super().answer(candidates)
            case "majority":
                return majority([c.solution.answer for c in candidates])
            case "best":
                return argmax([c.solution.answer for c in candidates], [c.score for c in candidates])
            case _:
                raise ValueError(f"{self.name}: no such way to select")

    def covers(self, other: Strategy) -> bool:
        """True if `other` draws no more samples, as hot, and needs no missing scores."""
        return (
            isinstance(other, BestOfN)
            and other.n <= self.n
            and other.temperature == self.temperature
            and (self.judged or not other.judged)
        )

    def part(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        return candidates[: self.n]
