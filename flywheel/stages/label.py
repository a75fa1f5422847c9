"""Monte Carlo labels: the value of a step prefix is the share of rollouts that end right.

Snell et al. 2024, appendix D, after Math-Shepherd (Wang et al. 2023). A prefix that several
solutions share is rolled out once; the value after the last step is the verdict itself.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence

from flywheel.errors import UserError
from flywheel.models.engine import Sampling
from flywheel.records import Problem, Role, Solution, Split, StepValues, Verdict
from flywheel.runs.run import Context, Stage
from flywheel.stages.kit import Kit, difficulties, kit, sampled, trace


def questions(ctx: Context) -> list[str]:
    """A seeded choice of the training questions (all of them where `label.questions` is 0).

    Those whose sampled pass rate lies in `label.prefer` come first: rollouts of a question
    that is never, or always, answered right end alike after every step, and teach little.
    """
    pool = [p.id for p in ctx.problems(Split.TRAIN)]
    spec, bins = ctx.recipe.label, difficulties(ctx)
    low, high = spec.prefer
    random.Random(ctx.seed("questions")).shuffle(pool)
    pool.sort(key=lambda question: not low <= bins[question].pass_at_1 <= high)  # stable: shuffled within
    return sorted(pool[: spec.questions or len(pool)])


def chosen(ctx: Context, wanted: set[str]) -> dict[str, list[tuple[Solution, bool]]]:
    """For each question, distinct parsable solutions to label, with their verdicts.

    Where a question has right and wrong ones, both are taken: the PRM is used to tell
    them apart.
    """
    groups, verdicts = sampled(ctx)
    picked = {}
    for question in wanted:
        distinct: dict[str, tuple[Solution, bool]] = {}
        for solution in groups.get(question, []):
            verdict = verdicts[solution.id]
            if verdict in (Verdict.CORRECT, Verdict.INCORRECT):
                distinct.setdefault(trace(solution), (solution, verdict is Verdict.CORRECT))
        pool = list(distinct.values())
        random.Random(ctx.seed(question, "choice")).shuffle(pool)
        right = [item for item in pool if item[1]]
        wrong = [item for item in pool if not item[1]]
        mixed = [item for pair in zip(right, wrong) for item in pair]
        mixed += right[len(wrong) :] + wrong[len(right) :]
        picked[question] = mixed[: ctx.recipe.label.solutions]
    return picked


async def label(ctx: Context, kit: Kit, problem: Problem, solutions: list[tuple[Solution, bool]]) -> list[StepValues]:
    spec, n = ctx.recipe.sample, ctx.recipe.label.rollouts
    head = kit.prompts.solve(problem.question)
    prefixes = sorted({s.tokens[:cut] for s, _ in solutions for cut in cuts(s)})

    async def rollout(prefix: tuple[int, ...]) -> float:
        room = spec.max_tokens - len(prefix)
        if room <= 0:
            return 0.0
        sampling = Sampling(room, spec.temperature, spec.top_p, kit.reader.stop)
        done = await kit.engine().generate(head + list(prefix), sampling, purpose="rollout", n=n)
        ends = [
            kit.reader.solution(
                (*prefix, *d.tokens), d.finish, id=f"{problem.id}/rollout/{i}", question_id=problem.id, origin="rollout"
            )
            for i, d in enumerate(done)
        ]
        decided = [g.correct for g in kit.grade(ends) if g.verdict is not Verdict.UNDECIDED]
        return sum(decided) / len(decided) if decided else 0.0

    values = dict(zip(prefixes, await asyncio.gather(*map(rollout, prefixes))))
    return [
        StepValues(
            solution.id,
            problem.id,
            (*(values[solution.tokens[:cut]] for cut in cuts(solution)), float(correct)),
            (*(n for _ in cuts(solution)), 0),
        )
        for solution, correct in solutions
    ]


def cuts(solution: Solution) -> list[int]:
    """Lengths in tokens of the proper step prefixes (after step 1 .. last but one)."""
    total, out = 0, []
    for step in solution.steps[:-1]:
        total += len(step.tokens)
        out.append(total)
    return out


def work(ctx: Context, kit: Kit, questions: Sequence[str]) -> Iterator[object]:
    picked = chosen(ctx, set(questions))
    for _, labelled in kit.each(questions, lambda q: label(ctx, kit, kit.problems[q], picked[q])):
        yield from labelled


def finish(ctx: Context) -> dict:
    rows = list(ctx.read(StepValues, "label"))
    if len({row.question_id for row in rows}) < 2:
        raise UserError(
            f"label: {len(rows)} of the sampled solutions have an answer that can be read, on fewer than two questions;"
            " see prompts.answer, prompts.stop and sample.max_tokens"
        )
    values = [v for row in rows for v in row.values]
    return {
        "policy": ctx.model(Role.POLICY, ctx.round - 1).name,
        "questions": len({row.question_id for row in rows}),
        "solutions": len(rows),
        "steps": len(values),
        "mean_value": sum(values) / len(values) if values else None,
        "values_at_0": sum(v == 0 for v in values) / len(values) if values else None,
        "values_at_1": sum(v == 1 for v in values) / len(values) if values else None,
        "rollouts_a_prefix": ctx.recipe.label.rollouts,
    }


STAGE = Stage(
    name="label",
    sections=("label", "sample", "prompts", "engine"),
    inputs=("sample", "gate@-1?", "distill@-1?"),
    items=questions,
    tools=lambda ctx: kit(ctx, {Role.POLICY: ctx.model(Role.POLICY, ctx.round - 1)}, Split.TRAIN),
    work=work,
    finish=finish,
)
