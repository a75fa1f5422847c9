"""The cheapest grade of difficulty: python -m eval.prompt_head RUN [--round 1]

Trains a LoRA adapter to say a question's bin in one token, from the quantile bins that the
round's own samples gave to its training and calibration questions: one prefill a question
when it serves. The adapter is left in RUN/studies/round_R/prompt_head/; eval.study uses it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flywheel.errors import UserError, explain
from flywheel.ledger import Ledger
from flywheel.measure.bins import quantile_bins
from flywheel.models.steps import one_token
from flywheel.recipe import load
from flywheel.records import Role, Split
from flywheel.runs.run import Context, Stage
from flywheel.stages.kit import difficulties, text_tools
from flywheel.training import Example, Job, train_sft

BINS = 5


def words(tokenizer) -> list[int]:
    """The token ids of the bins' names, easiest first: the digits, each a single token."""
    return [one_token(tokenizer, str(b), "the bins' names") for b in range(1, BINS + 1)]


def folder(run: Path, round: int) -> Path:
    return run / "studies" / f"round_{round}" / "prompt_head"


def train(run: Path, round: int) -> dict:
    """Train it (again: returns the same report)."""
    stage = Stage("prompt_head", ("prm",), ("sample",), train=lambda ctx: {})
    ctx = Context(load(run / "recipe.yaml"), run, round, stage)
    out = folder(run, round)
    prompts, _ = text_tools(ctx)
    names = words(prompts.tokenizer)
    found = quantile_bins({q: d.pass_at_1 for q, d in difficulties(ctx).items()}, BINS)
    fit, check = [], []
    for i, problem in enumerate(ctx.problems(Split.TRAIN, Split.CALIBRATE)):
        prompt = prompts.solve(problem.question)
        example = Example((*prompt, names[found[problem.question.id] - 1]), len(prompt))
        (check if i % 10 == 0 else fit).append(example)
    spec = ctx.recipe.prm.model_copy(update={"epochs": 6, "evals": 12})  # stops at the lowest validation loss
    ledger = Ledger("prompt_head", round)
    report = train_sft(fit, check, Job(ctx.recipe.model, spec, out, ctx.recipe.seed, "best", Role.POLICY, ledger))
    return {"questions": len(fit), "validation_questions": len(check), "curve": report.curve}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.prompt_head", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--round", type=int, default=1)
    args = parser.parse_args()
    try:
        figures = train(args.run, args.round)
    except UserError as error:
        print(explain(error), file=sys.stderr)
        return 1
    print(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
