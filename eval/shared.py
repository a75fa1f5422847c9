"""Shared by several studies: their folders, resumable sampling, averages over runs, verifiers."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np

from flywheel.errors import UserError
from flywheel.ledger import Ledger
from flywheel.measure.stats import bootstrap_runs
from flywheel.measure.step_errors import best_threshold, step_errors
from flywheel.models.prm import aggregate, label_ids
from flywheel.models.published import preflight as check_published
from flywheel.recipe import PrmSpec, PublishedSpec, TrainSpec, parse
from flywheel.records import Answered, Grade, ModelRef, Question, Role, Solution, Split, Step
from flywheel.runs.reading import Written
from flywheel.runs.run import Context, Run
from flywheel.runs.shards import missing
from flywheel.runs.stage import Input, Stage
from flywheel.runs.worker import fill
from flywheel.search.revise import Revise
from flywheel.search.select import weighted
from flywheel.stages.kit import PUBLISHED, Kit, kit, open_kit, prompts_and_reader, published_model
from flywheel.stages.shared import LAST_POLICY, answer_is_right, ids, search_models
from flywheel.training import Job, PrmExample, train_prm

MODELS = (Input("train_prm"), Input("choose_reviser"), *LAST_POLICY)  # the stages that make a round's search models
FORMATS = get_args(PublishedSpec.model_fields["format"].annotation)
AGGREGATES = ("last", "min", "product", "odds")


def add_runs(parser: argparse.ArgumentParser, round: bool = True, count: str = "+") -> None:
    parser.add_argument("runs", nargs=count, type=Run, metavar="RUN", help="directory of a finished run")
    if round:
        parser.add_argument("--round", type=int, default=1, metavar="R")


def add_published(parser: argparse.ArgumentParser) -> None:
    """An option for a published PRM in place of the recipe's, so that a finished run needs no other recipe."""
    said = f"a published PRM to compare, e.g. qwen=models/Qwen2.5-Math-PRM-7B; formats: {', '.join(FORMATS)}"
    parser.add_argument("--published", metavar="FORMAT=DIR", help=f"{said} (default: the recipe's prm.published)")


def with_published(run: Run, named: str | None) -> Run:
    """The run with the published PRM `named` as FORMAT=DIR in its recipe. Raises UserError, RecipeError."""
    if not named:
        return run
    format, _, model = named.partition("=")
    data = run.recipe.model_dump(mode="json")
    data["prm"]["published"] = {"model": model, "format": format}
    recipe = parse(data, "--published")
    check_published(recipe.prm.published, recipe.engine)
    return Run(run.root, recipe)


# ---- draws -------------------------------------------------------------------------------


def folder(run: Run, round: int) -> Path:
    """The folder for a round's study data and adapters, outside the round's own folder."""
    return run.root / "studies" / f"round_{round}"


def whole_test(run: Run) -> Run:
    """The same run with all test questions of the problem set, ignoring the recipe's limit."""
    limits = {split: n for split, n in run.recipe.problems.limits.items() if split != Split.TEST}
    problems = run.recipe.problems.model_copy(update={"limits": limits})
    return Run(run.root, run.recipe.model_copy(update={"problems": problems}))


def as_stage(run: Run, round: int, stage: Stage) -> Context:
    """The run as its `stage` saw it, to compute again what that stage derives from records."""
    return Context(run.recipe, run.root, round, stage)


