"""Is the loop worth its parts? The first run against each other one, by the FLOPs spent on making the policy.

Every stage counts but `evaluate` and `search`, which only measure. Claim 15: the others are ReST^EM (uniform
sampling, no PRM, no reviser), a single round with more samples, or a loop with a part left out. `flywheel.iterate
--fork` and `python -m eval ablate` make them out of the first run, which keeps what they share. `--without STAGE ...`
leaves out what the other runs computed and their policies never used, as ReST^EM's PRM.

By run and round: FLOPs so far, pass@1 on the test questions, greedy answers, majority vote and pass@k; then the paired
difference of pass@1 and of greedy answers with its 95% interval over questions and runs: at the last round of each; at
equal FLOPs, those of the cheaper one's last round, where the dearer one lies between two of its rounds; and for each
round of the other run at the first run's last round that had cost no more. With `--seeds K` each K runs in a row
are seeds of one recipe, in the same order: FLOPs are their mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.shared import add_runs
from flywheel.errors import UserError
from flywheel.measure.stats import bootstrap_runs
from flywheel.runs.run import Run
from flywheel.stages.shared import test_rates

MEASURING = ("evaluate", "search")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, round=False)
    help = "stages that the other runs' policies do not use"
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="runs that are seeds of one recipe (1)")
    parser.add_argument("--without", nargs="*", default=[], metavar="STAGE", help=help)


@dataclass(frozen=True)
class Reached:
    """The end of a round: FLOPs spent on making the policy so far, pass@1 and greedy answers by run and question.

    `rates`: pass@1, greedy answers, majority vote and pass@k over all questions, by name. `round` has a fraction
    between two rounds.
    """

    round: float
    flops: float
    questions: list[str]
    singles: np.ndarray
    greedy: np.ndarray
    rates: dict[str, float]


def course(runs: Sequence[Run], unused: Sequence[str] = ()) -> list[Reached]:
    """The rounds that all `runs`, seeds of one recipe, have reached."""
    out, flops = [], 0.0
    for r in range(min(len(run.rounds) for run in runs)):
        for run in runs:
            spent = [row for row in run.ledger_rows if row["round"] == r and row["stage"] not in (*MEASURING, *unused)]
            flops += sum(row["flops"] for row in spent) / len(runs)
        figures = [run.figures("evaluate", r)["policy"] for run in runs]
        names = [name for name in figures[0] if "@" in name and not name.endswith("_ci")]
        rates = {name: float(np.mean([found[name] for found in figures])) for name in names}
        by_run = [[test_rates(run, r, purpose) for run in runs] for purpose in ("evaluate", "greedy")]
        questions = sorted(by_run[0][0])
        singles, greedy = (np.array([[found[q] for q in questions] for found in rates_of]) for rates_of in by_run)
        out.append(Reached(r, flops, questions, singles, greedy, rates))
    return out


def at(reached: Sequence[Reached], flops: float) -> Reached:
    """The point of a course at which `flops` are spent: its last round, or on a line between the rounds around it."""
    if reached[-1].flops <= flops:
        return reached[-1]
    before = max(i for i, end in enumerate(reached) if end.flops <= flops)
    low, high = reached[before], reached[before + 1]
    part = (flops - low.flops) / (high.flops - low.flops)
    singles, greedy = ((1 - part) * getattr(low, kind) + part * getattr(high, kind) for kind in ("singles", "greedy"))
    return Reached(low.round + part, flops, low.questions, singles, greedy, {})


def against(ours: Reached, theirs: Reached) -> dict:
    lead = ours.singles - theirs.singles
    gains = {"pass@1": bootstrap_runs(lead), "greedy@1": bootstrap_runs(ours.greedy - theirs.greedy)}
    return {
        "rounds": [ours.round, theirs.round],
        **gains,
        "pass@1_each_run": lead.mean(axis=1),
        "flops": [ours.flops, theirs.flops],
    }


def measure(args: argparse.Namespace) -> dict:
    k = args.seeds
    if k < 1 or len(args.runs) < 2 * k or len(args.runs) % k:
        raise UserError(f"two groups of --seeds {k} at least: the first is compared with each other one")
    groups = [args.runs[i : i + k] for i in range(0, len(args.runs), k)]
    names = [" ".join(str(run.root) for run in group) for group in groups]
    courses = [course(groups[0]), *(course(group, args.without) for group in groups[1:])]
    first, out = courses[0], {"runs": {}, "first_less_others": {}}
    for name, reached in zip(names, courses):
        if reached[-1].questions != first[0].questions:
            raise UserError(f"{name}: other test questions than {names[0]}")
        out["runs"][name] = [
            {"round": at.round, "flops": at.flops, **at.rates, "pass@1": bootstrap_runs(at.singles)} for at in reached
        ]
    for name, others in zip(names[1:], courses[1:]):
        within = [against([mine for mine in first if mine.flops <= other.flops][-1], other) for other in others[1:]]
        out["first_less_others"][name] = {
            "last_rounds": against(first[-1], others[-1]),
            "at_equal_flops": against(
                *(at(reached, min(first[-1].flops, others[-1].flops)) for reached in (first, others))
            ),
            "within_the_other_s_flops": within,
        }
    return out
