"""Search r on the test questions: policy r-1 with this round's PRM, reviser and serve plan.

Beside it the same selection by the un-finetuned base as verifier, and the reviser's
pass@1 by attempt with its own attempts and, as a control, with another question's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from flywheel.measure.bins import fixed_bin, quantile_bins, quantile_edges
from flywheel.records import (
    Answered,
    Beam,
    BestOfN,
    Candidate,
    Grade,
    ModelRef,
    Outcome,
    Revise,
    Role,
    Solution,
    Split,
    StepValues,
    Strategy,
)
from flywheel.runs.run import Context, Stage
from flywheel.search.plan import Plan, name
from flywheel.search.revise import revision_prompt
from flywheel.search.run import search, select
from flywheel.search.select import majority, weighted
from flywheel.search.tools import judged
from flywheel.stages.kit import (
    Kit,
    answer_is_right,
    by_question,
    difficulties,
    ids,
    interval,
    kit,
    plan_models,
    search_tools,
    searchers,
    test_rates,
    test_samples,
)


def tools(ctx: Context):
    return kit(ctx, {**searchers(ctx), "prm:base": ModelRef("policy_0", ctx.recipe.model.base)}, Split.TEST)


def work(ctx: Context, kit: Kit, questions: Sequence[str]) -> Iterator[object]:
    spec, tools = ctx.recipe.evaluate, search_tools(kit)
    solutions, grades = test_samples(ctx, ctx.round - 1)
    plan = Plan.from_dict(ctx.figures("calibrate")["serve"])
    plan.check_models(plan_models(ctx))
    oracle = oracle_bins(ctx)
    cuts = probe_cuts(ctx)
    prm, base = kit.prm(), kit.prm("prm:base")

    async def values(question, pool: list[Solution], verifier) -> tuple[list[float], list[int]]:
        """Score of each of the pool, and what its judging was charged."""
        found = await judged(question, [Candidate(s) for s in pool], verifier)
        return [c.score for c in found], [c.score_cost for c in found]

    async def one(question: str) -> list[tuple[str, str | None, list[Solution], int]]:
        item, pool = kit.problems[question].question, solutions[question]
        k, n, answers = len(pool), spec.budget, [s.answer for s in pool]
        runs: dict[Strategy, asyncio.Future[Outcome]] = {}

        async def shared(strategy: Strategy) -> Outcome:
            if strategy not in runs:  # methods that agree on a strategy share its draws
                runs[strategy] = asyncio.ensure_future(
                    search(strategy, item, tools, tag=f"r{ctx.round}/search/{name(strategy)}")
                )
            return await runs[strategy]

        async def run(method: str, strategy: Strategy) -> tuple[str, str | None, list[Solution], int]:
            done = await shared(strategy)
            return method, done.answer, [c.solution for c in done.candidates], done.tokens

        async def probed() -> tuple[str, str | None, list[Solution], int]:
            """The probe's samples stay candidates: best-of-N draws so many fewer, another search has them beside its own."""
            first = await search(BestOfN(spec.probe), item, tools, tag=f"r{ctx.round}/probe")
            seen = sum(c.score for c in first.candidates) / spec.probe
            chosen = plan.strategy(fixed_bin(seen, cuts), n)
            match chosen:
                case BestOfN(n=whole) if whole <= spec.probe:
                    found, tokens = first.candidates[:whole], first.tokens
                case BestOfN(n=whole):
                    rest = await search(
                        replace(chosen, n=whole - spec.probe), item, tools, tag=f"r{ctx.round}/after_probe"
                    )
                    found, tokens = (*first.candidates, *rest.candidates), first.tokens + rest.tokens
                case _:
                    rest = await shared(chosen)
                    found, tokens = (*rest.candidates, *first.candidates), first.tokens + rest.tokens
            return f"compute_optimal@{n}_probe", select(chosen, found), [c.solution for c in found], tokens

        methods = [
            run(f"beam@{n}", Beam(n)),
            run(f"compute_optimal@{n}_oracle", plan.strategy(oracle[question], n)),
            probed(),
        ]
        if tools.reviser:
            length = max(n, spec.revise_attempts)
            methods.insert(1, run(f"revise@{length}", Revise(length)))
        # all at once: a step of the engine costs little more for more sequences
        (by_prm, judging), (by_base, base_judging), *searched = await asyncio.gather(
            values(item, pool, prm), values(item, pool[:n], base), *methods
        )
        scored[question] = by_prm
        if tools.reviser:
            chains[question] = searched[1][2]
        head = len(kit.prompts.solve(item))
        drawn = [head + len(s.tokens) + 1 for s in pool]  # drawn in `evaluate`: prompt, solution and its end
        return [
            (f"majority@{k}", majority(answers), pool, sum(drawn)),
            (f"majority@{n}", majority(answers[:n]), pool[:n], sum(drawn[:n])),
            (f"best_of_n_weighted@{k}", weighted(answers, by_prm), pool, sum(drawn) + sum(judging)),
            (f"best_of_n_weighted@{n}", weighted(answers[:n], by_prm[:n]), pool[:n], sum(drawn[:n]) + sum(judging[:n])),
            (
                f"best_of_n_weighted@{n}_base_verifier",
                weighted(answers[:n], by_base),
                pool[:n],
                sum(drawn[:n]) + sum(base_judging),
            ),
            *searched,
        ]

    scored: dict[str, list[float]] = {}
    chains: dict[str, list[Solution]] = {}
    for question, rows in kit.each(questions, one):
        known = {g.solution_id: g.correct for g in grades[question]}
        drawn = {s.id: s for _, _, pool, _ in rows for s in pool if s.id not in known}
        fresh = kit.grade(list(drawn.values()))
        correct = known | {g.solution_id: g.correct for g in fresh}
        for method, answer, pool, tokens in rows:
            yield Answered(question, method, bool(answer_is_right(answer, pool, correct)), tokens)
        yield StepValues(f"{question}/prm", question, tuple(scored[question]))
        chain_ids = {s.id for s in chains.get(question, [])}
        yield from chains.get(question, [])
        yield from (g for g in fresh if g.solution_id in chain_ids)
    if tools.reviser and len(questions) > 1:  # a question alone has no other
        yield from control(kit, questions, chains)


