"""Is the Monte Carlo PRM worth having? python -m eval.verifiers RUN [RUN ...] [--round 1]

On the test samples of a finished round, best-of-n weighted by four verifiers over the very
same samples: none (majority), the un-finetuned base, the Monte Carlo PRM of the round, and
a PRM trained in the same way on true step labels (the ceiling that label noise leaves; in
the laboratory every step can be told right or wrong). Several runs (seeds) are averaged
question by question; intervals are a bootstrap over questions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.cli import answer
from flywheel.ledger import Ledger
from flywheel.measure.stats import bootstrap_mean, paired_gain
from flywheel.models.prm import aggregate, encode, label_ids
from flywheel.recipe import load
from flywheel.records import Problem, Role, Solution, Split, StepValues
from flywheel.runs.run import Context, Stage
from flywheel.search.select import majority, weighted
from flywheel.stages.kit import answer_is_right, test_samples, text_tools
from flywheel.training import Job, PrmExample, train_prm
from flywheel.training.examples import targets

AGGREGATES = ("last", "min", "product")


def context(run: Path, round: int) -> Context:
    stage = Stage(
        "verifiers", ("prm",), ("sample", "label", "train_prm", "evaluate@-1"), train=lambda ctx: {}, test_split=True
    )
    ctx = Context(load(run / "recipe.yaml"), run, round, stage)
    ctx.dir = run / "studies" / f"verifiers_{round}"  # a study is no stage: it stays out of the rounds
    return ctx


def true_prm(ctx: Context, problems: dict[str, Problem]) -> str:
    """Train on the same solutions with true labels (right so far: 1, else 0); the adapter's path."""
    from data.chain.domain import right_so_far

    prompts, _ = text_tools(ctx)
    solutions = {s.id: s for s in ctx.read(Solution, "sample")}
    rows = list(ctx.read(StepValues, "label"))
    questions = sorted({row.question_id for row in rows})
    held = set(questions[:: max(1, round(1 / ctx.recipe.label.validation))])
    fit, check = [], []
    for row in rows:
        solution, problem = solutions[row.solution_id], problems[row.question_id]
        truth = right_so_far(problem.question.text, [step.text.strip() for step in solution.steps])
        tokens, reads = encode(prompts, problem.question, solution.steps)
        values, weights = targets(tuple(map(float, truth)), 1.0, ctx.recipe.prm.target)
        example = PrmExample(tuple(tokens), tuple(reads), values, weights, question_id=problem.id)
        (check if problem.id in held else fit).append(example)
    out = ctx.dir / "true_steps"
    ledger = Ledger("verifiers", ctx.round)
    job = Job(ctx.recipe.model, ctx.recipe.prm, out, ctx.recipe.seed, "best", Role.PRM, ledger)
    train_prm(fit, check, label_ids(prompts.tokenizer, ctx.recipe.prm.labels), job)
    return str(out / "adapter")


def study(run: Path, round: int) -> dict[str, dict[str, float]]:
    """method -> question -> 1.0 where the selected answer is right (`auc:` rows: one value, under "")."""
    from flywheel.training.scores import score_all, within_question_auc

    ctx = context(run, round)
    ctx.dir.mkdir(parents=True, exist_ok=True)
    problems = {p.id: p for p in ctx.problems(Split.TRAIN, Split.TEST)}
    prompts, _ = text_tools(ctx)
    labels = label_ids(prompts.tokenizer, ctx.recipe.prm.labels)
    solutions, grades = test_samples(ctx, round - 1)
    correct = {g.solution_id: g.correct for group in grades.values() for g in group}
    pool = {q: [s for s in group] for q, group in solutions.items()}
    distinct = {(s.question_id, s.tokens): s for group in pool.values() for s in group if s.answer is not None}
    examples = []
    for solution in distinct.values():
        tokens, reads = encode(prompts, problems[solution.question_id].question, solution.steps)
        examples.append(PrmExample(tuple(tokens), tuple(reads), (0.0,) * len(reads), question_id=solution.question_id))
    adapters = {
        "base": None,
        "monte_carlo": str(ctx.path("train_prm") / "adapter"),
        "true_steps": true_prm(ctx, problems),
    }
    k = len(next(iter(pool.values())))
    results = {
        f"majority@{k}": {
            q: answer_is_right(majority([s.answer for s in group]), group, correct) for q, group in pool.items()
        }
    }
    for name, adapter in adapters.items():
        values = score_all(ctx.recipe.model.base, adapter, examples, labels, ledger=Ledger("verifiers", round))
        for how in AGGREGATES:
            score = {key: aggregate(v, how) for key, v in zip(distinct, values)}
            results[f"{name}:{how}"] = {
                q: answer_is_right(
                    weighted([s.answer for s in group], [score.get((q, s.tokens), 0.0) for s in group]), group, correct
                )
                for q, group in pool.items()
            }
            # every sample, not every distinct one: that is what selection sees
            rows = [
                (score[q, s.tokens], correct[s.id], q)
                for q, group in pool.items()
                for s in group
                if s.answer is not None
            ]
            results[f"auc:{name}:{how}"] = {"": within_question_auc(*zip(*rows))}
    return results


def averaged(studies: Sequence[dict[str, dict[str, float]]], method: str) -> list[float]:
    """One number a question: the mean over the runs (which share their test questions)."""
    questions = sorted(set.intersection(*(set(s[method]) for s in studies)))
    return [float(np.mean([s[method][q] for s in studies])) for q in questions]


def report(studies: Sequence[dict[str, dict[str, float]]], chosen: str) -> dict:
    methods = [m for m in studies[0] if not m.startswith("auc:")]
    vote = next(m for m in methods if m.startswith("majority"))
    ours = f"monte_carlo:{chosen}"
    return {
        "runs": len(studies),
        "questions": len(averaged(studies, vote)),
        "aggregate": chosen,
        "accuracy": {m: bootstrap_mean(averaged(studies, m)) for m in methods},
        "auc_within_question": {
            m[4:]: float(np.mean([s[m][""] for s in studies])) for m in studies[0] if m.startswith("auc:")
        },
        "monte_carlo_over_majority": paired_gain(averaged(studies, vote), averaged(studies, ours)),
        "monte_carlo_over_base": {
            how: paired_gain(averaged(studies, f"base:{how}"), averaged(studies, ours)) for how in AGGREGATES
        },
        "true_steps_over_monte_carlo": paired_gain(averaged(studies, ours), averaged(studies, f"true_steps:{chosen}")),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.verifiers", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--round", type=int, default=1)
    args = parser.parse_args(argv)
    return answer(
        lambda: report([study(run, args.round) for run in args.runs], load(args.runs[0] / "recipe.yaml").prm.aggregate)
    )


if __name__ == "__main__":
    sys.exit(main())
