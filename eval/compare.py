"""Is the loop worth its parts? python -m eval.compare RUN RUN [RUN ...]

The first run against each other one, by the FLOPs spent on making the policy: every stage but
`evaluate` and `search`, which only measure. Claim 15: the others are ReST^EM (uniform sampling,
no PRM, no reviser), a single round with more samples, or a loop with a part left out.
`--without STAGE ...` leaves out what the other runs computed and their policies never used, as
ReST^EM's PRM. Prints JSON: by run and round, FLOPs so far and pass@1 on the test questions; then the
paired difference with its 95% interval over questions, at the last round of each, and for each
round of the other run the first run's last round that had cost no more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.cli import answer
from eval.seeds import context
from flywheel.errors import UserError
from flywheel.measure.stats import bootstrap_mean, paired_gain
from flywheel.runs.history import History
from flywheel.stages.kit import test_rates

MEASURING = ("evaluate", "search")


def course(run: Path, unused: Sequence[str] = ()) -> list[dict]:
    """By round: FLOPs that have gone into the policy so far, and its rates by question."""
    history = History.of(run)
    last = max(history.rounds)
    reader, out, flops = context(run, last), [], 0.0
    for r in range(last + 1):
        flops += sum(
            row["flops"] for row in history.ledger if row["round"] == r and row["stage"] not in (*MEASURING, *unused)
        )
        out.append({"round": r, "flops": flops, "rates": test_rates(reader, r)})
    return out


def compare(runs: Sequence[Path], unused: Sequence[str]) -> dict:
    courses = [course(runs[0]), *(course(run, unused) for run in runs[1:])]
    out: dict = {"runs": {}, "first_less_others": {}}
    for run, rows in zip(runs, courses):
        out["runs"][str(run)] = [
            {
                "round": row["round"],
                "flops": row["flops"],
                "pass@1": bootstrap_mean([row["rates"][q] for q in sorted(row["rates"])]),
            }
            for row in rows
        ]
    questions = sorted(courses[0][0]["rates"])

    def against(ours: dict, theirs: dict) -> dict:
        gain = paired_gain([theirs["rates"][q] for q in questions], [ours["rates"][q] for q in questions])
        return {"rounds": [ours["round"], theirs["round"]], "pass@1": gain, "flops": [ours["flops"], theirs["flops"]]}

    for run, rows in zip(runs[1:], courses[1:]):
        if sorted(rows[-1]["rates"]) != questions:
            raise UserError(f"{run}: other test questions than {runs[0]}")
        within = [
            against([mine for mine in courses[0] if mine["flops"] <= theirs["flops"]][-1], theirs)
            for theirs in rows[1:]
        ]
        out["first_less_others"][str(run)] = {
            "last_rounds": against(courses[0][-1], rows[-1]),
            "within_the_other_s_flops": within,
        }
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="STAGE", help="stages that the other runs' policies do not use"
    )
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        parser.error("two runs at least")
    return answer(lambda: compare(args.runs, args.without))


if __name__ == "__main__":
    sys.exit(main())
