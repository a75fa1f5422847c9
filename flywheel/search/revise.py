"""Sequential revisions: the prompt of each attempt holds the attempts before it (Snell et al., 6.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from flywheel.models.engine import Engine
from flywheel.models.prm import together
from flywheel.recipe import Positive
from flywheel.records import Candidate, Question, Role, Solution
from flywheel.search.select import hierarchical, majority
from flywheel.search.strategy import Searcher, Strategy, Temperature, Unfit, attempt, judge, option

LONGEST = 64  # attempts in a revision chain (Snell et al., 6.2)
Select = Literal["weighted", "majority", "last"]


@dataclass(frozen=True)
class Revise(Strategy):
    """`chains` independent chains of `length` attempts; a prompt holds at most the last `context` attempts.

    `select`: `weighted` within each chain and then across chains, `majority` over all attempts,
    or `last`, the majority over the last attempt of each chain.
    """

    length: int
    chains: int = 1
    select: Select = "weighted"
    context: int = 4
    temperature: float | None = None

    kind: ClassVar[str] = "revise"
    maker: ClassVar[Role] = Role.REVISER

    @classmethod
    def at(
        cls,
        budget: int,
        *,
        chains: Positive = 1,
        select: Select = "weighted",
        context: Positive = 4,
        temperature: Temperature = None,
    ) -> Revise:
        """Chains of budget / chains attempts. Raises Unfit if that is no whole number or more than LONGEST."""
        if budget % chains:
            raise Unfit(f"revise in {chains} chains", "they do not divide it")
        if budget // chains > LONGEST:
            raise Unfit(f"revise in {chains} chains", f"of more than {LONGEST} attempts each")
        return cls(budget // chains, chains, select, context, temperature)

    @property
    def name(self) -> str:
        return (
            f"revise:{self.length}x{self.chains}:{self.select}"
            + option("context", self.context, 4)
            + option("t", self.temperature, None)
        )

    @property
    def label(self) -> str:
        return f"revise {self.length} x {self.chains}\n{self.select}"

    @property
    def generations(self) -> int:
        return self.length * self.chains

    @property
    def judged(self) -> bool:
        return self.select == "weighted"

    @property
    def simple(self) -> bool:
        """Chains of one attempt are the reviser's parallel samples."""
        return self.length == 1

    async def run(self, question: Question, searcher: Searcher, tag: str) -> Sequence[Candidate]:
        """Candidates chain by chain. The reviser writes every attempt, the first with no attempts in its prompt.

        The PRM scores each attempt alone, while the paper's verifier of revisions also sees the attempts before it.
        """

        async def chain(number: int) -> list[Candidate]:
            made: list[Candidate] = []
            for place in range(self.length):
                prompt = revision_prompt(searcher.reviser, question, [c.solution for c in made], searcher, self.context)
                made.append(
                    await attempt(
                        searcher.reviser,
                        prompt,
                        searcher,
                        question,
                        purpose=self.kind,
                        id=f"{question.id}/{tag}/{number * self.length + place}",
                        draw=made[0].solution.id if made else None,  # attempts of a chain are not independent
                        parent=made[-1].solution.id if made else None,
                        attempt=place + 1,
                        temperature=self.temperature,
                    )
                )
            return made

        candidates = [c for made in await together(map(chain, range(self.chains))) for c in made]
        return await judge(question, candidates, searcher.prm, searcher.kept) if self.judged else candidates

    def answer(self, candidates: Sequence[Candidate]) -> str | None:
        answers, scores = [c.solution.answer for c in candidates], [c.score for c in candidates]
        match self.select:
            case "majority":
                return majority(answers)
            case "last":
                return majority([c.solution.answer for c in candidates if c.solution.attempt == self.length])
            case "weighted":
                starts = [i for i, c in enumerate(candidates) if c.solution.attempt == 1]
                ends = [*starts[1:], len(answers)]
                return hierarchical([(answers[a:b], scores[a:b]) for a, b in zip(starts, ends)])
            case _:
                raise ValueError(f"{self.name}: no such way to select")

    def covers(self, other: Strategy) -> bool:
        """True if `other` has no more and no longer chains, drawn alike, and needs no missing scores."""
        return (
            isinstance(other, Revise)
            and other.length <= self.length
            and other.chains <= self.chains
            and (other.context, other.temperature) == (self.context, self.temperature)
            and (self.judged or not other.judged)
        )

    def part(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        firsts = [c.solution.id for c in candidates if c.solution.attempt == 1][: self.chains]
        return [c for c in candidates if c.solution.draw in firsts and c.solution.attempt <= self.length]


def revision_prompt(
    reviser: Engine, question: Question, attempts: Sequence[Solution], searcher: Searcher, context: int
) -> list[int]:
    """The prompt (token ids) for the attempt after `attempts`, oldest first.

    It holds the last `context` attempts that have an answer: the reviser saw no others in training. The oldest are
    dropped until the prompt and `sample.max_tokens` fit the model.
    """
    shown = [s for s in attempts if s.answer is not None][-context:]
    while True:
        ids = searcher.prompts.revise(question, shown)
        if not shown or len(ids) + searcher.sample.max_tokens <= reviser.max_model_len:
            return ids
        shown = shown[1:]
