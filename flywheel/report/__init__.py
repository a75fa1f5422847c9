"""Reports on a run: tables, pictures, W&B. `flywheel.iterate` uses these three functions."""

from __future__ import annotations

from flywheel.report.summary import summary, untested
from flywheel.report.tables import print_round, print_untested
from flywheel.runs.run import Run

__all__ = ["after_round", "print_round", "summary"]


def after_round(run: Run, round: int) -> None:
    """Print the round's tables, draw the pictures, update W&B. Rank 0 calls it in a separate process.

    Of a round without its test (`--no-test`), print what it shows on calibration questions.
    """
    from flywheel.report import pictures, wandb

    if round not in run.rounds:
        return print_untested(untested(run, round))
    print_round(summary(run), round)
    pictures.draw(run)
    print(f"pictures: {run.root / 'pictures'}", flush=True)
    if line := wandb.update(run):
        print(line, flush=True)