def draw(
    run: Run,
    round: int,
    title: str,
    models: Callable[[Context], Mapping[str, ModelRef]],
    work: Callable[[Context, Kit, Sequence[str]], Awaitable[list[object]]],
    split: Split = Split.TEST,
    count: int | None = None,
    chunk: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Path:
    """Complete the shards in `folder(run, round) / title` for the first `count` questions of `split`; returns it.

    A killed study continues from its finished shards. share: (i, n) for the i-th of n processes, which makes every n-th
    chunk.
    """
    stage = Stage(
        title,
        None,
        MODELS,
        items=lambda ctx: ids(ctx, split)[:count],
        open=lambda ctx: kit(ctx, models(ctx), split),
        work=work,
        test_split=split is Split.TEST,
    )
    ctx = Context(run.recipe, run.root, round, stage)
    ctx.dir = folder(run, round) / title
    ctx.dir.mkdir(parents=True, exist_ok=True)
    ctx.draw = missing(ctx.dir, *share)
    fill(ctx, chunk)
    return ctx.dir


def chains(
    run: Run, round: int, split: Split, strategy: Revise, count: int | None = None, reviser: ModelRef | None = None
) -> tuple[list[list[Solution]], dict[str, bool]]:
    """(revision chains on a split, solution id -> whether it is right); stored on disk.

    `reviser`: used in place of the round's. `strategy` must not need a PRM. Raises UserError if there is no reviser.
    """

    def models(ctx: Context) -> dict[str, ModelRef]:
        if (ref := reviser or search_models(ctx).get(Role.REVISER)) is None:
            raise UserError(f"{run.root}: round {round} has no reviser")
        return {Role.REVISER: ref}

    async def work(ctx: Context, opened: Kit, questions: Sequence[str]) -> list[object]:
        searcher = opened.searcher(policy=False, prm=None)
        return await opened.each(questions, lambda q: opened.searched(q, searcher, strategy, f"r{round}/history"))

    title = f"chains_{split}_{strategy.length}x{strategy.chains}"
    title += (f"_first_{count}" if count else "") + (f"_{reviser.name}" if reviser else "")
    directory = draw(run, round, title, models, work, split, count)
    found: dict[str, list[Solution]] = {}
    for solution in Written(directory).records(Solution):
        found.setdefault(solution.draw, []).append(solution)
    return list(found.values()), {grade.solution_id: grade.correct for grade in Written(directory).records(Grade)}


# ---- averages ----------------------------------------------------------------------------


def over_runs(runs: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Runs x the questions that all runs have, in the order of their ids."""
    questions = sorted(set.intersection(*(set(run) for run in runs)))
    return np.array([[run[question] for question in questions] for run in runs], dtype=float)


def answers(run: Run, round: int) -> dict[str, dict[str, float]]:
    """method -> question -> 1.0 if the answer of that round's search was right, else 0.0."""
    found: dict[str, dict[str, float]] = {}
    for row in run.read(Answered, "search", round):
        found.setdefault(row.method, {})[row.question_id] = float(row.correct)
    return found


# ---- verifiers ---------------------------------------------------------------------------


@dataclass
class Verified:
    """The quality of verifiers of one run: by name, accuracy of the selection by question, and within-question AUC.

    `step_f1`: F1 of the first wrong step. `score_by_steps`: the mean score of wholly right solutions by their number of
    steps, which a fair judge does not let fall.
    """

    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    auc: dict[str, float | None] = field(default_factory=dict)
    step_f1: dict[str, float] = field(default_factory=dict)
    score_by_steps: dict[str, dict[int, float]] = field(default_factory=dict)

    def add(
        self,
        name: str,
        groups: Mapping[str, Sequence[Solution]],
        values: Mapping[str, tuple[float, ...]],
        right: Mapping[str, bool],
    ) -> None:
        """Add best-of-N weighted over `groups` (by question) with each aggregate of step `values` (by solution id)."""
        from flywheel.training.scores import within_question_auc

        for how in AGGREGATES:
            score = {id: aggregate(found, how) for id, found in values.items()}
            self.accuracy[f"{name}:{how}"] = {
                question: answer_is_right(
                    weighted([s.answer for s in group], [score.get(s.id, 0.0) for s in group]), group, right
                )
                for question, group in groups.items()
            }
            rows = [(score[s.id], right[s.id], q) for q, group in groups.items() for s in group if s.id in score]
            self.auc[f"{name}:{how}"] = within_question_auc(*zip(*rows)) if rows else None

    def add_steps(self, name: str, values: Sequence[Sequence[float]], wrong: Sequence[int | None], how: str) -> None:
        """Add F1 and scores (aggregate `how`) by length. The threshold of each half is chosen on the other one."""
        halves, scores = [list(zip(values[i::2], wrong[i::2])) for i in (0, 1)], {}
        found = [step_errors(*zip(*use), best_threshold(*zip(*fit))).f1 for fit, use in (halves, halves[::-1])]
        self.step_f1[name] = float(np.mean(found))
        for steps, truth in zip(values, wrong):
            if truth is None:
                scores.setdefault(len(steps), []).append(aggregate(steps, how))
        self.score_by_steps[name] = {count: float(np.mean(found)) for count, found in sorted(scores.items())}


def verifier_figures(runs: Sequence[Verified]) -> dict:
    """Accuracy with its 95% interval over questions and runs; the other figures by run."""
    steps = {"step_f1": [run.step_f1 for run in runs], "score_by_steps": [run.score_by_steps for run in runs]}
    accuracy = {name: bootstrap_runs(over_runs([run.accuracy[name] for run in runs])) for name in runs[0].accuracy}
    known = {name: [run.auc[name] for run in runs if run.auc[name] is not None] for name in runs[0].auc}
    auc = {k: np.mean(v) if v else None for k, v in known.items()}
    return {"accuracy": accuracy, "auc_within_question": auc, **(steps if runs[0].step_f1 else {})}


def job(run: Run, out: Path, spec: TrainSpec, keep: str, role: Role) -> Job:
    """A training job for a study, from the run's base with the run's seed; writes to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    return Job(run.recipe.model, spec, out, run.recipe.seed, keep, role, Ledger(out.name, 0))


def fit_prm(run: Run, out: Path, fit: Sequence[PrmExample], check: Sequence[PrmExample], spec: PrmSpec) -> str:
    """Train a PRM from the run's base in `out`; returns the path of its adapter."""
    labels = label_ids(prompts_and_reader(run)[0].tokenizer, run.recipe.prm.labels)
    train_prm(fit, check, labels, job(run, out, spec, "best", Role.PRM))
    return str(out / "adapter")


def step_values(run: Run, adapter: str | None, examples: Sequence[PrmExample]) -> list[tuple[float, ...]]:
    """The values in [0, 1] of the base with `adapter` at the examples' reads, in order."""
    from flywheel.training.scores import score_all  # imported late to keep --help fast

    labels = label_ids(prompts_and_reader(run)[0].tokenizer, run.recipe.prm.labels)
    return score_all(run.recipe.model.base, adapter, examples, labels)


def published_values(run: Run, texts: Sequence[tuple[Question, Sequence[Step]]]) -> list[tuple[float, ...]]:
    """The values in [0, 1] of the recipe's published PRM after each step of (question, steps), in order."""
    with open_kit(run, published_model(run), ledger=Ledger("scores", 0), seed=0) as opened:
        prm = opened.prm(PUBLISHED)
        return opened.backend.run(texts, lambda text: prm.values(*text))
