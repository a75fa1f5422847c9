"""Best-of-N that stops by itself: a question's own samples say how many it needs.

Adaptive-Consistency (Aggarwal et al. 2023, arXiv 2305.11860) with the PRM's scores for votes,
each relative to the highest one so far: what is a high score differs from question to question.
It is the bandit's reading of Snell et al.'s section 3: no bin is guessed before, and what is
spent on seeing the difficulty is spent on the answer too.
"""

from __future__ import annotations

from collections.abc import Sequence

from flywheel.models.prm import together
from flywheel.problems.grading import answer_key
from flywheel.records import Adaptive, Candidate, Question
from flywheel.search.tools import Found, Tools, attempt, judged_anew


async def adaptive(strategy: Adaptive, question: Question, tools: Tools, *, tag: str) -> Found:
    """Sample `step` solutions at a time, judge them, and stop when the vote is decided or `n` are drawn."""
    revising = strategy.maker == "reviser"
    maker = tools.reviser if revising else tools.policy
    prompt = tools.prompts.revise(question, []) if revising else tools.prompts.solve(question)
    candidates: list[Candidate] = []
    while len(candidates) < strategy.n and not decided(strategy, candidates):
        places = range(len(candidates), min(len(candidates) + strategy.step, strategy.n))
        drawn = await together(
            attempt(
                maker,
                prompt,
                tools,
                question,
                purpose="adaptive",
                id=f"{question.id}/{tag}/{i}",
                origin=f"adaptive:{strategy.n}",
            )
            for i in places
        )
        candidates += await judged_anew(question, drawn, candidates, tools)
    return Found(tuple(candidates), {"drawn": len(candidates)})


def decided(strategy: Adaptive, candidates: Sequence[Candidate]) -> bool:
    """Whether the leading answer would stay ahead of the second with probability `sure`, were sampling to go on.

    The share of the leader among the two is Beta(1 + its votes, 1 + the other's) given the votes;
    decided is P(share > 1/2) >= sure. A vote weighs its PRM score in units of the highest score.
    """
    from scipy.stats import beta

    votes: dict[str, float] = {}
    highest = max((c.score for c in candidates), default=0.0) or 1.0
    for c in candidates:
        if c.solution.answer is not None:
            key = answer_key(c.solution.answer)
            votes[key] = votes.get(key, 0.0) + c.score / highest
    first, second = sorted([*votes.values(), 0.0, 0.0], reverse=True)[:2]
    return bool(votes) and float(beta.sf(0.5, 1 + first, 1 + second)) >= strategy.sure


def stopped(strategy: Adaptive, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The first of `candidates` that `strategy` would have drawn: as many steps as it needs."""
    count = 0
    while count < min(strategy.n, len(candidates)) and not decided(strategy, candidates[:count]):
        count += strategy.step
    return tuple(candidates[: min(count, strategy.n)])
