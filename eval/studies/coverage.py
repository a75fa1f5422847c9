"""Does the harvest plan find more new solutions than samples for the same tokens?

The harvest's own fair baseline. RUNs are loops, --uniform runs of ReST^EM (uniform samples in the harvest) with the
same seeds, whose first policy is the same base. A training question is covered when the sample stage's solutions and
the harvest's hold one that `harvest.min_votes` agree on, so that something of it is distilled.

Covered questions of round 1, as a share of all: by the sample stage alone, by the plan, by uniform samples for no more
tokens than the plan's, by samples until a question is covered (`harvest.extra`) for no more tokens, and by all uniform
samples; the plan's lead over its two rivals, with 95% intervals over questions and runs. A sample costs what one of
the uniform harvest costs on average. What PRM, reviser and calibration cost, which the plan needs, is not charged.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from eval.shared import add_runs
from flywheel.errors import UserError
from flywheel.measure.stats import bootstrap_runs
from flywheel.records import Solution, Split, Verdict
from flywheel.runs.run import Run
from flywheel.stages.harvest import AT_ONCE
from flywheel.stages.shared import enough_votes, ids, judged

Drawn = Mapping[
    str, Sequence[tuple[Solution, bool]]
]  # a question's solutions in the order of their draws, and if right
ROUND = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, round=False)
    parser.add_argument(
        "--uniform", nargs="+", type=Run, required=True, metavar="RUN", help="ReST^EM, one for each RUN"
    )


def drawn(run: Run, stage: str) -> Drawn:
    found = dict(judged(run, stage, ROUND, questions=ids(run, Split.TRAIN)))
    return {q: [(s, verdict is Verdict.CORRECT) for s, verdict in pairs] for q, pairs in found.items()}


def tokens(run: Run) -> int:
    return run.manifest("harvest", ROUND)["tokens"]


def first_covered(have: Sequence[tuple[Solution, bool]], more: Sequence[tuple[Solution, bool]], spec) -> int | None:
    """How many of `more` it takes until the question is covered; None: all of them do not cover it."""
    right = [s for s, correct in have if correct]
    if enough_votes(spec, right):
        return 0
    for count, (solution, correct) in enumerate(more, 1):
        if correct:
            right.append(solution)
            if enough_votes(spec, right):
                return count
    return None


def largest(cost: Callable[[int], float], most: int, limit: float) -> int:
    """The largest number of samples a question, up to `most`, for which `cost` is at most `limit`."""
    return max((k for k in range(most + 1) if cost(k) <= limit), default=0)


def one_run(run: Run, other: Run) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(covered or not by training question, by way; what was spent and allowed)."""
    spec, questions = run.recipe.harvest, ids(run, Split.TRAIN)
    have, plan, uniform = drawn(run, "sample"), drawn(run, "harvest"), drawn(other, "harvest")
    if have != drawn(other, "sample"):
        raise UserError(
            f"{other.root}: its first samples are not those of {run.root}; a run of the same seed is wanted"
        )
    need = {q: first_covered(have.get(q, ()), uniform.get(q, ()), spec) for q in questions}
    most = max(map(len, uniform.values()))
    price, limit = tokens(other) / sum(map(len, uniform.values())), tokens(run)
    each = largest(lambda k: k * len(questions) * price, most, limit)
    drawn_for = {q: most if n is None else AT_ONCE * -(-n // AT_ONCE) for q, n in need.items()}  # as the stage draws
    until = largest(lambda k: sum(min(k, n) for n in drawn_for.values()) * price, most, limit)

    def within(k: int) -> list[float]:
        return [float(need[q] is not None and need[q] <= k) for q in questions]

    by_plan = [float(first_covered([*have.get(q, ()), *plan.get(q, ())], (), spec) == 0) for q in questions]
    ways = {"samples": within(0), "plan": by_plan, "uniform": within(each), "until": within(until), "all": within(most)}
    return ways, {"plan_tokens": limit, "uniform_each": each, "until_at_most": until, "all_tokens": tokens(other)}


def measure(args: argparse.Namespace) -> dict:
    if len(args.runs) != len(args.uniform):
        raise UserError("--uniform: one run for each RUN wanted")
    ways, spent = zip(*(one_run(run, other) for run, other in zip(args.runs, args.uniform)))
    by_way = {way: np.array([found[way] for found in ways]) for way in ways[0]}
    lead = {way: by_way["plan"] - by_way[way] for way in ("uniform", "until")}
    return {
        "covered": {way: bootstrap_runs(rows) for way, rows in by_way.items()},
        "plan_less": {way: bootstrap_runs(rows) for way, rows in lead.items()},
        "each_run": {way: rows.mean(axis=1) for way, rows in by_way.items()},
        "spent": list(spent),
    }
