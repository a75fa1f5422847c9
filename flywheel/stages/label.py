"""Monte Carlo labels: the value of a step prefix is the fraction of its rollouts that are correct.

Snell et al. 2024, appendix D, after Math-Shepherd (Wang et al. 2023). A prefix that several
solutions share is rolled out once; the value after the last step is the solution's verdict.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from flywheel.errors import UserError
from flywheel.models.prm import together
from flywheel.records import Role, Solution, Split, StepValues, Verdict
from flywheel.runs.run import Context
from flywheel.runs.stage import Input, Stage
from flywheel.stages.kit import Kit, kit
from flywheel.stages.shared import LAST_POLICY, ids, pass_rates, rate, sampled, trace

Tokens = tuple[int, ...]


def questions(ctx: Context) -> list[str]:
    """A seeded choice of `label.questions` training questions (0: all).

    Questions whose pass rate lies in `label.prefer` come first: if a question is never or always
    answered right, its step values are all alike and teach little.
    """
    pool = ids(ctx, Split.TRAIN)
    spec, rates = ctx.recipe.label, pass_rates(ctx, "sample", ctx.round)
    low, high = spec.prefer
    random.Random(ctx.seed("questions")).shuffle(pool)
    pool.sort(key=lambda question: not low <= rates[question] <= high)  # stable: shuffled within
    picked = set(pool[: spec.questions or len(pool)])
    return [question for question in ids(ctx, Split.TRAIN) if question in picked]  # in the order of the shards


def chosen(ctx: Context, question: str) -> list[tuple[Solution, bool]]:
    """At most `label.solutions` distinct solutions of a question, each with whether it is right; only decided ones.

    Right and wrong solutions alternate while there are both, because the PRM has to tell them apart.
    """
    distinct: dict[str, tuple[Solution, bool]] = {}
    for solution, verdict in sampled(ctx, question):
        if verdict in (Verdict.CORRECT, Verdict.INCORRECT):
            distinct.setdefault(trace(solution), (solution, verdict is Verdict.CORRECT))
    pool = list(distinct.values())
    random.Random(ctx.seed(question, "choice")).shuffle(pool)
    right = [item for item in pool if item[1]]
    wrong = [item for item in pool if not item[1]]
    mixed = [item for pair in zip(right, wrong) for item in pair]
    mixed += right[len(wrong) :] + wrong[len(right) :]
    return mixed[: ctx.recipe.label.solutions]


def prefixes(solution: Solution) -> list[Tokens]:
    """The token prefixes that end with each step except the last."""
    out, tokens = [], ()
    for step in solution.steps[:-1]:
        tokens += step.tokens
        out.append(tokens)
    return out


async def value(ctx: Context, kit: Kit, question: str, prefix: Tokens) -> float:
    """The share of correct ones among the decided of `label.rollouts` solutions that continue `prefix`.

    0.0 if none is decided, or `prefix` uses up `sample.max_tokens`.
    """
    room = ctx.recipe.sample.max_tokens - len(prefix)
    if room <= 0:
        return 0.0
    asked, count = kit.problems[question].question, ctx.recipe.label.rollouts
    made = await kit.solutions(asked, count, purpose="rollout", tag="rollout", prefix=prefix, max_tokens=room)
    return rate(Counter(grade.verdict for grade in await kit.grade(made)))


async def work(ctx: Context, kit: Kit, questions: Sequence[str]) -> list[object]:
    """Step values of the chosen solutions."""

    async def one(question: str) -> list[object]:
        picked = chosen(ctx, question)
        wanted = list(dict.fromkeys(prefix for solution, _ in picked for prefix in prefixes(solution)))
        values = dict(zip(wanted, await together(value(ctx, kit, question, prefix) for prefix in wanted)))
        rows = []
        for solution, right in picked:
            steps = [values[prefix] for prefix in prefixes(solution)]
            rollouts = (ctx.recipe.label.rollouts,) * len(steps)
            rows.append(StepValues(solution.id, question, (*steps, float(right)), (*rollouts, 0)))
        return rows

    return await kit.each(questions, one)


def finish(ctx: Context) -> dict:
    questions, solutions, steps, total, at_0, at_1 = set(), 0, 0, 0.0, 0, 0
    for row in ctx.read(StepValues, "label"):
        questions.add(row.question_id)
        solutions, steps, total = solutions + 1, steps + len(row.values), sum(row.values, total)
        at_0, at_1 = at_0 + row.values.count(0), at_1 + row.values.count(1)
    if len(questions) < 2:
        raise UserError(
            f"label: {solutions} of the sampled solutions have an answer that can be read, on fewer than two questions;"
            " see prompts.answer, prompts.stop and sample.max_tokens"
        )
    return {
        "policy": ctx.model(Role.POLICY, ctx.round - 1).name,
        "questions": len(questions),
        "solutions": solutions,
        "steps": steps,
        "mean_value": total / steps,
        "values_at_0": at_0 / steps,
        "values_at_1": at_1 / steps,
        "rollouts_a_prefix": ctx.recipe.label.rollouts,
    }


STAGE = Stage(
    name="label",
    sections=("problems", "label", "sample", "prompts", "engine"),
    inputs=(Input("sample"), *LAST_POLICY),
    items=questions,
    open=lambda ctx: kit(ctx, {Role.POLICY: ctx.model(Role.POLICY, ctx.round - 1)}, Split.TRAIN),
    work=work,
    finish=finish,
    shares="sample",
)
