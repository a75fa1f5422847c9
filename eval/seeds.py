"""Does the loop turn? python -m eval.seeds RUN [RUN ...]: several seeds of one recipe together.

Every figure is averaged over the runs question by question (they share their test
questions), and its interval is a bootstrap over questions; gains are paired. So the
interval speaks of other questions, while the runs' own values, printed beside, show how
much the seeds differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.cli import answer
from flywheel.measure.bins import fixed_bins, left_bin
from flywheel.measure.stats import bootstrap_mean, paired_gain
from flywheel.recipe import load
from flywheel.records import Answered, Split
from flywheel.runs.history import History
from flywheel.runs.run import Context, Stage
from flywheel.stages.kit import test_rates


def context(run: Path, round: int) -> Context:
    """A reader of one round's test results."""
    inputs = tuple(f"{stage}@{r}" for r in range(round + 1) for stage in ("evaluate", "search", "calibrate"))
    return Context(
        load(run / "recipe.yaml"), run, round, Stage("seeds", (), inputs, train=lambda ctx: {}, test_split=True)
    )


def together(runs: Sequence[dict[str, float]]) -> list[float]:
    questions = sorted(set.intersection(*(set(run) for run in runs)))
    return [float(np.mean([run[q] for run in runs])) for q in questions]


def figure(runs: Sequence[dict[str, float]]) -> dict:
    mean, low, high = bootstrap_mean(together(runs))
    return {"mean": mean, "ci": [low, high], "runs": [float(np.mean(list(run.values()))) for run in runs]}


def answers(ctx: Context, round: int) -> dict[str, dict[str, float]]:
    """method -> question -> 1.0 where the answer of that round's search was right."""
    found: dict[str, dict[str, float]] = {}
    for row in ctx.read(Answered, "search", round):
        found.setdefault(row.method, {})[row.question_id] = float(row.correct)
    return found


def study(runs: Sequence[Path]) -> dict:
    last = min(max(History.of(run).rounds) for run in runs)
    readers = [context(run, last) for run in runs]
    edges = readers[0].recipe.calibrate.edges
    rates = [[test_rates(ctx, r) for ctx in readers] for r in range(last + 1)]
    out: dict = {"runs": [str(run) for run in runs], "questions": len(readers[0].problems(Split.TEST)), "rounds": []}
    for r in range(last + 1):
        row: dict = {"round": r, "pass@1": figure(rates[r])}
        if r:
            row["gain_from_last_round"] = paired_gain(together(rates[r - 1]), together(rates[r]))
            row["gain_from_round_0"] = paired_gain(together(rates[0]), together(rates[r]))
            row["times_round_0"] = row["pass@1"]["mean"] / out["rounds"][0]["pass@1"]["mean"]
            found = [answers(ctx, r) for ctx in readers]
            row["search"] = {m: figure([f[m] for f in found]) for m in found[0] if all(m in f for f in found)}
            matrices = [History.of(run).figures("evaluate", r) for run in runs]
            row["left_bin_5"] = [left_bin(m["migration"], len(edges) + 1) for m in matrices]
            row["left_bin_5_by_resampling"] = [left_bin(m["migration_null"], len(edges) + 1) for m in matrices]
            row["gate"] = [History.of(run).figures("gate", r)["passed"] for run in runs]
            row["reviser"] = [History.of(run).figures("search", r).get("reviser") for run in runs]
        start = [fixed_bins(test_rates(ctx, 0, "bin"), edges) for ctx in readers]
        row["by_fixed_bin"] = [
            float(
                np.mean(
                    [rate for run, bins in zip(rates[r], start) for q, rate in run.items() if bins[q] == b] or [np.nan]
                )
            )
            for b in range(1, len(edges) + 2)
        ]
        out["rounds"].append(row)
    if last:
        best = next(
            m for m in out["rounds"][1]["search"] if m.startswith("best_of_n_weighted@") and not m.endswith("verifier")
        )
        searched = together([answers(ctx, 1)[best] for ctx in readers])
        out[f"round_{last}_single_samples_over_round_1_{best}"] = paired_gain(searched, together(rates[last]))
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.seeds", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    args = parser.parse_args(argv)
    return answer(lambda: study(args.runs))


if __name__ == "__main__":
    sys.exit(main())
