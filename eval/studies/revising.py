"""Does a revision do more than another draw? How often it changes a verdict, beside a fresh attempt, in several runs.

SCoRe's two rates (Kumar et al. 2024, arXiv 2409.12917) with their null: an independent first attempt of the same
reviser at the same question, as the search stage has drawn both. Each question counts once, by its mean over the
attempts of its chain that were wrong (`wrong_to_right`) or right; one without such an attempt is left out.
"""

from __future__ import annotations

import argparse

import numpy as np

from eval.shared import add_runs
from flywheel.errors import UserError
from flywheel.measure.stats import bootstrap_runs
from flywheel.records import Split, Verdict
from flywheel.runs.run import Run
from flywheel.stages.search import CHANGES, changes
from flywheel.stages.shared import ids, judged

Rates = dict[str, tuple[float, float]]  # question -> (share of revisions that change the verdict, of fresh attempts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, round=False)


def of_run(run: Run, round: int) -> dict[str, Rates]:
    """By kind of change, its rates by question. Raises UserError if the round revised nothing."""
    out: dict[str, Rates] = {name: {} for name in CHANGES}
    for question, pairs in judged(run, "search", round):
        correct = {s.id: verdict is Verdict.CORRECT for s, verdict in pairs}
        found: dict[str, list[tuple[float, float]]] = {}
        for name, changed, fresh in changes([s for s, _ in pairs], correct):
            found.setdefault(name, []).append((changed, fresh))
        for name, rates in found.items():
            out[name][question] = tuple(np.mean(rates, axis=0))
    if not any(out.values()):
        raise UserError(f"{run.root}: round {round} revised nothing on test questions (evaluate.revise_attempts)")
    return out


def measure(args: argparse.Namespace) -> dict:
    questions = ids(args.runs[0], Split.TEST)
    last, nothing = min(max(run.rounds) for run in args.runs), (np.nan, np.nan)
    rounds = []
    for round in range(1, last + 1):
        by_run, out = [of_run(run, round) for run in args.runs], {"round": round}
        for name in CHANGES:
            rates = np.array([[found[name].get(q, nothing) for q in questions] for found in by_run])
            revised, fresh = rates[..., 0], rates[..., 1]
            out[name] = {
                "revision": bootstrap_runs(revised),
                "fresh": bootstrap_runs(fresh),
                "revision_less_fresh": bootstrap_runs(revised - fresh),
                "each_run": np.nanmean(revised - fresh, axis=1),
            }
        rounds.append(out)
    return {"runs": [str(run.root) for run in args.runs], "rounds": rounds}
