"""Search on the test questions: policy r-1 with this round's PRM, reviser and serve plan.

Baselines: the greedy answer; `simplest`, the best strategy without bins or search, its maker, vote and temperature
chosen on the calibration questions as the plan is; the same selection with the un-finetuned base as verifier, and with
the recipe's published PRM; for revisions, parallel samples of the reviser itself (Snell et al., figures 6 and 8), and,
as a control for its pass@1 by attempt, revisions with another question's attempts in the prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from flywheel.ledger import metered
from flywheel.measure.bins import quantile_bins
from flywheel.models.driver import drawing
from flywheel.models.prm import Prm, together
from flywheel.records import (
    Answered,
    Candidate,
    ModelRef,
    Outcome,
    Problem,
    Role,
    SampleScores,
    Solution,
    Split,
    Verdict,
)
from flywheel.runs.run import Context
from flywheel.runs.stage import Input, Stage
from flywheel.search.adaptive import Adaptive
from flywheel.search.beam import Beam
from flywheel.search.greedy import Greedy
from flywheel.search.plan import Plan
from flywheel.search.probe import by_probe
from flywheel.search.revise import Revise, revision_prompt
from flywheel.search.run import search
from flywheel.search.select import majority, weighted
from flywheel.search.strategies import from_dict
from flywheel.search.strategy import Searcher, Strategy, judge
from flywheel.stages.kit import PUBLISHED, Kit, kit, published_model
from flywheel.stages.shared import (
    LAST_POLICY,
    answer_is_right,
    head_model,
    ids,
    interval,
    judged,
    model_names,
    search_models,
    test_rates,
)

CHANGES = ("right_to_wrong", "wrong_to_right")  # what a revision may make of the attempt before it


def generated(solution: Solution) -> int:
    """Tokens of a solution of the evaluate stage, with EOS or the stop token that ended it."""
    return max(solution.generated, len(solution.tokens) + 1)


@dataclass(frozen=True)
class Found:
    """One method's selected answer, the solutions that it selected from, and its cost in tokens."""

    answer: str | None
    solutions: Sequence[Solution]
    tokens: int


