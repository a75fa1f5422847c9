"""Is the Monte Carlo PRM worth having? Best-of-n weighted by several verifiers over the very same test samples.

None (majority), the un-finetuned base, the round's Monte Carlo PRM, and a PRM trained in the same way on true step
labels (the ceiling that label noise leaves; in the laboratory every step can be told right or wrong); and a published
PRM, that of the recipe or of --published. Several runs
(seeds) are averaged question by question; intervals are a bootstrap over questions. Beside them the F1 of the first
wrong step, as ProcessBench counts it, and the scores of right solutions by their number of steps.
"""

from __future__ import annotations

import argparse

from eval.shared import (
    AGGREGATES,
    Verified,
    add_published,
    add_runs,
    fit_prm,
    folder,
    over_runs,
    published_values,
    step_values,
    verifier_figures,
    with_published,
)
from flywheel.measure.stats import bootstrap_runs
from flywheel.records import Solution, Split, StepValues, Verdict
from flywheel.runs.run import Run
from flywheel.search.select import majority
from flywheel.stages.kit import prompts_and_reader
from flywheel.stages.shared import answer_is_right, judged
from flywheel.stages.train_prm import example
from flywheel.training import PrmExample
from flywheel.training.examples import targets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    add_published(parser)


def true_prm(run: Run, r: int) -> str:
    """Train a PRM on the solutions that the round labelled, with true labels (1 while right, else 0); its adapter."""
    from data.chain.domain import right_so_far

    prompts, _ = prompts_and_reader(run)
    problems = {p.id: p for p in run.problems(Split.TRAIN)}
    solutions = {s.id: s for s in run.read(Solution, "sample", r)}
    rows = list(run.read(StepValues, "label", r))
    held = set(sorted({row.question_id for row in rows})[:: max(1, round(1 / run.recipe.label.validation))])
    fit, check = [], []
    for row in rows:
        solution, problem = solutions[row.solution_id], problems[row.question_id]
        truth = right_so_far(problem.question.text, [step.text.strip() for step in solution.steps])
        values, weights = targets(tuple(map(float, truth)), 1.0, run.recipe.prm.target, run.recipe.label.rollouts)
        (check if problem.id in held else fit).append(example(prompts, problem, solution, values, weights))
    return fit_prm(run, folder(run, r) / "verifier_true_steps", fit, check, run.recipe.prm)


def first_wrong(question: str, steps: list[str]) -> int | None:
    """The index of a solution's first wrong step, or None."""
    from data.chain.domain import right_so_far

    return next((i for i, right in enumerate(right_so_far(question, steps)) if not right), None)


def judge(run: Run, r: int) -> Verified:
    """The verifiers on the samples of policy r - 1."""
    prompts, _ = prompts_and_reader(run)
    problems = {p.id: p for p in run.problems(Split.TEST)}
    graded = dict(judged(run, "evaluate", r - 1, "evaluate"))
    pool = {q: [s for s, _ in group] for q, group in graded.items()}
    right = {s.id: verdict is Verdict.CORRECT for group in graded.values() for s, verdict in group}
    distinct: dict[tuple[str, tuple[int, ...]], PrmExample] = {}  # equal samples are scored once
    for solution in (s for group in pool.values() for s in group if s.answer is not None):
        key = (solution.question_id, solution.tokens)
        if key not in distinct:
            distinct[key] = example(prompts, problems[solution.question_id], solution, (0.0,) * len(solution.steps))
    steps = {(s.question_id, s.tokens): s.steps for group in pool.values() for s in group}
    asked = [(problems[key[0]].question, steps[key]) for key in distinct]
    wrong = [first_wrong(question.text, [step.text.strip() for step in made]) for question, made in asked]
    k, found = len(next(iter(pool.values()))), Verified()
    found.accuracy[f"majority@{k}"] = {
        question: answer_is_right(majority([s.answer for s in group]), group, right) for question, group in pool.items()
    }
    adapters = {"base": None, "monte_carlo": str(run.path("train_prm", r) / "adapter"), "true_steps": true_prm(run, r)}
    values = {name: step_values(run, adapter, list(distinct.values())) for name, adapter in adapters.items()}
    if run.recipe.prm.published:
        values["published"] = published_values(run, asked)
    for name, read in values.items():
        scored = dict(zip(distinct, read))
        keys = {s.id: (s.question_id, s.tokens) for group in pool.values() for s in group}
        # include duplicates, because selection sees every sample
        found.add(name, pool, {id: scored[key] for id, key in keys.items() if key in scored}, right)
        found.add_steps(name, list(scored.values()), wrong, run.recipe.prm.aggregate)
    return found


def measure(args: argparse.Namespace) -> dict:
    runs = [judge(with_published(run, args.published), args.round) for run in args.runs]
    chosen = args.runs[0].recipe.prm.aggregate
    by_name = {name: over_runs([run.accuracy[name] for run in runs]) for name in runs[0].accuracy}
    vote, ours = by_name[next(iter(by_name))], by_name[f"monte_carlo:{chosen}"]
    return {
        "runs": len(runs),
        "questions": vote.shape[1],
        "aggregate": chosen,
        **verifier_figures(runs),
        "monte_carlo_over_majority": bootstrap_runs(ours - vote),
        "monte_carlo_over_base": {how: bootstrap_runs(ours - by_name[f"base:{how}"]) for how in AGGREGATES},
        "true_steps_over_monte_carlo": bootstrap_runs(by_name[f"true_steps:{chosen}"] - ours),
    }
