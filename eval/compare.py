"""Is the loop worth its parts? python -m eval.compare RUN RUN [RUN ...]

The first run against each other one, at equal FLOPs spent on making the policy: every stage but
`evaluate` and `search`, which only measure. Claim 15: the others are ReST^EM (uniform sampling,
no PRM, no reviser), a single round with more samples, or a loop with a part left out.
`--without STAGE ...` leaves out what a run computed and its policy never used, as ReST^EM's PRM.
Prints JSON: by run and round, FLOPs so far and pass@1 on the test questions, and at the last
round of each the paired difference with its 95% interval over questions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.cli import answer
from eval.seeds import context
from flywheel.errors import UserError
from flywheel.history import History
from flywheel.stages.kit import test_rates
from flywheel.stats import bootstrap_mean, paired_gain

MEASURING = ("evaluate", "search")


def course(run: Path, unused: Sequence[str] = ()) -> list[dict]:
    """By round: FLOPs that have gone into the policy so far, and its rates by question."""
    history = History.of(run)
    last = max(history.rounds)
    reader, out, flops = context(run, last), [], 0.0
    for r in range(last + 1):
        flops += sum(row["flops"] for row in history.ledger if row["round"] == r and row["stage"] not in (*MEASURING, *unused))
        out.append({"round": r, "flops": flops, "rates": test_rates(reader, r)})
    return out


def compare(runs: Sequence[Path], unused: Sequence[str]) -> dict:
    courses = [course(runs[0]), *(course(run, unused) for run in runs[1:])]
    out: dict = {"runs": {}, "first_less_others": {}}
    for run, rows in zip(runs, courses):
        out["runs"][str(run)] = [
            {"round": row["round"], "flops": row["flops"], "pass@1": bootstrap_mean([row["rates"][q] for q in sorted(row["rates"])])} for row in rows
        ]
    ours = courses[0][-1]
    for run, rows in zip(runs[1:], courses[1:]):
        theirs = rows[-1]
        if set(theirs["rates"]) != set(ours["rates"]):
            raise UserError(f"{run}: other test questions than {runs[0]}")
        questions = sorted(ours["rates"])
        gain = paired_gain([theirs["rates"][q] for q in questions], [ours["rates"][q] for q in questions])
        out["first_less_others"][str(run)] = {"pass@1": gain, "flops_of_first_over_other": ours["flops"] / theirs["flops"]}
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--without", nargs="*", default=[], metavar="STAGE", help="stages that the other runs' policies do not use")
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        parser.error("two runs at least")
    return answer(lambda: compare(args.runs, args.without))


if __name__ == "__main__":
    sys.exit(main())
