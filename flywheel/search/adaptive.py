"""Best-of-N with early stopping: sample until the weighted vote is decided.

Adaptive-Consistency (Aggarwal et al. 2023, arXiv 2305.11860) with votes weighted by PRM score. Scores are divided by
the highest one so far, because their scale differs between questions. No difficulty bin has to be predicted first:
the samples that show how hard the question is are also candidates for its answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from flywheel.problems.grading import answer_key
from flywheel.recipe import Positive
from flywheel.records import Candidate, Question
from flywheel.search.strategy import Searcher, Strategy, Temperature, draw, judge, option


def votes(candidates: Sequence[Candidate]) -> dict[str, float]:
    """Votes by `answer_key`. Each counts PRM score / highest PRM score; without scores, 1."""
    scored = any(c.score for c in candidates)
    highest = max((c.score for c in candidates), default=0.0)
    out: dict[str, float] = {}
    for c in candidates:
        if c.solution.answer is not None:
            key = answer_key(c.solution.answer)
            out[key] = out.get(key, 0.0) + (c.score / highest if scored else 1.0)
    return out


def certainty(votes: Mapping[str, float]) -> float:
    """The probability that the leading answer stays ahead of the second if sampling goes on; 0 without an answer.

    Given the votes, the leader's share among the two answers is Beta(1 + its votes, 1 + the other's votes); the leader
    stays ahead if that share is above a half.
    """
    from scipy.stats import beta

    first, second = sorted([*votes.values(), 0.0, 0.0], reverse=True)[:2]
    return float(beta.sf(0.5, 1 + first, 1 + second)) if votes else 0.0


@dataclass(frozen=True)
class Adaptive(Strategy):
    """Up to `n` independent samples, `step` at a time, until the weighted vote is decided with probability `sure`.

    `maker`: the `policy`, or the `reviser` (first attempts only: no earlier attempts in the prompt).
    """

    n: int
    sure: float = 0.95
    maker: Literal["policy", "reviser"] = "policy"
    step: int = 4
    temperature: float | None = None

    kind: ClassVar[str] = "adaptive"

    @classmethod
    def at(
        cls,
        budget: int,
        *,
        sure: Annotated[float, Field(gt=0.5, lt=1)] = 0.95,
        maker: Literal["policy", "reviser"] = "policy",
        step: Positive = 4,
        temperature: Temperature = None,
    ) -> Adaptive:
        """At most `budget` samples. `sure`: the probability, required to stop, that the leader stays ahead."""
        return cls(budget, sure, maker, step, temperature)

    @property
    def name(self) -> str:
        return (
            f"adaptive:{self.n}:{self.sure:g}:{self.maker}"
            + option("step", self.step, 4)
            + option("t", self.temperature, None)
        )

    @property
    def label(self) -> str:
        return f"adaptive to {self.n}\n{self.maker} {self.sure:g}"

    async def run(self, question: Question, searcher: Searcher, tag: str) -> Sequence[Candidate]:
        """Sample `step` solutions at a time, score them, and stop when the vote is decided or there are `n`."""
        made: list[Candidate] = []
        while len(made) < self.n and not self.decided(made):
            more = range(len(made), min(len(made) + self.step, self.n))
            drawn = await draw(self, searcher, question, tag, more, self.temperature)
            made += await judge(question, drawn, searcher.prm, searcher.kept, before=made)
        return made

    def decided(self, candidates: Sequence[Candidate]) -> bool:
        """Whether the leading answer would stay ahead with probability `sure` if sampling went on."""
        return certainty(votes(candidates)) >= self.sure

    def covers(self, other: Strategy) -> bool:
        """True if `other` draws from the same model in the same steps and stops no later."""
        return (
            isinstance(other, Adaptive)
            and other.n <= self.n
            and other.sure <= self.sure
            and (other.maker, other.step, other.temperature) == (self.maker, self.step, self.temperature)
        )

    def part(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        count = 0
        while count < min(self.n, len(candidates)) and not self.decided(candidates[:count]):
            count += self.step
        return candidates[: min(count, self.n)]
