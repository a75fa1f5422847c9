"""Compute the rows of the claims: for each id in claims.yaml its cases, and `ours` for each case.

Values are per question; the texts of the rows and the zeros that decide them are in claims.yaml.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from eval.claims.rounds import Rounds
from eval.claims.study import BINS, GRADES, Study
from flywheel.records import Role
from flywheel.search.adaptive import Adaptive
from flywheel.search.beam import Beam
from flywheel.search.best_of_n import BestOfN
from flywheel.search.dvts import Dvts
from flywheel.search.greedy import Greedy
from flywheel.search.particle import Particle
from flywheel.search.revise import Revise
from flywheel.search.strategy import Strategy

DATA = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
LOW = 16  # generations: a low budget
Case = dict[str, Any]
Ours = dict[str, tuple[str, Callable[..., np.ndarray]]]  # row id -> (name of its cases, function(subject, **case))


@dataclass(frozen=True)
class Row:
    """The claim that the mean of `values` (one per question, NaN is left out) is above `zero`, or below `most`."""

    claim: str
    paper: str
    values: np.ndarray
    unit: str = "accuracy"
    zero: float = 0.0
    most: float | None = None


def study_rows(study: Study) -> dict[str, Row]:
    """Row id -> row over `study.questions`, for all rows that one run's study allows."""
    return rows(STUDY, study, study_cases(study))


def round_rows(rounds: Rounds) -> dict[str, Row]:
    """Row id -> row over `rounds.questions`, for the rows about a run's rounds."""
    about = {"last": rounds.last, "count": len(rounds.questions), "search": rounds.search}
    return rows(ROUNDS, rounds, {"once": [about]})


def rows(ours: Ours, subject: Study | Rounds, cases: dict[str, list[Case]]) -> dict[str, Row]:
    found = {}
    for id, (name, compute) in ours.items():
        said = {key: value for key, value in DATA["rows"][id].items() if key not in ("says", "flaw")}
        for case in cases[name]:
            values = np.asarray(compute(subject, **case), dtype=float)
            found[id.format(**case)] = Row(DATA["rows"][id]["says"].format(**case), values=values, **said)
    return found


PLANS = (  # claim, its title, the strategies of the plan besides best-of-N, the makers of the parallel samples
    ("1", "search", (Beam,), (Role.POLICY,)),
    ("2", "revisions", (Revise,), (Role.REVISER,)),
    ("1+2", "of all strategies", (Beam, Revise, Adaptive), (Role.POLICY, Role.REVISER)),
    ("distilled", "revisions", (Revise,), (Role.POLICY,)),
)
EVERY = (Beam, Dvts, Particle, Revise, Adaptive, Greedy, BestOfN)


def baseline(makers: Sequence[Role], n: int | str) -> str:
    """What `n` parallel samples of one of `makers` are called."""
    if makers == (Role.POLICY,):
        return f"best-of-{n} weighted"
    which = "the reviser" if makers == (Role.REVISER,) else "the policy or the reviser, whichever is better"
    return f"best-of-{n} weighted of {which}"


