"""On which kinds of questions does the loop gain?

pass@1 by round and by the level of the test questions (`problems.fields.level`, or the task of reasoning-gym), with its
95% interval over questions and the paired gain over round 0; runs are averaged question by question. Greedy answers
likewise.
"""

from __future__ import annotations

import argparse

from eval.shared import add_runs, over_runs
from flywheel.measure.stats import bootstrap_runs
from flywheel.records import Split
from flywheel.stages.shared import test_rates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, round=False)


def measure(args: argparse.Namespace) -> dict:
    runs, out = args.runs, []
    levels = {p.id: p.level for p in runs[0].problems(Split.TEST)}
    rounds = range(min(max(run.rounds) for run in runs) + 1)
    for level in dict.fromkeys(levels.values()):
        row: dict = {"level": level, "questions": sum(own == level for own in levels.values())}
        for figure, purpose in (("pass@1", "evaluate"), ("greedy@1", "greedy")):
            rates = [[test_rates(run, r, purpose) for run in runs] for r in rounds]
            if not all(rate for by_run in rates for rate in by_run):  # a run of before greedy answers were drawn
                continue
            inside = [
                over_runs([{q: v for q, v in rate.items() if levels[q] == level} for rate in by_run])
                for by_run in rates
            ]
            row[figure] = [bootstrap_runs(values) for values in inside]
            row[f"{figure}_gain"] = [bootstrap_runs(values - inside[0]) for values in inside[1:]]
        out.append(row)
    return {"levels": out}
