"""One answer at temperature 0: what a served model gives, and the cheapest answer that a search has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from flywheel.records import Candidate, Question
from flywheel.search.strategy import Searcher, Strategy, draw


@dataclass(frozen=True)
class Greedy(Strategy):
    """`maker`: the `policy`, or the `reviser` (its first attempt)."""

    maker: Literal["policy", "reviser"] = "policy"

    kind: ClassVar[str] = "greedy"
    simple: ClassVar[bool] = True

    @classmethod
    def at(cls, budget: int, *, maker: Literal["policy", "reviser"] = "policy") -> Greedy:
        """One generation, whatever the budget."""
        return cls(maker)

    @property
    def name(self) -> str:
        return f"greedy:{self.maker}"

    @property
    def label(self) -> str:
        return f"greedy\n{self.maker}"

    @property
    def judged(self) -> bool:
        return False

    @property
    def generations(self) -> int:
        return 1

    async def run(self, question: Question, searcher: Searcher, tag: str) -> Sequence[Candidate]:
        return await draw(self, searcher, question, tag, [0], temperature=0.0)
