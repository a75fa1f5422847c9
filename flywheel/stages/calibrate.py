"""Try every strategy at every budget on the calibration questions, and fit the serve and the harvest plan.

*serve* maximises correct selected answers, *harvest* distinct verified solutions for its tokens.
Bins come from the sample stage, while trials use new samples: the samples that assign a question's
bin never score a strategy on that question.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from flywheel.measure.bins import quantile_edges
from flywheel.measure.stats import bootstrap_mean, paired_gain
from flywheel.models.prm import Prm
from flywheel.recipe import Recipe
from flywheel.records import Answered, Role, SampleScores, Solution, Split, Verdict
from flywheel.runs.run import Context
from flywheel.runs.stage import Input, Stage
from flywheel.search.best_of_n import BestOfN
from flywheel.search.plan import Trial, harvest_plan, serve_plan, simplest, table
from flywheel.search.run import search_all
from flywheel.search.select import weighted
from flywheel.search.strategies import left_out, strategies
from flywheel.search.strategy import Searcher, judge
from flywheel.stages.kit import PUBLISHED, Kit, kit, published_model
from flywheel.stages.shared import (
    LAST_POLICY,
    answer_is_right,
    difficulties,
    enough_votes,
    ids,
    model_names,
    sampled,
    search_models,
)


async def work(ctx: Context, kit: Kit, questions: Sequence[str]) -> list[object]:
    searcher, bins = kit.searcher(reviser=Role.REVISER in search_models(ctx)), difficulties(ctx)
    known = {q: known_right(ctx, q) for q in questions}
    rival = kit.prm(PUBLISHED) if ctx.recipe.prm.published else None
    tag = f"r{ctx.round}/calibrate"
    return await try_all(kit, searcher, {q: bins[q].quantile_bin for q in questions}, known, tag, rival)


async def try_all(
    kit: Kit,
    searcher: Searcher,
    bins: Mapping[str, int],
    known: Mapping[str, Sequence[Solution]],
    tag: str,
    rival: Prm | None = None,
) -> list[SampleScores | Trial | Answered]:
    """A Trial of each strategy of the recipe on each question of `bins` (id -> bin), and scores for the probe's edges.

    known: the right solutions that a question has before; see `Trial.verified`. rival: judges the draws of
    best-of-N weighted too; an Answered for each N.
    """
    wanted = [item for item in strategies(kit.recipe.calibrate) if searcher.can(item[1])]
    spec = kit.recipe.harvest

    async def one(question: str) -> list[SampleScores | Trial | Answered]:
        asked = kit.problems[question].question
        outcomes = await search_all(wanted, asked, searcher, tag=tag)
        drawn = [o.candidates for _, s, o in outcomes if isinstance(s, BestOfN) and s == BestOfN(s.n)]
        largest = max(drawn, key=len, default=())
        again = {c.solution.id: c for c in await judge(asked, largest, rival)} if rival else {}
        rows = [SampleScores(question, tuple(c.score for c in largest))] if largest else []  # as the probe draws
        distinct = {c.solution.id: c.solution for _, _, o in outcomes for c in o.candidates}
        correct = await kit.correct(distinct.values())
        for budget, strategy, outcome in outcomes:
            solutions = [c.solution for c in outcome.candidates]
            before = known[question]
            won = enough_votes(spec, [*before, *(s for s in solutions if correct[s.id])])
            verified = len(set(won) - set(enough_votes(spec, before)))
            right = answer_is_right(outcome.answer, solutions, correct)
            rows.append(Trial(question, bins[question], budget, strategy, right, verified, outcome.tokens))
        for candidates in drawn if rival else ():
            judged = [again[c.solution.id] for c in candidates]
            answer = weighted([c.solution.answer for c in judged], [c.score for c in judged])
            right = answer_is_right(answer, [c.solution for c in judged], correct)
            tokens = sum(c.cost + c.score_cost for c in judged)
            rows.append(Answered(question, by_rival(len(judged)), right, tokens))
        return rows

    return await kit.each(bins, one)


def by_rival(n: int) -> str:
    """The name of best-of-N weighted by the published PRM, as in the search stage."""
    return f"best_of_n_weighted@{n}_published_verifier"


def rival_figures(trials: Iterable[Trial], answered: Iterable[Answered]) -> list[dict]:
    """Best-of-N weighted by the round's PRM and by the published one, on the same draws; a row for each budget."""
    theirs = {(row.method, row.question_id): float(row.correct) for row in answered}
    pairs: dict[int, list[tuple[float, float]]] = {}
    for trial in trials:
        if trial.strategy == BestOfN(trial.budget):
            both = float(trial.correct), theirs[by_rival(trial.budget), trial.question_id]
            pairs.setdefault(trial.budget, []).append(both)
    rows = []
    for budget, found in sorted(pairs.items()):
        own, published = zip(*found)
        accuracy = {"own": bootstrap_mean(own), "published": bootstrap_mean(published)}
        rows.append({"budget": budget, **accuracy, "published_less_own": paired_gain(own, published)})
    return rows


def probe_edges(recipe: Recipe, drawn: Iterable[SampleScores]) -> list[float]:
    """Falling bin edges for a probe: quantiles of the mean PRM score of `evaluate.probe` samples.

    `calibrate.edges` if the recipe tries no best-of-N weighted, the only strategy that draws as a probe does.
    """
    probes = [row.scores[: recipe.evaluate.probe] for row in drawn]
    means = [sum(scores) / len(scores) for scores in probes]
    return quantile_edges(means, recipe.calibrate.bins) if means else list(recipe.calibrate.edges)


def known_right(ctx: Context, question: str) -> list[Solution]:
    """The right ones of the first `sample.per_question` samples: as many samples as a training question has."""
    first = sampled(ctx, question)[: ctx.recipe.sample.per_question]
    return [s for s, verdict in first if verdict is Verdict.CORRECT]


def finish(ctx: Context) -> dict:
    trials = list(ctx.read(Trial, "calibrate"))
    models, spec = model_names(search_models(ctx)), ctx.recipe.calibrate
    serve, two_fold = serve_plan(trials, models, spec.bins, seed=ctx.seed("folds") % 2**31)
    harvest = harvest_plan(trials, models, ctx.recipe.harvest.budget, ctx.recipe.harvest.keep, spec.bins)
    return {
        "trials": len(trials),
        "serve": serve.to_dict(),
        "harvest": harvest.to_dict(),
        "two_fold": two_fold,
        "probe_edges": probe_edges(ctx.recipe, ctx.read(SampleScores, "calibrate")),
        "simplest": {budget: strategy.to_dict() for budget, strategy in sorted(simplest(trials).items())},
        "table": table(trials),
        "left_out": left_out(spec),
        **({"verifiers": rival_figures(trials, ctx.read(Answered, "calibrate"))} if ctx.recipe.prm.published else {}),
    }


STAGE = Stage(
    name="calibrate",
    sections=(
        "problems",
        "calibrate",
        "evaluate.probe",
        "sample",
        "harvest.budget",
        "harvest.keep",
        "harvest.min_votes",
        "harvest.vote",
        "prm.aggregate",
        "prm.labels",
        "prm.published",
        "prompts",
        "engine",
    ),
    inputs=(Input("sample"), Input("train_prm"), Input("choose_reviser"), *LAST_POLICY),
    items=lambda ctx: ids(ctx, Split.CALIBRATE),
    open=lambda ctx: kit(ctx, {**search_models(ctx), **published_model(ctx)}, Split.CALIBRATE),
    work=work,
    finish=finish,
)