class OneQuestion:
    """All searches of one test question. Methods that use the same strategy share its outcome."""

    def __init__(self, ctx: Context, kit: Kit, searcher: Searcher, problem: Problem, plan: Plan, simplest: Strategy):
        self.spec, self.round = ctx.recipe.evaluate, ctx.round
        self.kit, self.searcher, self.question = kit, searcher, problem.question
        self.plan, self.simplest = plan, simplest
        self.running: dict[Strategy, asyncio.Task[Outcome]] = {}

    async def search(self, strategy: Strategy) -> Outcome:
        if strategy not in self.running:
            tag = f"r{self.round}/search/{strategy.name}"
            with drawing(self.question.id, nested=False):  # another question's control may ask first
                self.running[strategy] = asyncio.create_task(search(strategy, self.question, self.searcher, tag=tag))
        return await self.running[strategy]

    async def by(self, strategy: Strategy) -> Found:
        done = await self.search(strategy)
        return Found(done.answer, [c.solution for c in done.candidates], done.tokens)

    async def after_probe(self, edges: Sequence[float]) -> Found:
        """Search by the plan, with the bin that a probe guesses."""

        async def ask(strategy: Strategy, tag: str) -> Outcome:
            if tag == strategy.name:
                return await self.search(strategy)
            return await search(strategy, self.question, self.searcher, tag=f"r{self.round}/{tag}")

        done = await by_probe(self.plan, self.spec.budget, self.spec.probe, edges, ask)
        return Found(done.answer, [c.solution for c in done.candidates], done.tokens)

    async def after_head(self) -> Found:
        """Search by the plan, with the bin that the difficulty head names."""
        with metered() as spent:
            bin = await self.searcher.head.bin(self.question)
        done = await self.by(self.plan.strategy(bin, self.spec.budget))
        return replace(done, tokens=done.tokens + spent.tokens)

    async def all(
        self, pool: Sequence[Solution], greedy: Solution, oracle_bin: int, edges: Sequence[float]
    ) -> tuple[dict[str, Found], list[float]]:
        """(Found by method, PRM scores of `pool`). All methods run concurrently to fill the engines' batches.

        `pool`, `greedy`: the solutions of the evaluate stage. `edges`: bin edges for the probe's mean score.
        """
        k, n = len(pool), self.spec.budget
        length = max(n, self.spec.revise_attempts)
        methods = {
            f"simplest@{n}": self.by(self.simplest),
            f"beam@{n}": self.by(Beam(n, min(4, n))),
            f"adaptive@{n}": self.by(Adaptive(n)),
        }
        if self.searcher.reviser:
            methods[f"revise@{length}"] = self.by(self.chain_of(length))
            methods[f"revise_parallel@{n}"] = self.by(Revise(1, n))
            methods["revise_greedy@1"] = self.by(Greedy("reviser"))
        methods[f"compute_optimal@{n}_oracle"] = self.by(self.plan.strategy(oracle_bin, n))
        methods[f"compute_optimal@{n}_probe"] = self.after_probe(edges)
        if self.searcher.head:
            methods[f"compute_optimal@{n}_head"] = self.after_head()
        rivals = ["base", *(["published"] if self.kit.recipe.prm.published else [])]
        by_prm, *others = await together(
            [
                self.judged(pool, self.kit.prm()),
                *(self.judged(pool[:n], self.kit.prm(f"prm:{name}")) for name in rivals),
                *methods.values(),
            ]
        )
        by_rival, searched = dict(zip(rivals, others)), others[len(rivals) :]
        head = len(self.kit.prompts.solve(self.question, self.kit.engine().bare))
        drawn = [head + generated(s) for s in pool]
        answers, scores, costs = [s.answer for s in pool], [c.score for c in by_prm], [c.score_cost for c in by_prm]
        found = {
            "greedy@1": Found(greedy.answer, [greedy], head + generated(greedy)),
            f"majority@{k}": Found(majority(answers), pool, sum(drawn)),
            f"majority@{n}": Found(majority(answers[:n]), pool[:n], sum(drawn[:n])),
            **{
                f"best_of_n_weighted@{size}": Found(
                    weighted(answers[:size], scores[:size]), pool[:size], sum(drawn[:size]) + sum(costs[:size])
                )
                for size in (k, n)
            },
            **{
                f"best_of_n_weighted@{n}_{name}_verifier": Found(
                    weighted(answers[:n], [c.score for c in judged]),
                    pool[:n],
                    sum(drawn[:n]) + sum(c.score_cost for c in judged),
                )
                for name, judged in by_rival.items()
            },
            **dict(zip(methods, searched)),
        }
        return found, scores

    async def judged(self, pool: Sequence[Solution], verifier: Prm) -> Sequence[Candidate]:
        return await judge(self.question, [Candidate(s) for s in pool], verifier)

    def chain_of(self, length: int) -> Revise:
        """One chain, its prompts with as many attempts as the reviser was trained with."""
        return Revise(length, context=self.kit.recipe.reviser.context)

    async def chain(self) -> list[Solution]:
        """The attempts of one revision chain, in order."""
        outcome = await self.search(self.chain_of(max(self.spec.budget, self.spec.revise_attempts)))
        return [c.solution for c in outcome.candidates]

    async def parallel(self) -> list[Solution]:
        """First attempts of the reviser: what an attempt is worth that saw no other."""
        outcome = await self.search(Revise(1, self.spec.budget))
        return [replace(c.solution, purpose="parallel") for c in outcome.candidates]

    async def control(self, other: OneQuestion, context: int) -> list[Solution]:
        """Attempts 2, 3, ... with another question's attempts in the prompt: does the right context help?"""
        reviser, theirs = self.searcher.reviser, await other.chain()

        async def attempt(place: int) -> Solution:
            prompt = revision_prompt(reviser, self.question, theirs[: place - 1], self.searcher, context)
            [done] = await reviser.generate(prompt, self.searcher.sampling(), purpose="control")
            return self.kit.reader.solution(
                done.tokens,
                done.finish,
                id=f"{self.question.id}/r{self.round}/control/{place}",
                question_id=self.question.id,
                purpose="control",
                model=reviser.name,
                attempt=place,
            )

        return await together(map(attempt, range(2, self.spec.revise_attempts + 1)))


async def work(ctx: Context, kit: Kit, questions: Sequence[str]) -> list[object]:
    searcher = kit.searcher(reviser=Role.REVISER in search_models(ctx), head=bool(head_model(ctx)))
    samples, greedy = (
        dict(judged(ctx, "evaluate", ctx.round - 1, purpose, questions)) for purpose in ("evaluate", "greedy")
    )
    calibrated = ctx.figures("calibrate")
    plan = Plan.from_dict(calibrated["serve"])
    simplest = from_dict(calibrated["simplest"][str(ctx.recipe.evaluate.budget)])
    plan.check_models(model_names(search_models(ctx)))
    bins, edges = oracle_bins(ctx), calibrated["probe_edges"]
    searches = {q: OneQuestion(ctx, kit, searcher, kit.problems[q], plan, simplest) for q in questions}
    others = dict(zip(questions, [*questions[1:], questions[0]]))

    async def one(question: str) -> list[object]:
        mine, other = searches[question], searches[others[question]]
        pool, [(once, _)] = [s for s, _ in samples[question]], greedy[question]
        wanted: list = [mine.all(pool, once, bins[question], edges)]
        if searcher.reviser:
            wanted += [mine.chain(), mine.parallel()]
        if searcher.reviser and mine is not other:  # equal if the chunk holds one question
            wanted.append(mine.control(other, ctx.recipe.reviser.context))
        (answered, scores), *groups = await together(wanted)
        attempts = [s for group in groups for s in group]
        correct = {s.id: verdict is Verdict.CORRECT for s, verdict in (*samples[question], *greedy[question])}
        drawn = {s.id: s for found in answered.values() for s in found.solutions} | {s.id: s for s in attempts}
        fresh = {g.solution_id: g for g in await kit.grade(s for s in drawn.values() if s.id not in correct)}
        correct |= {id: g.correct for id, g in fresh.items()}
        rows: list[object] = []
        for method, found in answered.items():
            right = answer_is_right(found.answer, found.solutions, correct)
            rows.append(Answered(question, method, right, found.tokens))
        return [*rows, SampleScores(question, tuple(scores)), *attempts, *(fresh[s.id] for s in attempts)]

    return await kit.each(questions, one)


