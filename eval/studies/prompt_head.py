"""The cheapest grade of difficulty: an adapter that says a question's bin in one token, one prefill when it serves.

Trained on the quantile bins that the round's own samples gave to its training and calibration questions. The adapter
is left in RUN/studies/round_R/prompt_head/; `python -m eval study` uses it.
"""

from __future__ import annotations

import argparse

from eval import draws
from eval.shared import add_runs, as_stage, folder, job
from flywheel.measure.bins import quantile_bins
from flywheel.models.steps import one_token
from flywheel.records import Role, Split
from flywheel.runs.run import Run
from flywheel.stages import calibrate
from flywheel.stages.kit import prompts_and_reader
from flywheel.stages.shared import difficulties
from flywheel.training import Example, train_sft

BINS = 5
EPOCHS, EVALS = 6, 12  # not tuned; the adapter with the lowest validation loss is kept


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)


def bin_words(tokenizer) -> list[int]:
    """The token ids of the bins' names (digits, each a single token), easiest first."""
    return [one_token(tokenizer, str(b), "the bins' names") for b in range(1, BINS + 1)]


def train(run: Run, round: int) -> dict:
    """Train the adapter of one run; if that is done already, return the same figures."""
    prompts, _ = prompts_and_reader(run)
    words = bin_words(prompts.tokenizer)
    rates = {q: d.pass_at_1 for q, d in difficulties(as_stage(run, round, calibrate.STAGE)).items()}
    bins = quantile_bins(rates, BINS)
    fit, check = [], []
    for i, problem in enumerate(run.problems(Split.TRAIN, Split.CALIBRATE)):
        prompt = prompts.solve(problem.question)
        example = Example((*prompt, words[bins[problem.id] - 1]), len(prompt))
        (check if i % 10 == 0 else fit).append(example)
    spec, out = run.recipe.prm.model_copy(update={"epochs": EPOCHS, "evals": EVALS}), folder(run, round) / draws.HEAD
    report = train_sft(fit, check, job(run, out, spec, "best", Role.POLICY))
    return {"questions": len(fit), "validation_questions": len(check), "curve": report.curve}


def measure(args: argparse.Namespace) -> dict:
    return {str(run.root): train(run, args.round) for run in args.runs}