def study_cases(s: Study) -> dict[str, list[Case]]:
    """Name -> the cases (keyword arguments) that a study allows; empty if a needed strategy was not tried."""
    top, low = s.budgets[-1], s.budgets[0]
    tried = {Adaptive, *(kind for kind in (Beam, Revise) if s.strategies(top, kind))}
    plans = [
        {
            "number": number,
            "title": title,
            "kinds": kinds,
            "budget": budget,
            "makers": makers,
            "baseline": baseline(makers, budget),
            "any": baseline(makers, "N"),
        }
        for number, title, kinds, makers in PLANS
        if tried >= set(kinds)
        for budget in s.budgets
        if all(budget in s.counts(maker) for maker in makers)
    ]
    every = [{"budget": budget, "beam": beam} for budget in s.budgets for beam in s.strategies(budget, Beam)]
    beams = [case for case in every if not case["beam"].lookahead]
    chains = [{"budget": budget} for budget in s.budgets if (budget, Revise(budget)) in s.tried]
    parallel = [{**case, "how": how} for case in chains for how in ("weighted", "majority")]
    ends = [{"low": low, "top": top}] if top > low else []
    return {
        "plans": plans,
        "quarters": [
            {**case, "more": more, "baseline": baseline(case["makers"], more)}
            for case in plans
            if all((more := 4 * case["budget"]) in s.counts(maker) for maker in case["makers"])
        ],
        "predicted": [case for case in plans if case["number"] != "distilled"],
        "grades": [{**case, "grade": grade} for case in plans for grade in GRADES],
        "simple": [{"budget": b, "grade": g} for b in s.budgets for g in GRADES if s.strategies(b, Greedy)],
        "rises": [{"fewer": fewer, "more": more} for fewer, more in pairwise(s.counts(Role.REVISER))],
        "adaptives": [
            {"budget": b, "strategy": a, "any": baseline((a.maker,), "N")}
            for b in s.budgets
            for a in s.strategies(b, Adaptive)
            if s.counts(a.maker)
        ],
        "trees": [{"budget": b, "strategy": t} for b in s.budgets for t in s.strategies(b, Dvts, Particle)],
        "beams": beams,
        "low beams": [case for case in beams if case["budget"] == low <= LOW],
        "ends": ends,
        "ends of beam": [case for case in ends if all((b, Beam(b, 4)) in s.tried for b in (low, top))],
        "lookaheads": [{**c, "plain": Beam(c["budget"], min(4, c["budget"]))} for c in every if c["beam"].lookahead],
        "longest chain": chains[-1:],
        "long chain": [case for case in chains[-1:] if case["budget"] > 4],
        "parallel": (parallel := [c for c in parallel if (c["budget"], Revise(1, c["budget"], c["how"])) in s.tried]),
        "ratios": [case for case in parallel if case["how"] == "weighted"],
        "once": [{}],
        "64": [{}] if 64 in s.sizes else [],
    }


def attempts(s: Study, budget: int) -> np.ndarray:
    """(questions, attempts) of one chain, 1.0 where right, else 0.0."""
    return np.array([tried.by_attempt for tried in s.tried[budget, Revise(budget)]], dtype=float)


def lost(s: Study, budget: int) -> np.ndarray:
    """The fraction of right attempts whose next attempt is wrong; NaN if none is right."""
    before, after = attempts(s, budget)[:, :-1], attempts(s, budget)[:, 1:]
    count = before.sum(axis=1)
    return ((before == 1) & (after == 0)).sum(axis=1) / np.where(count, count, np.nan)


def over_parallel(
    s: Study, budget: int, kinds: tuple[type[Strategy], ...], makers: Sequence[Role], n: int, **_
) -> np.ndarray:
    return s.plan(budget, kinds, "oracle").right - s.best_parallel(n, makers)[0]


def net(
    s: Study, budget: int, kinds: tuple[type[Strategy], ...], makers: Sequence[Role], grade: str, **_
) -> np.ndarray:
    plan = s.plan(budget, kinds, grade)
    return plan.right - s.at_tokens(plan.net.mean(), makers)


def over_simple(s: Study, budget: int, grade: str) -> np.ndarray:
    """The plan with all strategies and temperatures, less the simple strategy that is best for at most its tokens.

    Simple is what knows no difficulty and no search: greedy answers, and parallel samples of one maker at one
    temperature with one vote. Which of them is chosen on the other half of the questions. A hundredth more tokens is
    allowed, since the plan may be one of them in every bin.
    """
    plan = s.plan(budget, EVERY, grade)
    simple = [
        right
        for strategy, (right, tokens) in s.options().items()
        if strategy.simple and tokens.mean() <= 1.01 * plan.net.mean()
    ]
    return plan.right - s.best_of(simple)


def goes_on(s: Study, fewer: int, more: int) -> np.ndarray:
    few, many = (over_parallel(s, n, (Revise,), (Role.REVISER,), n) for n in (fewer, more))
    return many - few


def predicted_less_oracle(s: Study, budget: int, kinds: tuple[type[Strategy], ...], **_) -> np.ndarray:
    return s.plan(budget, kinds, "predicted").right - s.plan(budget, kinds, "oracle").right


def at_equal_tokens(s: Study, budget: int, strategy: Strategy, **_) -> np.ndarray:
    """Accuracy minus that of its maker's parallel samples at equal mean tokens; without bins it has no other costs."""
    return s.row(budget, strategy) - s.at_tokens(s.row(budget, strategy, "tokens").mean(), (strategy.maker,))


def at_equal_computed(s: Study, budget: int, beam: Beam) -> np.ndarray:
    """Accuracy minus that of best-of-N at equal mean tokens, not counting those that the prefix cache served."""
    return s.row(budget, beam) - s.at_tokens(s.computed(budget, beam), computed=True)