@lru_cache(maxsize=1)  # called for every chunk
def oracle_bins(ctx: Context) -> dict[str, int]:
    """Quantile bins of the test questions by policy r-1's pass@1, which needs gold: oracle difficulty."""
    return quantile_bins(test_rates(ctx, ctx.round - 1), ctx.recipe.calibrate.bins)


def finish(ctx: Context) -> dict:
    answered: dict[str, dict[str, tuple[float, int]]] = {}
    for row in ctx.read(Answered, "search"):
        answered.setdefault(row.method, {})[row.question_id] = float(row.correct), row.tokens
    models = {**search_models(ctx), **head_model(ctx)}
    found: dict = {"models": {**model_names(models), "plan": f"serve_{ctx.round}"}}
    if rival := published_model(ctx):
        found["models"]["published"] = rival[PUBLISHED].name
    for method, mine in answered.items():
        found[method], found[f"{method}_ci"] = interval(ctx, [mine[q][0] for q in sorted(mine)])
        found[f"{method}_tokens"] = sum(tokens for _, tokens in mine.values()) / len(mine)
    return {"search": found, **reviser_figures(ctx)}


def reviser_figures(ctx: Context) -> dict:
    """pass@1 by attempt of the revision chains and of the control; empty in a round without a reviser.

    wrong_to_right, right_to_wrong: how often a revision changes the verdict on the attempt before it. `_fresh`: how
    often an independent first attempt at the same questions would have: a reviser that only draws again is level.
    """
    curves: dict[str, dict[int, list[float]]] = {"revise": {}, "control": {}, "parallel": {}}
    changed: dict[str, list[float]] = {f"{name}{end}": [] for name in CHANGES for end in ("", "_fresh")}
    for _, pairs in judged(ctx, "search", ctx.round):
        group, correct = [s for s, _ in pairs], {s.id: verdict is Verdict.CORRECT for s, verdict in pairs}
        for s in group:
            curves[s.purpose].setdefault(s.attempt, []).append(float(correct[s.id]))
        for name, now, null in changes(group, correct):
            changed[name].append(now)
            changed[f"{name}_fresh"].append(null)
    if not curves["revise"]:
        return {}
    attempts = sorted(curves["revise"])[: ctx.recipe.evaluate.revise_attempts]
    by_attempt = [interval(ctx, curves["revise"][a]) for a in attempts]
    control = [sum(rights) / len(rights) for _, rights in sorted(curves["control"].items())]
    return {
        "reviser": {
            "model": ctx.model(Role.REVISER, ctx.round).name,
            "pass@1_by_attempt": [mean for mean, _ in by_attempt],
            "pass@1_by_attempt_ci": [ci for _, ci in by_attempt],
            "control_by_attempt": [by_attempt[0][0], *control],
            **{name: sum(x) / len(x) if x else None for name, x in changed.items()},
        }
    }


def changes(attempts: Sequence[Solution], correct: Mapping[str, bool]) -> Iterator[tuple[str, float, float]]:
    """Each revision of a question: which of CHANGES it may make, whether it does, what share of fresh attempts do."""
    fresh = [correct[s.id] for s in attempts if s.purpose == "parallel"]
    chain = sorted((s for s in attempts if s.purpose == "revise"), key=lambda s: s.attempt)
    for before, after in pairwise(chain):
        was = correct[before.id]
        yield CHANGES[not was], float(correct[after.id] != was), sum(right != was for right in fresh) / len(fresh)


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
        "prm.published",
        "reviser.context",
        "calibrate",
    ),
    inputs=(
        Input("train_prm"),
        Input("choose_reviser"),
        Input("train_head"),
        Input("calibrate"),
        Input("evaluate", back=1),
        Input("sample"),
        *LAST_POLICY,
    ),
    items=lambda ctx: ids(ctx, Split.TEST),
    open=lambda ctx: kit(
        ctx,
        {
            **search_models(ctx),
            **head_model(ctx),
            "prm:base": ModelRef("policy_0", ctx.recipe.model.base),
            **published_model(ctx),
        },
        Split.TEST,
    ),
    work=work,
    finish=finish,
    test_split=True,
)
