"""Compute-optimal search on the training questions; verified solutions are kept for distillation.

Gold is known here, so every verified candidate counts, not only the selected one. The solutions
of the sample stage are candidates too: their tokens are already spent. The plan spends little where it sees little to
gain, so that late rounds would leave hard questions alone: `harvest.extra` gives these a number of draws.
"""

from __future__ import annotations

from collections.abc import Sequence

from flywheel.problems.grading import load_function
from flywheel.recipe import HarvestSpec
from flywheel.records import Grade, Harvested, Role, Solution, Split, Verdict
from flywheel.runs.files import write_table
from flywheel.runs.run import Context
from flywheel.runs.stage import Input, Stage
from flywheel.search.best_of_n import BestOfN
from flywheel.search.plan import Plan
from flywheel.stages.kit import Kit, kit
from flywheel.stages.shared import (
    LAST_POLICY,
    by_question,
    difficulties,
    ids,
    model_names,
    sampled,
    search_models,
    trace,
    votes,
)

SOURCES = ("sample", "harvest")  # the stages whose verified solutions are kept


async def work(ctx: Context, kit: Kit, questions: Sequence[str]) -> list[object]:
    plan = Plan.from_dict(ctx.figures("calibrate")["harvest"])
    bins, budget = difficulties(ctx), ctx.recipe.harvest.budget
    searcher, spec = kit.searcher(reviser=Role.REVISER in search_models(ctx)), ctx.recipe.harvest
    samples, verdicts = sampled(ctx)

    async def one(question: str) -> list[object]:
        strategy = plan.strategy(bins[question].quantile_bin, budget)
        made = await kit.searched(question, searcher, strategy, f"r{ctx.round}/harvest")
        correct = {record.solution_id for record in made if isinstance(record, Grade) and record.correct}
        right = [s for s in samples[question] if verdicts[s.id] is Verdict.CORRECT]
        right += [record for record in made if isinstance(record, Solution) and record.id in correct]
        if spec.extra and most_votes(spec, right) < spec.min_votes:
            made += await kit.searched(question, searcher, BestOfN(spec.extra, "majority"), f"r{ctx.round}/extra")
        return made

    return await kit.each(questions, one)


def most_votes(spec: HarvestSpec, right: Sequence[Solution]) -> int:
    """The votes of the one of a question's right solutions that has most, by `harvest.vote`."""
    return max(votes(right).values(), default=0) if spec.vote == "trace" else len({s.draw for s in right})


def finish(ctx: Context) -> dict:
    spec, bins = ctx.recipe.harvest, difficulties(ctx)
    problems = {p.id: p for p in ctx.problems(Split.TRAIN)}
    correct = {g.solution_id for stage in SOURCES for g in ctx.read(Grade, stage) if g.correct}
    solutions = {s: [x for x in ctx.read(Solution, s) if x.question_id in problems] for s in SOURCES}
    right = [s for group in solutions.values() for s in group if s.id in correct]
    rows: list[Harvested] = []
    once = 0
    for question, group in by_question(right).items():
        first: dict[str, Solution] = {}
        for solution in group:
            first.setdefault(trace(solution), solution)
        text, bin = problems[question].question.text, bins[question].fixed_bin
        drawn = len({s.draw for s in group})  # all give the right answer
        for found, count in votes(group).most_common(spec.keep):
            if (count if spec.vote == "trace" else drawn) < spec.min_votes:
                once += 1
                continue
            s = first[found]
            rows.append(Harvested(question, text, s.text, s.answer, bin, ctx.round, count, s.tokens))
    kept = balanced(rows, spec.balance)
    write_table(ctx.dir / "harvest.parquet", kept)
    figures = {
        "plan": f"harvest_{ctx.round}",
        "models": model_names(search_models(ctx)),
        "candidates": sum(map(len, solutions.values())),
        "candidates_by_stage": {stage: len(group) for stage, group in solutions.items()},
        "verified": len(right),
        "too_few_votes": once,
        "kept": len(kept),
        "questions": len({r.question_id for r in kept}),
        "training_questions": len(problems),
        "by_bin": [
            {
                "bin": b,
                "training_questions": sum(d.fixed_bin == b for q, d in bins.items() if q in problems),
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
    """Cap each bin at `limit` times the mean size of the non-empty bins, keeping the rows with most votes.

    Easy questions yield most verified solutions and would otherwise dominate the training set.
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
    sections=(
        "problems",
        "harvest",
        "sample",
        "prm.aggregate",
        "prm.labels",
        "prompts",
        "engine",
        "calibrate.bins",
        "calibrate.edges",
    ),
    inputs=(Input("sample"), Input("train_prm"), Input("choose_reviser"), Input("calibrate"), *LAST_POLICY),
    items=lambda ctx: ids(ctx, Split.TRAIN),
    open=lambda ctx: kit(ctx, search_models(ctx), Split.TRAIN),
    work=work,
    finish=finish,
)
