"""Search over revisions: a population of attempts whose best are revised again.

Snell et al. name revisions and search against a verifier as two ways to change the proposal
and the selection (section 3) and leave their combination open; this is one: the reviser
proposes, the PRM says which attempts it gets to see.
"""

from __future__ import annotations

from flywheel.prm import together
from flywheel.records import Candidate, Question, Refine
from flywheel.search.revise import revision_prompt
from flywheel.search.tools import Found, Tools, attempt, judged_anew


async def refine(strategy: Refine, question: Question, tools: Tools, *, tag: str) -> Found:
    """Draw `width` attempts at a time, `n` in all, each from the best `context` attempts so far, the best of them last.

    The first come from the plain question. Attempts without an answer are never shown; equal
    ones are shown once. Where they do not fit the model, the worst are left out (`dropped`).
    """
    made: list[Candidate] = []
    dropped = 0
    while len(made) < strategy.n:
        distinct = {c.solution.tokens: c for c in reversed(made) if c.solution.answer is not None}  # the first of equal ones
        best = sorted(distinct.values(), key=lambda c: c.score)[-strategy.context :]
        prompt, left_out = revision_prompt(tools.reviser, question, [c.solution for c in best], tools, strategy.context)
        dropped += left_out
        places = range(len(made), min(len(made) + strategy.width, strategy.n))
        drawn = await together(
            attempt(
                tools.reviser,
                prompt,
                tools,
                question,
                purpose="refine",
                id=f"{question.id}/{tag}/{i}",
                origin=f"refine:{strategy.n}:{strategy.width}",
                parent=best[-1].solution.id if best else None,
                attempt=i // strategy.width + 1,
            )
            for i in places
        )
        made += await judged_anew(question, drawn, made, tools)
    return Found(tuple(made), {"duplicates": len(made) - len({c.solution.tokens for c in made}), "dropped": dropped})
