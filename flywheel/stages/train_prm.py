"""Train the process reward model on the Monte Carlo labels of this round."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flywheel.errors import UserError
from flywheel.models.prm import aggregate, encode
from flywheel.records import Grade, Problem, Role, Solution, Split, StepValues, Verdict
from flywheel.runs.run import Context, Stage
from flywheel.stages.kit import by_question, difficulties, start, text_tools

if TYPE_CHECKING:
    from flywheel.models.prompts import Prompts
    from flywheel.training import PrmExample


def held_out(ctx: Context, questions: list[str]) -> set[str]:
    """The questions whose labels validate: a seeded share of the labelled ones, at least one."""
    count = max(1, round(len(questions) * ctx.recipe.label.validation))
    return set(random.Random(ctx.seed("held out")).sample(sorted(questions), count))


def example(
    prompts: Prompts,
    problem: Problem,
    solution: Solution,
    values: tuple[float, ...],
    weights: tuple[float, ...] | None = None,
) -> PrmExample:
    from flywheel.training import PrmExample

    tokens, reads = encode(prompts, problem.question, solution.steps)
    return PrmExample(tuple(tokens), tuple(reads), values, weights, question_id=problem.id)


@dataclass
class Labelled:
    """What the round's labels say, as training examples."""

    target: str
    fit: list[PrmExample] = field(default_factory=list)
    check: list[PrmExample] = field(default_factory=list)
    silent: int = 0  # left out: of progress, a solution of a question that was never answered right
    too_long: int = 0  # left out


def labelled(ctx: Context, prompts: Prompts, problems: dict[str, Problem]) -> Labelled:
    from flywheel.training.examples import targets

    rows = list(ctx.read(StepValues, "label"))
    solutions = {s.id: s for s in ctx.read(Solution, "sample")}
    held, bins = held_out(ctx, list({row.question_id for row in rows})), difficulties(ctx)
    # where no labelled question was ever answered right there is no progress to learn from, and the values serve
    out = Labelled(ctx.recipe.prm.target if any(bins[row.question_id].pass_at_1 for row in rows) else "value")
    for row in rows:
        values, weights = targets(row.values, bins[row.question_id].pass_at_1, out.target)
        made = example(prompts, problems[row.question_id], solutions[row.solution_id], values, weights)
        if not sum(weights):
            out.silent += 1
        elif len(made.tokens) > ctx.recipe.prm.max_length:
            out.too_long += 1
        else:
            (out.check if row.question_id in held else out.fit).append(made)
    return out


def train(ctx: Context) -> dict:
    from flywheel.models.steps import one_token
    from flywheel.training import Job, train_prm
    from flywheel.training.scores import calibration, score_all, within_question_auc

    prompts, _ = text_tools(ctx)
    spec, base = ctx.recipe.prm, ctx.recipe.model.base
    labels = tuple(one_token(prompts.tokenizer, word, "prm.labels") for word in spec.labels)
    problems = {p.id: p for p in ctx.problems(Split.TRAIN)}
    found = labelled(ctx, prompts, problems)
    fit, check = found.fit, found.check
    held = held_out(ctx, list({row.question_id for row in ctx.read(StepValues, "label")}))
    if not fit or not check:
        raise UserError(
            f"train_prm: {len(fit)} labelled solutions to train on and {len(check)} to validate on ({found.silent} of questions never answered right,"
            f" {found.too_long} longer than prm.max_length {spec.max_length} left out); more label.questions, or a greater prm.max_length"
        )
    job = Job(ctx.recipe.model, spec, ctx.dir, ctx.seed("train"), "best", Role.PRM, ctx.ledger, start(ctx, spec))
    report = train_prm(fit, check, labels, job)
    if ctx.rank:
        return {}

    # All graded samples of the held-out questions, scored by the PRM and by the un-finetuned base.
    grades = {g.solution_id: g for g in ctx.read(Grade, "sample") if g.question_id in held}
    groups = by_question(s for s in ctx.read(Solution, "sample") if s.question_id in held)
    pool = [
        s for group in groups.values() for s in group if grades[s.id].verdict in (Verdict.CORRECT, Verdict.INCORRECT)
    ]
    scored = [example(prompts, problems[s.question_id], s, (0.0,) * len(s.steps)) for s in pool]
    right = [grades[s.id].correct for s in pool]
    names = [s.question_id for s in pool]
    figures = {}
    for name, adapter in (("", str(ctx.dir / "adapter")), ("_base", None)):
        values = score_all(base, adapter, scored, labels, ledger=ctx.ledger, purpose="validate")
        for how in ("last", "min", "product"):
            figures[f"auc_within_question_{how}{name}"] = within_question_auc(
                [aggregate(v, how) for v in values], right, names
            )
        figures[f"auc_within_question{name}"] = within_question_auc(
            [aggregate(v, spec.aggregate) for v in values], right, names
        )
        figures[f"calibration{name}"] = calibration(
            [aggregate(v, spec.aggregate) for v in values], [float(r) for r in right]
        )
    ours, bare = figures["auc_within_question"], figures["auc_within_question_base"]
    refused = {}
    if ours is not None and ours < 0.5:  # None, where no held-out question has both kinds of solutions, says nothing
        why = f"worse than chance: within-question AUC {ours:.2f} (the un-finetuned base {bare:.2f}); the base judges this round"
        refused = {"refused": True, "why": why}
    return {
        "model": f"prm_{ctx.round}",
        **refused,
        "labels_by": ctx.model(Role.POLICY, ctx.round - 1).name,
        "examples": len(fit),
        "validation_examples": len(check),
        "target": found.target,
        "silent": found.silent,
        "too_long": found.too_long,
        "steps": sum(len(e.reads) for e in fit),
        "auc_questions": len(set(names)),
        "train_seconds": report.seconds,
        "best": {"step": report.best.step, "epoch": report.best.epoch, "eval_loss": report.best.eval_loss},
        "curve": report.curve,
        **figures,
    }


STAGE = Stage(name="train_prm", sections=("prm", "label", "prompts", "model"), inputs=("sample", "label"), train=train)