def sequential_gain(s: Study, budget: int, how: str) -> np.ndarray:
    return s.row(budget, Revise(budget, 1, how)) - s.row(budget, Revise(1, budget, how))


def best_ratio_gain(s: Study, budget: int, how: str) -> np.ndarray:
    ratios = [s.row(budget, r) for r in s.strategies(budget, Revise) if r.select == how]
    return s.best_of(ratios) - s.row(budget, Revise(1, budget, how))


def goal_makers(s: Study) -> tuple[Role, ...]:
    """The makers of the 64 parallel samples that the goal is measured against."""
    return tuple(maker for maker in (Role.POLICY, Role.REVISER) if 64 in s.counts(maker))


def goal_share(s: Study) -> np.ndarray:
    """Tokens of the cheapest strategy that reaches best-of-64's accuracy, as a fraction of best-of-64's mean tokens."""
    right, tokens = s.best_parallel(64, goal_makers(s))
    return s.cheapest(right)[1] / tokens.mean()


def best_on_hardest(s: Study) -> np.ndarray:
    """Accuracy in bin 5 of what was best there on the other half: best-of-N or a strategy at the largest budget."""
    rows = [
        s.best_of_n(s.sizes[-1], "weighted"),
        *(s.row(b, strategy) for b, strategy in s.tried if b == s.budgets[-1]),
    ]
    out = np.full(len(s.questions), np.nan)
    hard = s.bins("oracle") == BINS
    for fit, use in s.halves():
        best = max(rows, key=lambda row: row[fit][hard[fit]].mean())
        out[use] = np.where(hard[use], best[use], np.nan)
    return out


STUDY: Ours = {
    "{number}.gross@{budget}": ("plans", lambda s, budget, **case: over_parallel(s, budget, n=budget, **case)),
    "{number}.quarter@{budget}": ("quarters", lambda s, more, **case: over_parallel(s, n=more, **case)),
    "{number}.net-{grade}@{budget}": ("grades", net),
    "simple.net-{grade}@{budget}": ("simple", over_simple),
    "2.goes_on@{more}": ("rises", goes_on),
    "3.{title}@{budget}": ("predicted", predicted_less_oracle),
    "4.low:{beam.name}": ("low beams", lambda s, budget, beam: s.row(budget, beam) - s.best_of_n(budget, "weighted")),
    "4.tokens:{beam.name}": ("beams", lambda s, budget, beam: at_equal_tokens(s, budget, beam)),
    "4.computed:{beam.name}": ("beams", at_equal_computed),
    "4.bins3-4:{beam.name}": (
        "beams",
        lambda s, budget, beam: s.in_bins(s.row(budget, beam) - s.best_of_n(budget, "weighted"), 3, 4),
    ),
    "5.beam": (
        "ends of beam",
        lambda s, low, top: s.in_bins(s.row(low, Beam(low, 4)) - s.row(top, Beam(top, 4)), 1, 2),
    ),
    "5.best_of_n": (
        "ends",
        lambda s, low, top: s.in_bins(s.best_of_n(top, "weighted") - s.best_of_n(low, "weighted"), 1, 2),
    ),
    "6.{beam.name}": ("lookaheads", lambda s, budget, beam, plain: s.row(budget, plain) - s.row(budget, beam)),
    "7.slope": ("long chain", lambda s, budget: attempts(s, budget)[:, 4:].mean(axis=1) - attempts(s, budget)[:, 0]),
    "8.lost": ("longest chain", lost),
    "8.selection": (
        "longest chain",
        lambda s, budget: s.row(budget, Revise(budget)) - s.row(budget, Revise(budget, 1, "last")),
    ),
    "9.{how}@{budget}": ("parallel", sequential_gain),
    "10.ratio@{budget}": ("ratios", best_ratio_gain),
    "10.easy@{budget}": ("ratios", lambda s, budget, how: s.in_bins(sequential_gain(s, budget, how), 1, 2)),
    "14.hardest": ("once", best_on_hardest),
    "adaptive:{strategy.name}": ("adaptives", at_equal_tokens),
    "tree:{strategy.name}": ("trees", at_equal_tokens),
    "goal.accuracy": ("64", lambda s: s.cheapest(s.best_parallel(64, goal_makers(s))[0])[0]),
    "goal.tokens": ("64", goal_share),
}
ROUNDS: Ours = {
    "14.rounds": ("once", lambda r, **_: r.gain_on_hardest()),
    "15.singles": ("once", lambda r, search, **_: r.rates(r.last) - r.searched(search)),
}
