"""Sequential revisions: each attempt sees the ones before it (Snell et al., 6.1)."""

from __future__ import annotations

from collections.abc import Sequence

from flywheel.models.engine import Engine
from flywheel.models.prm import together
from flywheel.records import Candidate, Question, Revise, Solution
from flywheel.search.tools import Found, Tools, attempt, judged, judges


async def revise(strategy: Revise, question: Question, tools: Tools, *, tag: str) -> Found:
    """`chains` independent chains of `length` attempts, all by the reviser, the first from the plain question.

    The context is the last `context` attempts of the chain. One that was cut off or has no
    answer is left out of it: the reviser never saw such a one in training. Where context
    and `max_tokens` do not fit the model, the oldest are dropped (`dropped`, in attempts).
    Candidates stand chain after chain; ids `question/tag/0..`. The plain PRM judges each
    attempt by itself (the paper's verifier of revisions sees the history: not here).
    """
    reviser = tools.reviser
    dropped = 0

    def prompt(attempts: list[Solution]) -> list[int]:
        nonlocal dropped
        ids, left_out = revision_prompt(reviser, question, attempts, tools, strategy.context)
        dropped += left_out
        return ids

    async def chain(number: int) -> list[Candidate]:
        made: list[Candidate] = []
        for place in range(strategy.length):
            made.append(
                await attempt(
                    reviser,
                    prompt([c.solution for c in made]),
                    tools,
                    question,
                    purpose="revise",
                    id=f"{question.id}/{tag}/{number * strategy.length + place}",
                    origin=f"revise:{strategy.length}x{strategy.chains}",
                    parent=made[-1].solution.id if made else None,
                    attempt=place + 1,
                )
            )
        return made

    chains = await together(map(chain, range(strategy.chains)))
    candidates = tuple(c for made in chains for c in made)
    distinct = len({c.solution.tokens for c in candidates})
    if judges(strategy):
        candidates = await judged(question, candidates, tools.prm, tools.kept)
    return Found(candidates, {"duplicates": len(candidates) - distinct, "dropped": dropped})


def revision_prompt(
    reviser: Engine, question: Question, attempts: Sequence[Solution], tools: Tools, context: int
) -> tuple[list[int], int]:
    """The prompt for the attempt after `attempts`, oldest first, and how many had to be left out of it to fit the model."""
    seen = [s for s in attempts if s.answer is not None][-context:]
    dropped = 0
    while True:
        ids = tools.prompts.revise(question, seen[dropped:])
        if dropped == len(seen) or len(ids) + tools.sample.max_tokens <= reviser.max_model_len:
            return ids, dropped
        dropped += 1
