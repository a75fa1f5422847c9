"""Particle filtering against the PRM (Puri et al. 2025, arXiv 2502.01618).

A beam keeps the best prefixes; here prefixes survive at random, in proportion to the odds that the PRM gives them. So
a prefix that an imperfect PRM undervalues keeps its chance.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from pydantic import Field

from flywheel.records import Candidate, Question
from flywheel.search.beam import Prefix, StepSearch
from flywheel.search.strategy import Searcher, Strategy, Temperature, option

SURE = 1e-3  # values are kept this far from 0 and 1, whose odds are 0 and infinite
LONGEST = 40  # steps


@dataclass(frozen=True)
class Particle(Strategy):
    """`n` particles. After each step the open ones are drawn anew, with replacement, by (score / (1 - score))^`power`.

    A finished particle leaves the draw. `power` is the inverse of the paper's temperature: 0 ignores the PRM, and the
    larger it is, the more the best prefix takes over.
    """

    n: int
    power: float = 1.0
    temperature: float | None = None

    kind: ClassVar[str] = "particle"
    lookahead: ClassVar[int] = 0

    @classmethod
    def at(
        cls, budget: int, *, power: Annotated[float, Field(ge=0, le=50)] = 1.0, temperature: Temperature = None
    ) -> Particle:
        return cls(budget, power, temperature)

    @property
    def name(self) -> str:
        return f"particle:{self.n}" + option("power", self.power, 1.0) + option("t", self.temperature, None)

    @property
    def label(self) -> str:
        return f"{self.n} particles" + ("" if self.power == 1 else f"\npower {self.power:g}")

    async def run(self, question: Question, searcher: Searcher, tag: str) -> Sequence[Candidate]:
        """The draws depend on the question and `tag` alone, so that a repeated search makes the same ones."""
        id = f"{question.id}/{tag}"
        return await StepSearch(self, partial(self.keep, random.Random(id)), question, searcher, id).run(LONGEST)

    def keep(self, chance: random.Random, alive: Sequence[Prefix], places: int) -> list[tuple[Prefix, int]]:
        """`places` draws from the `alive` prefixes, as (prefix, number of its draws)."""
        scores = [min(max(prefix.score, SURE), 1 - SURE) for prefix in alive]
        odds = [prefix.count * (s / (1 - s)) ** self.power for prefix, s in zip(alive, scores)]
        drawn = Counter(chance.choices(range(len(alive)), odds, k=places))
        return [(alive[i], count) for i, count in sorted(drawn.items())]
