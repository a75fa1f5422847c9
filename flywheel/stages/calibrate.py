"""Every strategy at every budget on each bin of the calibrate split: two plans come of it.

*serve* wants the selected answer to be right; *harvest* wants distinct verified solutions
for its tokens. Bins come from the sample stage; the trials are drawn anew, so that samples
that bin a question never score a strategy on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from flywheel.records import BestOfN, Outcome, Split, StepValues, Strategy, Verdict
from flywheel.runs.run import Context, Stage
from flywheel.search.plan import Trial, harvest_plan, left_out, serve_plan, strategies, table
from flywheel.search.run import search_all
from flywheel.stages.kit import (
    Kit,
    answer_is_right,
    difficulties,
    kit,
    plan_models,
    sampled,
    search_tools,
    searchers,
    trace,
    votes,
)


def work(ctx: Context, kit: Kit, questions: Sequence[str]) -> Iterator[object]:
    tools, bins = search_tools(kit), difficulties(ctx)
    wanted = [item for item in strategies(ctx.recipe.calibrate) if tools.can(item[1])]

    async def one(question: str) -> list[tuple[int, Strategy, Outcome]]:
        return await search_all(wanted, kit.problems[question].question, tools, tag=f"r{ctx.round}/calibrate")

    for question, outcomes in kit.each(questions, one):
        judged = [
            o.candidates
            for _, strategy, o in outcomes
            if isinstance(strategy, BestOfN) and strategy.select == "weighted"
        ]
        if judged:  # what a probe of these samples would see of the question's difficulty
            yield StepValues(f"{question}/probe", question, tuple(c.score for c in max(judged, key=len)))
        distinct = {c.solution.id: c.solution for _, _, o in outcomes for c in o.candidates}
        grades = kit.grade(list(distinct.values()))
        correct = {g.solution_id: g.verdict is Verdict.CORRECT for g in grades}
        hand, enough = in_hand(ctx, question), ctx.recipe.harvest.min_votes
        for budget, strategy, outcome in outcomes:
            solutions = [c.solution for c in outcome.candidates]
            won = votes([s for s in solutions if correct[s.id]], {s.id: s.parent for s in solutions})
            yield Trial(
                question_id=question,
                bin=bins[question].quantile_bin,
                budget=budget,
                strategy=strategy,
                correct=bool(answer_is_right(outcome.answer, solutions, correct)),
                verified=sum(hand[text] < enough <= hand[text] + count for text, count in won.items()),
                tokens=outcome.tokens,
            )


def in_hand(ctx: Context, question: str) -> Counter[str]:
    """Verified traces and their votes, of as many samples as a training question has before its harvest begins."""
    solutions, verdicts = sampled(ctx)
    first = solutions[question][: ctx.recipe.sample.per_question]
    return Counter(trace(s) for s in first if verdicts[s.id] is Verdict.CORRECT)


def finish(ctx: Context) -> dict:
    trials = list(ctx.read(Trial, "calibrate"))
    models, spec = plan_models(ctx), ctx.recipe.calibrate
    serve, two_fold = serve_plan(trials, models, spec.bins, seed=ctx.seed("folds") % 2**31)
    harvest = harvest_plan(trials, models, ctx.recipe.harvest.budget, ctx.recipe.harvest.keep, spec.bins)
    return {
        "trials": len(trials),
        "serve": serve.to_dict(),
        "harvest": harvest.to_dict(),
        "two_fold": two_fold,
        "table": table(trials),
        "left_out": left_out(spec),
    }


STAGE = Stage(
    name="calibrate",
    sections=(
        "calibrate",
        "sample",
        "harvest.budget",
        "harvest.keep",
        "harvest.min_votes",
        "prm.aggregate",
        "prm.labels",
        "prompts",
        "engine",
    ),
    inputs=("sample", "train_prm", "choose_reviser", "gate@-1?", "distill@-1?"),
    items=lambda ctx: [p.id for p in ctx.problems(Split.CALIBRATE)],
    tools=lambda ctx: kit(ctx, searchers(ctx), Split.CALIBRATE),
    work=work,
    finish=finish,
)