def control(kit: Kit, questions: Sequence[str], chains: dict[str, list[Solution]]) -> Iterator[object]:
    """Attempts 2.. again, with the context taken from the next question's chain: does context help?"""
    spec, tools, engine = kit.ctx.recipe.evaluate, search_tools(kit), kit.engine(Role.REVISER)

    async def one(pair: tuple[str, str]) -> list[Solution]:
        question, other = pair

        async def attempt(place: int) -> Solution:
            prompt, _ = revision_prompt(
                engine,
                kit.problems[question].question,
                chains[other][: place - 1],
                tools,
                kit.ctx.recipe.reviser.context,
            )
            (done,) = await engine.generate(prompt, tools.sampling(), purpose="control")
            id, origin = f"{question}/r{kit.ctx.round}/control/{place}", f"control:{engine.name}"
            return kit.reader.solution(
                done.tokens, done.finish, id=id, question_id=question, origin=origin, attempt=place
            )

        return list(await asyncio.gather(*map(attempt, range(2, spec.revise_attempts + 1))))

    pairs = list(zip(questions, [*questions[1:], questions[0]]))
    for _, solutions in kit.each(pairs, one):
        yield from solutions
        yield from kit.grade(solutions)


def oracle_bins(ctx: Context) -> dict[str, int]:
    """Quantile bins of the test questions by policy r-1's pass@1: the oracle grade, labelled so."""
    return quantile_bins(test_rates(ctx, ctx.round - 1), ctx.recipe.calibrate.bins)


def probe_cuts(ctx: Context) -> list[float]:
    """Where the probe's statistic, the mean PRM score of its samples, is cut into bins.

    They are the quantiles of the same statistic on the calibration questions, whose plan is used.
    """
    rows = ctx.read(StepValues, "calibrate")
    seen = [row.values[: ctx.recipe.evaluate.probe] for row in rows]
    means = [sum(values) / len(values) for values in seen]
    return quantile_edges(means or [d.pass_at_1 for d in difficulties(ctx).values()], ctx.recipe.calibrate.bins)


def finish(ctx: Context) -> dict:
    rows = list(ctx.read(Answered, "search"))
    methods = list(dict.fromkeys(row.method for row in rows))
    found: dict = {
        "models": {**{str(role): ref.name for role, ref in searchers(ctx).items()}, "plan": f"serve_{ctx.round}"}
    }
    for method in methods:
        mine = {row.question_id: row for row in rows if row.method == method}
        found[method], found[f"{method}_ci"] = interval(ctx, [float(mine[q].correct) for q in sorted(mine)])
        if any(row.tokens for row in mine.values()):
            found[f"{method}_tokens"] = sum(row.tokens for row in mine.values()) / len(mine)
    correct = {g.solution_id: g.correct for g in ctx.read(Grade, "search")}
    curves: dict[str, dict[int, list[bool]]] = {"revise": {}, "control": {}}
    pairs = {"right_to_wrong": [], "wrong_to_right": []}
    for group in by_question(ctx.read(Solution, "search")).values():
        chain = sorted((s for s in group if "/control/" not in s.id), key=lambda s: s.attempt)
        for s in group:
            curves["control" if "/control/" in s.id else "revise"].setdefault(s.attempt, []).append(correct[s.id])
        for before, after in pairwise(chain):
            pairs["right_to_wrong" if correct[before.id] else "wrong_to_right"].append(
                correct[after.id] != correct[before.id]
            )
    figures = {"search": found}
    if curves["revise"]:
        mean = {name: [sum(c[a]) / len(c[a]) for a in sorted(c)] for name, c in curves.items()}
        figures["reviser"] = {
            "model": ctx.model(Role.REVISER, ctx.round).name,
            "pass@1_by_attempt": mean["revise"][: ctx.recipe.evaluate.revise_attempts],
            "pass@1_by_attempt_ci": [
                interval(ctx, [float(x) for x in curves["revise"][a]])[1] for a in sorted(curves["revise"])
            ][: ctx.recipe.evaluate.revise_attempts],
            "control_by_attempt": mean["revise"][:1] + mean["control"],
            **{name: sum(x) / len(x) if x else None for name, x in pairs.items()},
        }
    return figures


STAGE = Stage(
    name="search",
    sections=(
        "problems",
        "engine",
        "prompts",
        "sample",
        "evaluate",
        "prm.aggregate",
        "prm.labels",
        "reviser.context",
        "calibrate",
    ),
    inputs=("train_prm", "choose_reviser", "calibrate", "evaluate@-1", "sample", "gate@-1?", "distill@-1?"),
    items=lambda ctx: ids(ctx, Split.TEST),
    tools=tools,
    work=work,
    finish=finish,
    test_split=True,
)
