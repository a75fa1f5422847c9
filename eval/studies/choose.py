"""Which run's settings are the best, by calibration questions alone?

    accelerate launch -m flywheel.iterate --fork chain --name longer --round 1 --no-test --set distill.epochs=12
    python -m eval choose runs/chain runs/longer --round 1

A choice made by test figures makes these figures too good. Runs that are candidates are made with `--no-test`, compared
here, and only the chosen one is tested: the same command without `--no-test`. By run: pass@1 of the policy that the
round trained, passed by the gate or not, and its paired difference from the first run's, over the calibration
questions, with 95% intervals; the serve plan's accuracy and tokens by budget, cross-validated; the PRM's
within-question AUC on held-out training questions.
"""

from __future__ import annotations

import argparse

from eval.shared import add_runs
from flywheel.errors import UserError
from flywheel.measure.stats import bootstrap_mean, paired_gain
from flywheel.stages.shared import pass_rates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)


def measure(args: argparse.Namespace) -> dict:
    first: dict[str, float] = {}
    out = {}
    for run in args.runs:
        if run.manifest("gate", args.round) is None:
            more = f"flywheel iterate --round {args.round} --no-test finishes it"
            raise UserError(f"{run.root}: the gate of round {args.round} is not finished; {more}")
        rates = dict(sorted(pass_rates(run, "gate", args.round).items()))
        if not rates:
            raise UserError(f"{run.root}: the gate of round {args.round} judged no new policy")
        first = first or rates
        if rates.keys() != first.keys():
            raise UserError(f"{run.root}: other calibration questions than {args.runs[0].root}")
        out[str(run.root)] = {
            "pass@1": bootstrap_mean(list(rates.values())),
            "less_first": paired_gain(list(first.values()), list(rates.values())),
            "serve": run.figures("calibrate", args.round)["two_fold"],
            "prm": {k: v for k, v in run.figures("train_prm", args.round).items() if k.startswith("auc_within")},
        }
    return {"round": args.round, "runs": out}
