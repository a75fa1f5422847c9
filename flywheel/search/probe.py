"""Search by a plan where a question's difficulty is not known: a few judged samples guess its bin first.

Snell et al., section 3.2, predict difficulty by the mean PRM score of 2,048 samples. Here it is `size` samples, which
stay candidates of the search that follows, so that they are not paid for twice.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from flywheel.measure.bins import fixed_bin
from flywheel.records import Candidate, Outcome
from flywheel.search.best_of_n import BestOfN
from flywheel.search.greedy import Greedy
from flywheel.search.plan import Plan
from flywheel.search.run import selected
from flywheel.search.strategy import Strategy

Ask = Callable[[Strategy, str], Awaitable[Outcome]]  # (strategy, tag) -> its outcome on the question


@dataclass(frozen=True)
class Probed:
    """The bin that the probe guessed, the plan's strategy for it, all candidates, the answer, the tokens of both."""

    bin: int
    strategy: Strategy
    candidates: Sequence[Candidate]
    answer: str | None
    tokens: int


async def by_probe(plan: Plan, budget: int, size: int, edges: Sequence[float], ask: Ask) -> Probed:
    """Draw a probe of `size` samples, bin it by its mean score and the falling `edges`, and search by the plan.

    Best-of-N at the recipe's temperature draws that many fewer; other strategies add the probe to their own
    candidates, but for the greedy answer, which is no vote.
    """
    probe = await ask(BestOfN(size), "probe")
    bin = fixed_bin(sum(c.score for c in probe.candidates) / size, edges)  # a probe that was cut off looks hard
    chosen, drawn = plan.strategy(bin, budget), tuple(probe.candidates)
    outcomes, by = [probe], chosen
    shares = isinstance(chosen, BestOfN) and chosen.temperature is None  # draws as the probe did
    if shares and chosen.n <= size:
        candidates = drawn[: chosen.n]
    else:
        asked = (replace(chosen, n=chosen.n - size), "after_probe") if shares else (chosen, chosen.name)
        rest = await ask(*asked)
        known = {c.solution.id for c in drawn}  # a search that was cut off returns the probe too
        more = tuple(c for c in rest.candidates if c.solution.id not in known)
        if not isinstance(chosen, Greedy):
            candidates = (*drawn, *more) if shares else (*more, *drawn)
        elif more:
            candidates = more
        else:  # cut off before its answer: the probe votes
            candidates, by = drawn, BestOfN(size, "majority")
        outcomes.append(rest)
    if not chosen.judged:  # the probe's scores would outweigh all votes that have none
        candidates = tuple(replace(c, values=(), score=0.0) for c in candidates)
    answer = selected(by, candidates, any(outcome.cut_off for outcome in outcomes))
    return Probed(bin, chosen, candidates, answer, sum(outcome.tokens for outcome in outcomes))
