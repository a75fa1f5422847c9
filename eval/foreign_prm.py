"""Does a PRM have to be trained on its own model's samples? python -m eval.foreign_prm RUN [RUN ...] --other RUN2 [--round 1]

Snell et al., section 5.1 and appendix D, claim 12: a PRM trained on another model's samples (PRM800k's, there) is worse,
and best-of-N exploits it. Two PRMs are trained from RUN's base by RUN's recipe, on as many questions and labelled solutions each:
one on RUN's own labels of that round, one on RUN2's (samples and rollouts of another model of the same tokenizer). Both judge
the same test samples of RUN.

Prints JSON: by PRM and n the accuracy of best-of-n, weighted and by the single best score, within-question AUC; the
paired leads of its own over the other's with 95% intervals over questions and runs; and for each the fall of the single best score
from its best n (chosen on the other half of the questions) to the last, which is what exploitation looks like.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.cli import answer
from eval.curves import Scored, accuracy_at, by_argmax, by_weight
from eval.verifiers import context
from flywheel.errors import UserError
from flywheel.ledger import Ledger
from flywheel.measure.stats import bootstrap_runs
from flywheel.models.prm import aggregate, label_ids
from flywheel.models.weights import load_tokenizer
from flywheel.problems.grading import answer_key
from flywheel.records import Role, Split
from flywheel.stages.kit import test_samples, text_tools
from flywheel.stages.train_prm import Labelled, example, labelled
from flywheel.training import Job, PrmExample, train_prm

DRAWS = 32


def labels_of(run: Path, round: int) -> Labelled:
    ctx = context(run, round)
    return labelled(ctx, text_tools(ctx)[0], {p.id: p for p in ctx.problems(Split.TRAIN)})


def alike(parts: Sequence[list[PrmExample]]) -> list[list[PrmExample]]:
    """The same number of questions of each part, then of solutions, both drawn at random."""
    rng = random.Random(0)
    names = [sorted({e.question_id for e in part}) for part in parts]
    kept = [set(rng.sample(group, min(map(len, names)))) for group in names]
    parts = [[e for e in part if e.question_id in group] for part, group in zip(parts, kept)]
    return [rng.sample(part, min(map(len, parts))) for part in parts]


def falls(curve: dict[int, list[float]]) -> list[float]:
    """By question, accuracy at the best n less that at the last; the best is chosen on the other half of the questions."""
    ns, out = sorted(curve), [0.0] * len(curve[max(curve)])
    for half in (0, 1):
        best = max(ns, key=lambda n: sum(curve[n][1 - half :: 2]))
        out[half::2] = [a - b for a, b in zip(curve[best][half::2], curve[ns[-1]][half::2])]
    return out


@dataclass(frozen=True)
class Judged:
    """What both PRMs of one run are worth; `right`: (PRM, selection, n) -> accuracy of each question."""

    right: dict[tuple[str, str, int], list[float]]
    ns: list[int]
    area: dict[str, float]
    solutions: int
    questions: int


def judge(run: Path, other: Path, round: int) -> Judged:
    from flywheel.training.scores import score_all, within_question_auc

    ctx = context(run, round)
    ctx.dir.mkdir(parents=True, exist_ok=True)
    base = ctx.recipe.model.base
    their_base = context(other, round).recipe.model.base
    if load_tokenizer(base).get_vocab() != load_tokenizer(their_base).get_vocab():
        raise UserError(
            f"{other}: the tokenizer of {their_base} is not that of {base}; its samples are no texts of this model"
        )
    prompts, _ = text_tools(ctx)
    labels = label_ids(prompts.tokenizer, ctx.recipe.prm.labels)
    found = {"own": labels_of(run, round), "other": labels_of(other, round)}
    theirs = context(other, round).recipe
    for key, ours, there in (
        ("prompts", ctx.recipe.prompts, theirs.prompts),
        ("prm.target", ctx.recipe.prm.target, theirs.prm.target),
        ("prm.max_length", ctx.recipe.prm.max_length, theirs.prm.max_length),
    ):
        if ours != there:
            raise UserError(f"{other}: another {key} than {run}; what would be compared is the recipes")
    if found["own"].target != found["other"].target:
        raise UserError(
            f"{other}: its labels can only serve as {found['other'].target}, those of {run} serve as {found['own'].target}"
        )
    data = dict(zip(found, zip(alike([f.fit for f in found.values()]), alike([f.check for f in found.values()]))))
    problems = {p.id: p for p in ctx.problems(Split.TEST)}
    solutions, grades = test_samples(ctx, round - 1)
    correct = {g.solution_id: g.correct for group in grades.values() for g in group}
    distinct = list(
        {(s.question_id, s.tokens): s for group in solutions.values() for s in group if s.answer is not None}.values()
    )
    examples = [example(prompts, problems[s.question_id], s, (0.0,) * len(s.steps)) for s in distinct]
    n_all = len(next(iter(solutions.values())))
    ns = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n < n_all] + [n_all]
    right: dict[tuple[str, str, int], list[float]] = {}
    area = {}
    for name, (fit, check) in data.items():
        out = ctx.dir / f"foreign_{name}"
        ledger = Ledger("foreign", round)
        job = Job(ctx.recipe.model, ctx.recipe.prm, out, ctx.recipe.seed, "best", Role.PRM, ledger)
        train_prm(fit, check, labels, job)
        values = score_all(base, str(out / "adapter"), examples, labels, ledger=Ledger("foreign", round))
        score = {(s.question_id, s.tokens): aggregate(v, ctx.recipe.prm.aggregate) for s, v in zip(distinct, values)}
        rows = [
            (score[s.question_id, s.tokens], correct[s.id], s.question_id)
            for group in solutions.values()
            for s in group
            if s.answer is not None
        ]
        area[name] = within_question_auc(*zip(*rows))
        for q in sorted(solutions):
            pool = [
                Scored(None if s.answer is None else answer_key(s.answer), score.get((q, s.tokens), 0.0), correct[s.id])
                for s in solutions[q]
            ]
            for how, select in (("weighted", by_weight), ("best", by_argmax)):
                for n in ns:
                    right.setdefault((name, how, n), []).append(
                        accuracy_at(pool, n, select, DRAWS, random.Random(f"{q}/{n}"))
                    )
    return Judged(right, ns, area, len(data["own"][0]), len({e.question_id for e in data["own"][0]}))


def study(runs: Sequence[Path], other: Path, round: int) -> dict:
    found = [judge(run, other, round) for run in runs]
    ns, names = found[0].ns, list(found[0].area)
    right = {key: np.array([f.right[key] for f in found]) for key in found[0].right}  # runs x questions
    fallen = {name: np.array([falls({n: f.right[name, "best", n] for n in ns}) for f in found]) for name in names}
    lead = {how: {n: right["own", how, n] - right["other", how, n] for n in ns} for how in ("weighted", "best")}
    more = fallen["other"] - fallen["own"]
    return {
        "questions": more.shape[1],
        "labelled_solutions": [f.solutions for f in found],
        "labelled_questions": [f.questions for f in found],
        "auc_within_question": {name: [f.area[name] for f in found] for name in names},
        "accuracy": {
            name: {how: {n: bootstrap_runs(right[name, how, n]) for n in ns} for how in lead} for name in names
        },
        "own_less_other": {
            how: {n: bootstrap_runs(values) for n, values in by_n.items()} for how, by_n in lead.items()
        },
        "best_falls": {name: bootstrap_runs(fall) for name, fall in fallen.items()},
        "other_falls_more": bootstrap_runs(more),
        "each_run": {
            "weighted": lead["weighted"][ns[-1]].mean(1).tolist(),
            "best": lead["best"][ns[-1]].mean(1).tolist(),
            "exploited": more.mean(1).tolist(),
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.foreign_prm", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--round", type=int, default=1)
    args = parser.parse_args(argv)
    return answer(lambda: study(args.runs, args.other, args.round))


if __name__ == "__main__":
    sys.exit(main())
