"""Train the process reward model on the Monte Carlo labels of this round."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flywheel.models.prm import aggregate, label_ids
from flywheel.models.prompts import Prompts
from flywheel.recipe import PrmSpec
from flywheel.records import Problem, Role, Solution, Split, StepValues, Verdict
from flywheel.runs.reading import where
from flywheel.runs.run import Context
from flywheel.runs.stage import Input, Stage
from flywheel.stages.kit import prompts_and_reader
from flywheel.stages.shared import job, judged, pass_rates
from flywheel.training import PrmExample, train_prm
from flywheel.training.examples import targets
from flywheel.training.stored import FOLDER, lengths, stored

if TYPE_CHECKING:
    from datasets import Dataset

JUDGED = 200  # held-out questions whose samples are judged, at most: enough for the AUC, and all in memory


@dataclass
class Labelled:
    """The round's labels as training and validation examples. `held`: the validation questions."""

    target: str
    held: set[str]
    fit: Sequence[PrmExample] | Dataset
    check: Sequence[PrmExample] | Dataset
    silent: int = 0  # solutions left out because all their weights are 0 (only with target `progress`)
    too_long: int = 0  # solutions left out


def held_out(ctx: Context, questions: set[str]) -> set[str]:
    """The validation questions: a seeded fraction of the labelled ones, at least one."""
    count = max(1, round(len(questions) * ctx.recipe.label.validation))
    return set(random.Random(ctx.seed("held out")).sample(sorted(questions), count))


class Labels:
    """The round's labels: their target and validation questions, and the examples that they make.

    `silent`, `too_long`: as in `Labelled`, counted while `examples` is drawn.
    """

    def __init__(self, ctx: Context, prompts: Prompts, problems: dict[str, Problem]):
        self.ctx, self.prompts, self.problems = ctx, prompts, problems
        self.rates = pass_rates(ctx, "sample", ctx.round)
        ids = ctx.written("label").tables(StepValues, ["question_id"])
        questions = {question for table in ids for question in table["question_id"].unique().to_pylist()}
        # `progress` is relative to the pass rate, so use `value` if no labelled question was ever answered right
        self.target = ctx.recipe.prm.target if any(self.rates[question] for question in questions) else "value"
        self.held = held_out(ctx, questions)
        self.silent = self.too_long = 0

    def examples(self) -> Iterator[tuple[str, PrmExample]]:
        """(question id, example) in the order of the labels; of one shard's labels the solutions are in memory."""
        spec, rollouts = self.ctx.recipe.prm, self.ctx.recipe.label.rollouts
        for questions in self.ctx.written("label").groups():
            rows = list(self.ctx.read(StepValues, "label", questions=questions))
            wanted = where("id", (row.solution_id for row in rows))
            solutions = {s.id: s for s in self.ctx.written("sample").records(Solution, questions, wanted)}
            for row in rows:
                rate, question = self.rates[row.question_id], self.problems[row.question_id]
                values, weights = targets(row.values, rate, self.target, rollouts)
                if not sum(weights):
                    self.silent += 1
                    continue
                made = example(self.prompts, question, solutions[row.solution_id], values, weights)
                if len(made.tokens) > spec.max_length:
                    self.too_long += 1
                else:
                    yield row.question_id, made


def labelled(ctx: Context, prompts: Prompts, problems: dict[str, Problem]) -> Labelled:
    """The examples, stored by rank 0 in the stage's directory."""
    labels = Labels(ctx, prompts, problems)
    made = stored(
        ctx.dir / FOLDER, ctx.rank, labels.examples(), lambda: {"silent": labels.silent, "too_long": labels.too_long}
    )
    return Labelled(labels.target, labels.held, *made.split(labels.held), **made.figures)


def missing(found: Labelled, spec: PrmSpec) -> str | None:
    """One line that says what a training lacks, if it has fewer than `prm.min_examples`, or none to validate on."""
    if len(found.fit) >= spec.min_examples and len(found.check):
        return None
    return (
        f"{len(found.fit)} labelled solutions to train on (prm.min_examples {spec.min_examples}) and"
        f" {len(found.check)} to validate on, {found.silent} of questions never answered right and {found.too_long}"
        f" longer than prm.max_length {spec.max_length} left out: the base judges this round; more label.questions or"
        " label.solutions mend it"
    )


