"""Sample the last policy on the training and calibration questions; difficulty comes from here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from flywheel.records import Grade, Role, Split
from flywheel.runs.run import Context, Stage
from flywheel.stages.kit import Kit, difficulties, ids, kit, verdict_counts

SPLITS = (Split.TRAIN, Split.CALIBRATE)


def tools(ctx: Context):
    return kit(ctx, {Role.POLICY: ctx.model(Role.POLICY, ctx.round - 1)}, *SPLITS)


def work(ctx: Context, kit: Kit, questions: Sequence[str]) -> Iterator[object]:
    spec = ctx.recipe.sample

    async def one(question: str):
        problem = kit.problems[question]
        n = spec.calibrate if problem.split is Split.CALIBRATE else spec.per_question
        return await kit.solutions(problem.question, n, purpose="sample", tag=f"r{ctx.round}")

    for _, solutions in kit.each(questions, one):
        yield from solutions
        yield from kit.grade(solutions)


def finish(ctx: Context) -> dict:
    grades = list(ctx.read(Grade, "sample"))
    bins = difficulties(ctx)
    train = {p.id for p in ctx.problems(Split.TRAIN)}
    rates = {
        split: [d.pass_at_1 for q, d in bins.items() if (q in train) == (split == "train")]
        for split in ("train", "calibrate")
    }
    fixed = Counter(d.fixed_bin for q, d in bins.items() if q in train)
    return {
        "policy": ctx.model(Role.POLICY, ctx.round - 1).name,
        "questions": len(bins),
        "solutions": len(grades),
        "verdicts": verdict_counts(grades),
        "pass@1_train": sum(rates["train"]) / max(1, len(rates["train"])),
        "pass@1_calibrate": sum(rates["calibrate"]) / max(1, len(rates["calibrate"])),
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
    inputs=("gate@-1?", "distill@-1?"),
    items=lambda ctx: ids(ctx, *SPLITS),
    tools=tools,
    work=work,
    finish=finish,
)
