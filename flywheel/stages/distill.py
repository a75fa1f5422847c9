"""SFT on the harvests of all rounds so far gives policy r.

`distill.start`: a fresh adapter on the frozen base (as STaR, ReST^EM and rStar-Math), or the last policy's adapter.
"""

from __future__ import annotations

import random

from flywheel.records import Question, Role
from flywheel.runs.run import Context
from flywheel.runs.stage import Input, Stage
from flywheel.stages.kit import prompts_and_reader
from flywheel.stages.shared import examples, harvested, job


def train(ctx: Context) -> dict:
    from flywheel.training import train_sft

    prompts, reader = prompts_and_reader(ctx)
    spec = ctx.recipe.distill
    rows = harvested(ctx, range(1, ctx.round + 1))
    if not rows:
        found = sum(ctx.figures("harvest", r)["verified"] for r in range(1, ctx.round + 1))
        why = "no verified solution in any round"
        if found:
            why = f"{found} verified solutions, none drawn often enough (harvest.min_votes, harvest.vote)"
        return {"trained": False, "examples": 0, "why": f"{why}: nothing to distill, the policy stays"}
    questions = sorted({row.question_id for row in rows})
    held = set(random.Random(ctx.seed("held out")).sample(questions, len(questions) // 20))
    targets = (
        (row.question_id, prompts.solve(Question(row.question_id, row.question)), (*row.tokens, reader.eos))
        for row in rows
    )
    fit, check, too_long = examples(targets, held, spec.max_length)
    report = train_sft(fit, check, job(ctx, spec, "last", Role.POLICY))
    return {
        "trained": True,
        "examples": len(fit),
        "validation_examples": len(check),
        "too_long": too_long,
        "questions": len(questions),
        "by_round": [sum(row.round == r for row in rows) for r in range(1, ctx.round + 1)],
        "curve": report.curve,
        "train_seconds": report.seconds,
    }


STAGE = Stage(
    name="distill", sections=("distill", "prompts", "model"), inputs=(Input("harvest", every=True),), train=train
)
