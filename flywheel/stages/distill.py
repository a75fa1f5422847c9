"""SFT on the harvests of all rounds so far gives policy r.

`distill.start`: a fresh adapter on the frozen base (as STaR, ReST^EM and rStar-Math), or the last policy's adapter.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence

from flywheel.records import Question, Role
from flywheel.runs.run import Context
from flywheel.runs.stage import Input, Stage
from flywheel.stages.kit import prompts_and_reader
from flywheel.stages.shared import examples, harvested, job
from flywheel.training.stored import FOLDER, Stored


def made_examples(ctx: Context) -> Stored:
    """The harvests as examples; the number of their rows by round is the figure `by_round`."""
    (prompts, reader), spec = prompts_and_reader(ctx), ctx.recipe.distill
    rounds, kept = range(1, ctx.round + 1), Counter()

    def texts() -> Iterator[tuple[str, Sequence[int], Sequence[int]]]:
        for row in harvested(ctx, rounds):
            kept[row.round] += 1
            prompt = prompts.solve(Question(row.question_id, row.question))
            yield row.question_id, prompt, (*row.tokens, reader.eos)

    counts = lambda: {"by_round": [kept[r] for r in rounds]}  # noqa: E731
    return examples(ctx.dir / FOLDER, ctx.rank, texts(), spec.max_length, counts)


def train(ctx: Context) -> dict:
    from flywheel.training import train_sft

    spec, made = ctx.recipe.distill, made_examples(ctx)
    questions = made.figures["questions"]
    if not questions:
        found = sum(ctx.figures("harvest", r)["verified"] for r in range(1, ctx.round + 1))
        why = "no verified solution in any round"
        if found:
            why = f"{found} verified solutions, none drawn often enough (harvest.min_votes, harvest.vote)"
        return {"trained": False, "examples": 0, "why": f"{why}: nothing to distill, the policy stays"}
    held = set(random.Random(ctx.seed("held out")).sample(questions, len(questions) // 20))
    fit, check = made.split(held)
    if not len(fit):
        why = f"all {made.figures['too_long']} harvested solutions are longer than distill.max_length {spec.max_length}"
        return {"trained": False, "examples": 0, "why": f"{why}: nothing to distill, the policy stays"}
    report = train_sft(fit, check, job(ctx, spec, "last", Role.POLICY))
    return {
        "trained": True,
        "examples": len(fit),
        "validation_examples": len(check),
        "too_long": made.figures["too_long"],
        "questions": len(questions),
        "by_round": made.figures["by_round"],
        "curve": report.curve,
        "train_seconds": report.seconds,
    }


STAGE = Stage(
    name="distill", sections=("distill", "prompts", "model"), inputs=(Input("harvest", every=True),), train=train
)
