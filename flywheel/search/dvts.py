"""Diverse verifier tree search: independent small beams side by side.

Beeching, Tunstall and Rush 2024, "Scaling test-time compute with open models". One large beam collapses onto the
prefixes that the PRM likes best; here each tree keeps its own best step, so large budgets stay diverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from flywheel.ledger import metered
from flywheel.models.driver import drawing
from flywheel.models.prm import together
from flywheel.recipe import Positive
from flywheel.records import Candidate, Question
from flywheel.search.beam import Beam
from flywheel.search.strategy import Searcher, Strategy, Temperature, Unfit, option


@dataclass(frozen=True)
class Tree(Beam):
    """One tree, a beam whose tokens are booked as DVTS."""

    kind: ClassVar[str] = "dvts"


@dataclass(frozen=True)
class Dvts(Strategy):
    """`n` candidates from n / width trees; each tree continues its best prefix `width` times at every step."""

    n: int
    width: int = 4
    temperature: float | None = None

    kind: ClassVar[str] = "dvts"

    @classmethod
    def at(cls, budget: int, *, width: Positive = 4, temperature: Temperature = None) -> Dvts:
        """budget / width trees. Raises Unfit if that is no whole number."""
        if budget % width:
            raise Unfit(f"dvts of width {width}", "it does not divide it")
        return cls(budget, width, temperature)

    @property
    def name(self) -> str:
        return f"dvts:{self.n}:{self.width}" + option("t", self.temperature, None)

    @property
    def label(self) -> str:
        return f"DVTS of {self.n}\nwidth {self.width}"

    async def run(self, question: Question, searcher: Searcher, tag: str) -> Sequence[Candidate]:
        trees = await together(self.tree(question, searcher, f"{tag}/{i}") for i in range(self.n // self.width))
        return [candidate for found in trees for candidate in found]

    async def tree(self, question: Question, searcher: Searcher, tag: str) -> Sequence[Candidate]:
        """One tree. Its first candidate carries the cost of all, so that fewer trees cost what they drew (`part`)."""
        with metered() as spent, drawing(tag):
            tree = Tree(self.width, self.width, temperature=self.temperature)
            first, *others = await tree.run(question, searcher, tag)
        return [replace(first, cost=spent.tokens, cached=spent.cached), *others]

    def covers(self, other: Strategy) -> bool:
        """True if `other` has no more trees, of the same width."""
        return isinstance(other, Dvts) and other.n <= self.n and replace(other, n=self.n) == self

    def part(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        return candidates[: self.n]
