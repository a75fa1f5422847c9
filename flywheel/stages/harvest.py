"""Compute-optimal inference over the training questions; what verifies is kept for distillation.

Gold is known here, so any verified candidate counts, not only the selected one. The samples
that binned the questions are candidates too: their tokens are spent already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flywheel.problems.grading import load_function
from flywheel.records import Grade, Harvested, Solution, Split
from flywheel.runs.run import Context, Stage, write_table
from flywheel.search.plan import Plan
from flywheel.stages.kit import Kit, by_question, difficulties, kit, search_tools, searchers, trace, votes


def tools(ctx: Context):
    return kit(ctx, searchers(ctx), Split.TRAIN)


def work(ctx: Context, kit: Kit, questions: Sequence[str]) -> Iterator[object]:
    plan = Plan.from_dict(ctx.figures("calibrate")["harvest"])
    bins, tools = difficulties(ctx), search_tools(kit)
    yield from kit.searched(
        questions,
        tools,
        lambda q: plan.strategy(bins[q].quantile_bin, ctx.recipe.harvest.budget),
        f"r{ctx.round}/harvest",
    )


def finish(ctx: Context) -> dict:
    spec, bins = ctx.recipe.harvest, difficulties(ctx)
    texts = {p.id: p for p in ctx.problems(Split.TRAIN)}
    correct = {
        g.solution_id
        for stage in ("sample", "harvest")
        for g in ctx.read(Grade, stage)
        if g.correct and g.question_id in texts
    }
    candidates = {}
    groups: dict[str, list[Solution]] = {}
    parents: dict[str, str | None] = {}
    for stage in ("sample", "harvest"):
        solutions = [s for s in ctx.read(Solution, stage) if s.question_id in texts]
        candidates[stage] = len(solutions)
        parents |= {s.id: s.parent for s in solutions}
        for question, group in by_question(s for s in solutions if s.id in correct).items():
            groups.setdefault(question, []).extend(group)

    rows: list[Harvested] = []
    once = 0
    for question, group in groups.items():
        first: dict[str, Solution] = {}
        for solution in group:
            first.setdefault(trace(solution), solution)
        for text, count in votes(group, parents).most_common(spec.keep):
            if count < spec.min_votes:
                once += 1
                continue
            s = first[text]
            rows.append(
                Harvested(
                    question,
                    texts[question].question.text,
                    s.text,
                    s.answer,
                    bins[question].fixed_bin,
                    ctx.round,
                    count,
                    s.tokens,
                )
            )
    kept = balanced(rows, spec.balance)
    write_table(ctx.dir / "harvest.parquet", kept)
    figures = {
        "plan": f"harvest_{ctx.round}",
        "models": {role: ref.name for role, ref in searchers(ctx).items()},
        "candidates": sum(candidates.values()),
        "candidates_by_stage": candidates,
        "verified": len(correct),
        "too_few_votes": once,
        "kept": len(kept),
        "questions": len({r.question_id for r in kept}),
        "training_questions": len(texts),
        "by_bin": [
            {
                "bin": b,
                "training_questions": sum(d.fixed_bin == b for q, d in bins.items() if q in texts),
                "kept": sum(r.bin == b for r in kept),
                "questions": len({r.question_id for r in kept if r.bin == b}),
            }
            for b in range(1, ctx.recipe.calibrate.bins + 1)
        ],
    }
    if ctx.recipe.problems.step_checker:
        right = load_function(ctx.recipe.problems.step_checker, "problems.step_checker")
        figures["step_verified"] = sum(right(r.question, r.solution) for r in kept) / len(kept) if kept else None
    return figures


def balanced(rows: list[Harvested], limit: float) -> list[Harvested]:
    """No bin keeps more than `limit` times the mean of the non-empty bins; the most voted stay.

    Easy questions verify most, and would drown the hard ones that the round is for.
    """
    by_bin: dict[int, list[Harvested]] = {}
    for row in rows:
        by_bin.setdefault(row.bin, []).append(row)
    if not by_bin:
        return []
    most = int(limit * len(rows) / len(by_bin))
    kept = {id(r) for group in by_bin.values() for r in sorted(group, key=lambda r: (-r.votes, r.question_id))[:most]}
    return [r for r in rows if id(r) in kept]


STAGE = Stage(
    name="harvest",
    sections=("harvest", "sample", "prm.aggregate", "prompts", "engine"),
    inputs=("sample", "train_prm", "choose_reviser", "calibrate", "gate@-1?", "distill@-1?"),
    items=lambda ctx: [p.id for p in ctx.problems(Split.TRAIN)],
    tools=tools,
    work=work,
    finish=finish,
)
