"""Sequential revisions: each attempt sees the ones before it (Snell et al., 6.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from flywheel.models.engine import Engine
from flywheel.models.prm import together
from flywheel.recipe import Positive
from flywheel.records import Candidate, Question, Role, Solution
from flywheel.search.select import hierarchical, majority
from flywheel.search.strategy import Searcher, Strategy, Unfit, attempt, judge, option

LONGEST = 64  # attempts in a revision chain (Snell et al., 6.2)
Select = Literal["weighted", "majority", "last"]


@dataclass(frozen=True)
class Revise(Strategy):
    """`chains` independent chains of `length` attempts, each attempt shown the last `context` ones before it.

    `select`: `weighted` within each chain and then across them, `majority` over all attempts,
    or `last`, the majority of the chains' last attempts.
    """

    length: int
    chains: int = 1
    select: Select = "weighted"
    context: int = 4

    kind: ClassVar[str] = "revise"
    maker: ClassVar[Role] = Role.REVISER

    @classmethod
    def at(cls, budget: int, *, chains: Positive = 1, select: Select = "weighted", context: Positive = 4) -> Revise:
        """Of a budget N, each of the chains has N / chains attempts."""
        if budget % chains:
            raise Unfit(f"revise in {chains} chains", "they do not divide it")
        if budget // chains > LONGEST:
            raise Unfit(f"revise in {chains} chains", f"of more than {LONGEST} attempts each")
        return cls(budget // chains, chains, select, context)

    @property
    def name(self) -> str:
        return f"revise:{self.length}x{self.chains}:{self.select}" + option("context", self.context, 4)

    @property
    def label(self) -> str:
        return f"revise {self.length} x {self.chains}\n{self.select}"

    @property
    def judged(self) -> bool:
        return self.select == "weighted"

    async def run(self, question: Question, searcher: Searcher, tag: str) -> Sequence[Candidate]:
        """All attempts are the reviser's, the first of a chain from the plain question. Chain after chain.

        The plain PRM judges each attempt by itself (the paper's verifier of revisions sees the history: not here).
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
                        draw=made[0].solution.id if made else None,  # an attempt sees those before it
                        parent=made[-1].solution.id if made else None,
                        attempt=place + 1,
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
        """Chains hold the first of them and their own beginnings, and a judged set holds a vote without its judge."""
        return (
            isinstance(other, Revise)
            and other.length <= self.length
            and other.chains <= self.chains
            and other.context == self.context
            and (self.judged or not other.judged)
        )

    def part(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        firsts = [c.solution.id for c in candidates if c.solution.attempt == 1][: self.chains]
        return [c for c in candidates if c.solution.draw in firsts and c.solution.attempt <= self.length]


def revision_prompt(
    reviser: Engine, question: Question, attempts: Sequence[Solution], searcher: Searcher, context: int
) -> list[int]:
    """The prompt for the attempt after `attempts`, oldest first.

    It holds the last `context` of them. One that was cut off or has no answer is left out: the reviser never saw such
    a one in training. Where context and `max_tokens` do not fit the model, the oldest are dropped.
    """
    shown = [s for s in attempts if s.answer is not None][-context:]
    while True:
        ids = searcher.prompts.revise(question, shown)
        if not shown or len(ids) + searcher.sample.max_tokens <= reviser.max_model_len:
            return ids
        shown = shown[1:]
