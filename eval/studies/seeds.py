"""Does the loop turn? Several seeds of one recipe together.

Every figure is the mean of the runs' own (they share their test questions), and its interval a bootstrap over runs and
questions; gains are paired. The runs' own values are printed beside.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import numpy as np

from eval.shared import add_runs, answers, over_runs
from flywheel.measure.bins import fixed_bins, left_bin
from flywheel.measure.stats import bootstrap_runs
from flywheel.records import Split
from flywheel.runs.run import Run
from flywheel.stages.shared import test_rates

Rates = Mapping[str, float]  # by question


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, round=False)


def figure(runs: Sequence[Rates]) -> dict:
    mean, low, high = bootstrap_runs(over_runs(runs))
    return {"mean": mean, "ci": [low, high], "runs": [np.mean(list(run.values())) for run in runs]}


def one_round(runs: Sequence[Run], r: int, rates: Sequence[Sequence[Rates]], starts: Sequence[dict[str, int]]) -> dict:
    """The figures of round `r`. `rates`: pass@1 by round and run; `starts`: round 0's fixed bins by run."""
    now, count = over_runs(rates[r]), len(runs[0].recipe.calibrate.edges) + 1
    row: dict = {"round": r, "pass@1": figure(rates[r])}
    policies = [run.figures("evaluate", r)["policy"] for run in runs]
    row["diversity"] = {key: [policy.get(key) for policy in policies] for key in ("distinct_right", "answer_entropy")}
    if r:
        row["gain_from_last_round"] = bootstrap_runs(now - over_runs(rates[r - 1]))
        row["gain_from_round_0"] = bootstrap_runs(now - over_runs(rates[0]))
        row["times_round_0"] = row["pass@1"]["mean"] / figure(rates[0])["mean"]
        greedy = [figure([test_rates(run, at, "greedy") for run in runs]) for at in (0, r)]
        row |= {"greedy": greedy[1], "greedy_times_round_0": greedy[1]["mean"] / greedy[0]["mean"]}
        found = [answers(run, r) for run in runs]
        row["search"] = {m: figure([f[m] for f in found]) for m in found[0] if all(m in f for f in found)}
        measured = [run.figures("evaluate", r) for run in runs]
        row["left_bin_5"] = [left_bin(m["migration"], count) for m in measured]
        row["left_bin_5_by_resampling"] = [left_bin(m["migration_null"], count) for m in measured]
        row["gate"] = [run.figures("gate", r)["passed"] for run in runs]
        row["reviser"] = [run.figures("search", r).get("reviser") for run in runs]  # with intervals: `revising`
    inside = [
        [rate for run, bins in zip(rates[r], starts) for q, rate in run.items() if bins[q] == b]
        for b in range(1, count + 1)
    ]
    row["by_fixed_bin"] = [np.mean(group or [np.nan]) for group in inside]
    return row


def measure(args: argparse.Namespace) -> dict:
    runs: list[Run] = args.runs
    last = min(max(run.rounds) for run in runs)
    rates = [[test_rates(run, r) for run in runs] for r in range(last + 1)]
    starts = [fixed_bins(test_rates(run, 0, "bin"), runs[0].recipe.calibrate.edges) for run in runs]
    out: dict = {"runs": [str(run.root) for run in runs], "questions": len(runs[0].problems(Split.TEST))}
    out["rounds"] = [one_round(runs, r, rates, starts) for r in range(last + 1)]
    if last:
        names = out["rounds"][1]["search"]
        best = next(m for m in names if m.startswith("best_of_n_weighted@") and not m.endswith("verifier"))
        searched = over_runs([answers(run, 1)[best] for run in runs])
        out[f"round_{last}_single_samples_over_round_1_{best}"] = bootstrap_runs(over_runs(rates[last]) - searched)
    return out