def example(
    prompts: Prompts,
    problem: Problem,
    solution: Solution,
    values: tuple[float, ...],
    weights: tuple[float, ...] | None = None,
) -> PrmExample:
    tokens, reads = prompts.check(problem.question, solution.steps)
    return PrmExample(tuple(tokens), tuple(reads), values, weights, question_id=problem.id)


def held_samples(
    ctx: Context, prompts: Prompts, problems: dict[str, Problem], held: set[str]
) -> tuple[list[PrmExample], list[bool]]:
    """(the samples of the held-out questions, of JUDGED at most, whether each is right); every rank holds them."""
    if len(held) > JUDGED:
        held = set(random.Random(ctx.seed("judged")).sample(sorted(held), JUDGED))
    groups = judged(ctx, "sample", ctx.round, questions=held)
    decided = (Verdict.CORRECT, Verdict.INCORRECT)
    known = [pair for _, group in groups for pair in group if pair[1] in decided]
    scored = [example(prompts, problems[s.question_id], s, (0.0,) * len(s.steps)) for s, _ in known]
    return scored, [verdict is Verdict.CORRECT for _, verdict in known]


def train(ctx: Context) -> dict:
    prompts, _ = prompts_and_reader(ctx)
    spec = ctx.recipe.prm
    labels = label_ids(prompts.tokenizer, spec.labels)
    problems = {p.id: p for p in ctx.problems(Split.TRAIN)}
    found = labelled(ctx, prompts, problems)
    examples = {"examples": len(found.fit), "validation_examples": len(found.check)}
    if why := missing(found, spec):
        return {"model": "policy_0", **examples, "refused": True, "why": why}
    scored, right = held_samples(ctx, prompts, problems, found.held)
    report = train_prm(found.fit, found.check, labels, job(ctx, spec, "best", Role.PRM), scored)
    if ctx.rank:
        return {}
    figures = quality(report.held, right, [one.question_id for one in scored], spec.aggregate)
    ours, bare = figures["auc_within_question"], figures["auc_within_question_base"]
    refused = {}
    if ours is not None and ours < 0.5:  # None: no held-out question has both right and wrong solutions
        refused = {
            "refused": True,
            "why": f"worse than chance: within-question AUC {ours:.2f} (the un-finetuned base {bare:.2f})"
            f" on {figures['auc_pairs']} pairs of a right and a wrong solution; the base judges this round",
        }
    return {
        "model": f"prm_{ctx.round}",
        **refused,
        "labels_by": ctx.model(Role.POLICY, ctx.round - 1).name,
        **examples,
        "target": found.target,
        "silent": found.silent,
        "too_long": found.too_long,
        "steps": sum(lengths(found.fit, "reads")),
        "train_seconds": report.seconds,
        "best": {"step": report.best.step, "epoch": report.best.epoch, "eval_loss": report.best.eval_loss},
        "curve": report.curve,
        **figures,
    }


def quality(held: list[list[Sequence[float]]], right: list[bool], questions: list[str], chosen: str) -> dict:
    """AUC and calibration of the PRM and of the un-finetuned base on the samples of held-out questions.

    held: the step values of these samples by either; chosen: the recipe's aggregate of them.
    """
    from flywheel.training.scores import calibration, within_question_auc

    figures: dict = {"auc_questions": len(set(questions)), "auc_pairs": pairs(questions, right)}
    for name, values in zip(("", "_base"), held or [[], []], strict=True):
        for how in ("last", "min", "product"):
            scores = [aggregate(v, how) for v in values]
            figures[f"auc_within_question_{how}{name}"] = within_question_auc(scores, right, questions)
        scores = [aggregate(v, chosen) for v in values]
        figures[f"auc_within_question{name}"] = within_question_auc(scores, right, questions)
        figures[f"calibration{name}"] = calibration(scores, [float(r) for r in right])
    return figures


def pairs(questions: Sequence[str], right: Sequence[bool]) -> int:
    """The number of pairs that AUC counts: a right and a wrong solution of one question."""
    counts = Counter(zip(questions, right))
    return sum(counts[question, True] * counts[question, False] for question in set(questions))


STAGE = Stage(
    name="train_prm",
    sections=("prm", "label", "prompts", "model"),
    inputs=(Input("sample"), Input("label")),
    train=train,
)
