"""Decide by paired bootstrap on the calibration questions whether policy r replaces policy r-1.

It does if pass@1 rises (the whole 95% interval of the gain is above zero), pass@k does not fall
(its interval is not wholly below zero), and its solutions pass the checks of `flywheel.measure.health`.
The old policy's samples come from the sample stage; the new policy draws as many here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from flywheel.measure import health
from flywheel.measure.stats import paired_gain
from flywheel.records import ModelRef, Role, Solution, Split, Verdict
from flywheel.runs.run import Context
from flywheel.runs.stage import Input, Stage
from flywheel.stages.kit import Kit, kit
from flywheel.stages.shared import LAST_POLICY, ids, rate, tallies


def candidate(ctx: Context) -> ModelRef:
    return ModelRef(f"policy_{ctx.round}", ctx.recipe.model.base, str(ctx.path("distill") / "adapter"))


def items(ctx: Context) -> list[str]:
    if not ctx.figures("distill")["trained"]:
        return []
    return ids(ctx, Split.CALIBRATE)


async def work(ctx: Context, kit: Kit, questions: Sequence[str]) -> list[object]:
    count, tag = ctx.recipe.sample.calibrate, f"r{ctx.round}/after"
    return await kit.each(questions, lambda question: kit.sampled(question, count, purpose="gate", tag=tag))


def finish(ctx: Context) -> dict:
    before = ctx.model(Role.POLICY, ctx.round - 1).name
    if not ctx.figures("distill")["trained"]:
        return {"passed": False, "why": ctx.figures("distill")["why"], "policy": before}
    after = dict(tallies(ctx, "gate", ctx.round))
    questions = sorted(after)
    groups = {"before": dict(tallies(ctx, "sample", ctx.round, questions=questions)), "after": after}
    mean = {side: [rate(group[q]) for q in questions] for side, group in groups.items()}
    reached = {side: [float(group[q][Verdict.CORRECT] > 0) for q in questions] for side, group in groups.items()}
    gain = paired_gain(mean["before"], mean["after"], seed=ctx.seed("bootstrap") % 2**31)
    reach = paired_gain(reached["before"], reached["after"], seed=ctx.seed("bootstrap") % 2**31)
    k = ctx.recipe.sample.calibrate
    before_health, after_health = (
        health.health(ctx.read(Solution, stage, questions=questions)) for stage in ("sample", "gate")
    )
    faults = health.faults(after_health, before_health)
    passed = gain[1] > 0 and reach[2] >= 0 and not faults
    return {
        "passed": passed,
        "policy": f"policy_{ctx.round}" if passed else before,
        "candidate": f"policy_{ctx.round}",
        "against": before,
        "questions": len(questions),
        "pass@1": [sum(mean[s]) / len(questions) for s in ("before", "after")],
        "gain": list(gain),
        f"pass@{k}": [sum(reached[s]) / len(questions) for s in ("before", "after")],
        f"pass@{k}_gain": list(reach),
        "health": {"before": asdict(before_health), "after": asdict(after_health)},
        **({"why": "; ".join(faults)} if faults else {}),
    }


STAGE = Stage(
    name="gate",
    sections=("problems", "sample", "prompts", "engine"),
    inputs=(Input("sample"), Input("distill"), *LAST_POLICY),
    items=items,
    open=lambda ctx: kit(ctx, {Role.POLICY: candidate(ctx)}, Split.CALIBRATE),
    work=work,
    finish=finish,
)
