"""Does a PRM have to be trained on its own model's samples?

Snell et al., section 5.1 and appendix D, claim 12: a PRM trained on another model's samples (PRM800k's, there) is
worse, and best-of-N exploits it. Two PRMs are trained from RUN's base by RUN's recipe, on as many questions and
labelled solutions each: one on RUN's own labels of that round, one on those of --other (samples and rollouts of
another model of the same tokenizer). Both judge the same test samples of RUN.

By PRM and n: the accuracy of best-of-n, weighted and by the single best score, within-question AUC; the paired leads
of its own over the other's with 95% intervals over questions and runs; and for each the fall of the single best score
from its best n (chosen on the other half of the questions) to the last, which is what exploitation looks like.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.curves import SELECT, Scored, accuracy_at
from eval.shared import add_runs, as_stage, fit_prm, folder, step_values
from flywheel.errors import UserError
from flywheel.measure.stats import bootstrap_runs
from flywheel.models.prm import aggregate
from flywheel.models.weights import load_tokenizer
from flywheel.records import Split, Verdict
from flywheel.runs.run import Run
from flywheel.stages import train_prm
from flywheel.stages.kit import prompts_and_reader
from flywheel.stages.shared import judged
from flywheel.stages.train_prm import Labelled, Labels, example
from flywheel.training import PrmExample

DRAWS = 32
HOWS = ("weighted", "best")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--other", type=Run, required=True, metavar="RUN", help="a run of another model")


@dataclass(frozen=True)
class Judged:
    """Results of both PRMs of one run. `right`: (PRM, selection, n) -> accuracy per question; `area`: AUC by PRM."""

    right: dict[tuple[str, str, int], list[float]]
    ns: list[int]
    area: dict[str, float]
    solutions: int
    questions: int


def labels_of(run: Run, round: int) -> Labelled:
    problems = {p.id: p for p in run.problems(Split.TRAIN)}
    labels = Labels(as_stage(run, round, train_prm.STAGE), prompts_and_reader(run)[0], problems)
    made = [example for _, example in labels.examples()]
    parts = ([e for e in made if (e.question_id in labels.held) is held] for held in (False, True))
    return Labelled(labels.target, labels.held, *parts)


def alike(parts: Sequence[list[PrmExample]]) -> list[list[PrmExample]]:
    """Subsample the parts to the same number of questions, then to the same number of solutions."""
    rng = random.Random(0)
    names = [sorted({e.question_id for e in part}) for part in parts]
    kept = [set(rng.sample(group, min(map(len, names)))) for group in names]
    parts = [[e for e in part if e.question_id in group] for part, group in zip(parts, kept)]
    return [rng.sample(part, min(map(len, parts))) for part in parts]


def falls(curve: dict[int, list[float]]) -> list[float]:
    """Per question, accuracy at the best n (chosen on the other half of the questions) minus that at the largest n."""
    ns, out = sorted(curve), [0.0] * len(curve[max(curve)])
    for half in (0, 1):
        best = max(ns, key=lambda n: sum(curve[n][1 - half :: 2]))
        out[half::2] = [a - b for a, b in zip(curve[best][half::2], curve[ns[-1]][half::2])]
    return out


def check_comparable(run: Run, other: Run) -> None:
    """Raises UserError if the recipes differ, so that the study would not compare the samples alone."""
    ours, theirs = run.recipe, other.recipe
    for what, mine, there in (
        ("tokenizer", load_tokenizer(ours.model.base).get_vocab(), load_tokenizer(theirs.model.base).get_vocab()),
        ("prompts", ours.prompts, theirs.prompts),
        ("prm.target", ours.prm.target, theirs.prm.target),
        ("prm.max_length", ours.prm.max_length, theirs.prm.max_length),
    ):
        if mine != there:
            raise UserError(f"{other.root}: another {what} than {run.root}; one recipe and another model are wanted")


def judge(run: Run, other: Run, round: int) -> Judged:
    check_comparable(run, other)
    (prompts, _), how = prompts_and_reader(run), run.recipe.prm.aggregate
    own, foreign = labels_of(run, round), labels_of(other, round)
    if own.target != foreign.target:
        raise UserError(
            f"{other.root}: its labels can only serve as {foreign.target}, those of {run.root} serve as {own.target}"
        )
    fits, checks = alike([own.fit, foreign.fit]), alike([own.check, foreign.check])
    problems = {p.id: p for p in run.problems(Split.TEST)}
    graded = dict(judged(run, "evaluate", round - 1, "evaluate"))
    solutions = {q: [s for s, _ in group] for q, group in graded.items()}
    correct = {s.id: verdict is Verdict.CORRECT for group in graded.values() for s, verdict in group}
    answered = [s for group in solutions.values() for s in group if s.answer is not None]
    distinct = list({(s.question_id, s.tokens): s for s in answered}.values())
    examples = [example(prompts, problems[s.question_id], s, (0.0,) * len(s.steps)) for s in distinct]
    size = len(next(iter(solutions.values())))
    ns = [n for n in (2**i for i in range(9)) if n < size] + [size]
    right: dict[tuple[str, str, int], list[float]] = {}
    area = {}
    from flywheel.training.scores import within_question_auc

    for name, fit, check in zip(("own", "other"), fits, checks):
        adapter = fit_prm(run, folder(run, round) / f"foreign_{name}", fit, check, run.recipe.prm)
        values = step_values(run, adapter, examples)
        score = {(s.question_id, s.tokens): aggregate(v, how) for s, v in zip(distinct, values)}
        rows = [(score[s.question_id, s.tokens], correct[s.id], s.question_id) for s in answered]
        area[name] = within_question_auc(*zip(*rows))
        for q in sorted(solutions):
            pool = [Scored(s.answer, score.get((q, s.tokens), 0.0), correct[s.id]) for s in solutions[q]]
            for select in HOWS:
                for n in ns:
                    found = accuracy_at(pool, n, SELECT[select], DRAWS, random.Random(f"{q}/{n}"))
                    right.setdefault((name, select, n), []).append(found)
    return Judged(right, ns, area, len(fits[0]), len({e.question_id for e in fits[0]}))


def measure(args: argparse.Namespace) -> dict:
    found = [judge(run, args.other, args.round) for run in args.runs]
    ns, names = found[0].ns, list(found[0].area)
    right = {key: np.array([f.right[key] for f in found]) for key in found[0].right}  # runs x questions
    fallen = {name: np.array([falls({n: f.right[name, "best", n] for n in ns}) for f in found]) for name in names}
    lead = {how: {n: right["own", how, n] - right["other", how, n] for n in ns} for how in HOWS}
    more = fallen["other"] - fallen["own"]
    return {
        "questions": more.shape[1],
        "labelled_solutions": [f.solutions for f in found],
        "labelled_questions": [f.questions for f in found],
        "auc_within_question": {name: [f.area[name] for f in found] for name in names},
        "accuracy": {
            name: {how: {n: bootstrap_runs(right[name, how, n]) for n in ns} for how in HOWS} for name in names
        },
        "own_less_other": {how: {n: bootstrap_runs(lead[how][n]) for n in ns} for how in HOWS},
        "best_falls": {name: bootstrap_runs(fall) for name, fall in fallen.items()},
        "other_falls_more": bootstrap_runs(more),
        "each_run": {**{how: lead[how][ns[-1]].mean(1) for how in HOWS}, "exploited": more.mean(1)},
    }
