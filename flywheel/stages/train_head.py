"""Train the difficulty head: a question's bin as the one token after its prompt.

The bins are those that the last policy's samples of this round gave the training and calibration questions, by
quantiles, so that a new policy of which all questions are easier changes them little.
"""

from __future__ import annotations

import math
import random
from collections import Counter

from flywheel.records import Role, Split
from flywheel.runs.run import Context
from flywheel.runs.stage import Input, Stage
from flywheel.search.head import bin_words
from flywheel.stages.kit import prompts_and_reader
from flywheel.stages.shared import difficulties, examples, job
from flywheel.training.stored import FOLDER, Stored


def made_examples(ctx: Context) -> Stored:
    """Each question's prompt with its quantile bin's word."""
    prompts, _ = prompts_and_reader(ctx)
    words = bin_words(prompts.tokenizer, ctx.recipe.calibrate.bins)
    problems, bins = ctx.problems(Split.TRAIN, Split.CALIBRATE), difficulties(ctx)
    rows = ((p.id, prompts.solve(p.question), (words[bins[p.id].quantile_bin - 1],)) for p in problems)
    return examples(ctx.dir / FOLDER, ctx.rank, rows, ctx.recipe.head.max_length)


def train(ctx: Context) -> dict:
    from flywheel.training import train_sft

    spec = ctx.recipe.head
    if spec is None:
        return {"trained": False, "why": "the recipe has no head"}
    made = made_examples(ctx)
    questions = made.figures["questions"]
    held = set(random.Random(ctx.seed("held out")).sample(questions, max(1, len(questions) // 10)))
    fit, check = made.split(held)
    figures = {"examples": len(fit), "validation_examples": len(check), "too_long": made.figures["too_long"]}
    if not len(fit) or not len(check):
        return {"trained": False, **figures, "why": "too few questions to train and validate a head"}
    report = train_sft(fit, check, job(ctx, spec, "best", Role.HEAD))
    loss, blind = report.best.eval_loss, unseen_loss(*([row["input_ids"][-1] for row in part] for part in (fit, check)))
    refused = {} if loss < blind else {"why": f"held-out loss {loss:.3f}, {blind:.3f} without seeing the question"}
    return {
        "trained": not refused,
        **refused,
        "model": f"head_{ctx.round}",
        **figures,
        "eval_loss": loss,
        "eval_loss_blind": blind,
        "curve": report.curve,
        "train_seconds": report.seconds,
    }


def unseen_loss(fit: list[int], check: list[int]) -> float:
    """Mean negative log-likelihood of `check` by the frequencies in `fit`: a head has to do better."""
    counts = Counter(fit)
    return -sum(math.log((counts[word] or 1) / len(fit)) for word in check) / len(check)


STAGE = Stage(
    name="train_head",
    sections=("problems", "head", "prompts", "model", "calibrate.bins", "calibrate.edges"),
    inputs=(Input("sample"),),
    train=train,
)
