"""Is the loop worth its parts? The first run against each other one, by the FLOPs spent on making the policy.

Every stage counts but `evaluate` and `search`, which only measure. Claim 15: the others are ReST^EM (uniform
sampling, no PRM, no reviser), a single round with more samples, or a loop with a part left out. `flywheel.iterate
--fork` and `python -m eval ablate` make them out of the first run, which keeps what they share. `--without STAGE ...`
leaves out what the other runs computed and their policies never used, as ReST^EM's PRM.

By run and round: FLOPs so far and pass@1 on the test questions; then the paired difference with its 95% interval over
questions, at the last round of each, and for each round of the other run the first run's last round that had cost no
more.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from eval.shared import add_runs
from flywheel.errors import UserError
from flywheel.measure.stats import bootstrap_mean, paired_gain
from flywheel.runs.run import Run
from flywheel.stages.shared import test_rates

MEASURING = ("evaluate", "search")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, round=False)
    help = "stages that the other runs' policies do not use"
    parser.add_argument("--without", nargs="*", default=[], metavar="STAGE", help=help)


@dataclass(frozen=True)
class Reached:
    """The end of a round: FLOPs spent on making the policy so far, and its pass@1 on each of `questions`."""

    round: int
    flops: float
    questions: list[str]
    rates: list[float]


def course(run: Run, unused: Sequence[str] = ()) -> list[Reached]:
    out, flops = [], 0.0
    for r in run.rounds:
        spent = [row for row in run.ledger_rows if row["round"] == r and row["stage"] not in (*MEASURING, *unused)]
        flops += sum(row["flops"] for row in spent)
        rates = dict(sorted(test_rates(run, r).items()))
        out.append(Reached(r, flops, list(rates), list(rates.values())))
    return out


def against(ours: Reached, theirs: Reached) -> dict:
    gain = paired_gain(theirs.rates, ours.rates)
    return {"rounds": [ours.round, theirs.round], "pass@1": gain, "flops": [ours.flops, theirs.flops]}


def measure(args: argparse.Namespace) -> dict:
    if len(args.runs) < 2:
        raise UserError("two runs at least: the first is compared with each other one")
    names = [str(run.root) for run in args.runs]
    courses = [course(args.runs[0]), *(course(run, args.without) for run in args.runs[1:])]
    first, out = courses[0], {"runs": {}, "first_less_others": {}}
    for name, reached in zip(names, courses):
        if reached[-1].questions != first[0].questions:
            raise UserError(f"{name}: other test questions than {names[0]}")
        rows = [{"round": at.round, "flops": at.flops, "pass@1": bootstrap_mean(at.rates)} for at in reached]
        out["runs"][name] = rows
    for name, others in zip(names[1:], courses[1:]):
        within = [against([mine for mine in first if mine.flops <= other.flops][-1], other) for other in others[1:]]
        out["first_less_others"][name] = {
            "last_rounds": against(first[-1], others[-1]),
            "within_the_other_s_flops": within,
        }
    return out
