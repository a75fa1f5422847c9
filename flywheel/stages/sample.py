"""Sample the last policy on the training and calibration questions; its pass rates define their difficulty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from flywheel.records import Role, Split
from flywheel.runs.run import Context
from flywheel.runs.stage import Stage
from flywheel.stages.kit import Kit, kit
from flywheel.stages.shared import LAST_POLICY, difficulties, ids, tallies, verdict_counts

SPLITS = (Split.TRAIN, Split.CALIBRATE)


async def work(ctx: Context, kit: Kit, questions: Sequence[str]) -> list[object]:
    spec = ctx.recipe.sample
    sizes = {Split.TRAIN: spec.per_question, Split.CALIBRATE: spec.calibrate}

    async def one(question: str) -> list[object]:
        count = sizes[kit.problems[question].split]
        return await kit.sampled(question, count, purpose="sample", tag=f"r{ctx.round}")

    return await kit.each(questions, one)


def finish(ctx: Context) -> dict:
    verdicts = verdict_counts(verdicts for _, verdicts in tallies(ctx, "sample", ctx.round))
    bins = difficulties(ctx)
    rates = {split: [bins[q].pass_at_1 for q in ids(ctx, split)] for split in SPLITS}
    fixed = Counter(bins[q].fixed_bin for q in ids(ctx, Split.TRAIN))
    return {
        "policy": ctx.model(Role.POLICY, ctx.round - 1).name,
        "questions": len(bins),
        "solutions": sum(verdicts.values()),
        "verdicts": verdicts,
        **{f"pass@1_{split}": sum(inside) / max(1, len(inside)) for split, inside in rates.items()},
        "quantile_bins": [
            {"bin": b, "questions": len(inside), "pass@1": [min(inside), max(inside)]}
            for b in range(1, ctx.recipe.calibrate.bins + 1)
            if (inside := [d.pass_at_1 for d in bins.values() if d.quantile_bin == b])
        ],
        "fixed_bins_train": [fixed[b] for b in range(1, ctx.recipe.calibrate.bins + 1)],
    }


STAGE = Stage(
    name="sample",
    sections=("problems", "model", "engine", "prompts", "sample", "calibrate.edges", "calibrate.bins"),
    inputs=LAST_POLICY,
    items=lambda ctx: ids(ctx, *SPLITS),
    open=lambda ctx: kit(ctx, {Role.POLICY: ctx.model(Role.POLICY, ctx.round - 1)}, *SPLITS),
    work=work,
    finish=finish,
)
