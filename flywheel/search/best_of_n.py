"""Best-of-N: N independent solutions (Snell et al., 5.1)."""

from __future__ import annotations

from flywheel.models.prm import together
from flywheel.records import BestOfN, Question
from flywheel.search.tools import Found, Tools, attempt, judged, judges


async def best_of_n(strategy: BestOfN, question: Question, tools: Tools, *, tag: str) -> Found:
    """Sample `n` solutions at once; judge them unless a majority decides. Ids `question/tag/0..n-1`."""
    prompt = tools.prompts.solve(question)
    candidates = await together(
        attempt(
            tools.policy,
            prompt,
            tools,
            question,
            purpose="best_of_n",
            id=f"{question.id}/{tag}/{i}",
            origin=f"best_of_n:{strategy.n}",
        )
        for i in range(strategy.n)
    )
    distinct = len({c.solution.tokens for c in candidates})
    if judges(strategy):
        candidates = await judged(question, candidates, tools.prm, tools.kept)
    return Found(tuple(candidates), {"duplicates": strategy.n - distinct})
