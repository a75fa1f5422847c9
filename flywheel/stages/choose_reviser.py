"""Choose the reviser's checkpoint by revision chains of its own on the validation questions.

The paper keeps a checkpoint somewhat past the lowest validation loss, because that loss is off-policy (on the policy's
attempts, not the reviser's own). Here every checkpoint writes short revision chains. `reviser.choose`: by `level`, the
mean pass@1 of the attempts after the first, or by `change`, pass@1 of the last attempt less that of the first: what
revising adds (SCoRe's difference, Kumar et al. 2024, arXiv 2409.12917), which is zero for a reviser that only draws
again, however good. Ties go to the earlier step. Checkpoints that mostly copy the incorrect attempt before are
rejected; if all are, the round has no reviser.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from flywheel.measure.health import COPIES, copies
from flywheel.records import Grade, ModelRef, Role, Solution, Split
from flywheel.runs.run import Context
from flywheel.runs.stage import Input, Stage
from flywheel.search.revise import Revise
from flywheel.stages.kit import Kit, kit
from flywheel.stages.shared import by_question, ids


def items(ctx: Context) -> list[str]:
    """`step|question`, checkpoint by checkpoint."""
    questions = ids(ctx, Split.VALIDATION)[: ctx.recipe.reviser.probe_questions]
    return [f"{c['step']}|{q}" for c in checkpoints(ctx) for q in questions]


def checkpoints(ctx: Context) -> list[dict]:
    return ctx.figures("train_reviser").get("checkpoints", [])


def model(ctx: Context, checkpoint: dict) -> ModelRef:
    adapter = ctx.path("train_reviser") / checkpoint["path"]
    return ModelRef(f"reviser_{ctx.round}@{checkpoint['step']}", ctx.recipe.model.base, str(adapter))


class OneAtATime:
    """Holds the kit of one checkpoint; the engine of the previous checkpoint is closed first."""

    def __init__(self, ctx: Context, stack: ExitStack):
        self.ctx, self.stack, self.step, self.kit = ctx, stack, None, None

    def at(self, checkpoint: dict) -> Kit:
        if checkpoint["step"] != self.step:
            self.stack.close()
            models = {Role.REVISER: model(self.ctx, checkpoint)}
            self.kit = self.stack.enter_context(kit(self.ctx, models, Split.VALIDATION))
            self.step = checkpoint["step"]
        return self.kit


@contextmanager
def open_kits(ctx: Context) -> Iterator[OneAtATime]:
    with ExitStack() as stack:
        yield OneAtATime(ctx, stack)


def work(ctx: Context, kits: OneAtATime, items: Sequence[str]) -> Iterator[object]:
    """Graded revision chains of each checkpoint."""
    spec = ctx.recipe.reviser
    strategy = Revise(length=spec.probe_attempts, select="majority", context=spec.context)
    wanted: dict[int, list[str]] = {}
    for step, _, question in (item.partition("|") for item in items):
        wanted.setdefault(int(step), []).append(question)
    for checkpoint in checkpoints(ctx):
        if questions := wanted.get(checkpoint["step"]):
            kit = kits.at(checkpoint)
            searcher = kit.searcher(policy=False, prm=None)
            tag = f"r{ctx.round}/step{checkpoint['step']}"
            yield from kit.search_all(questions, searcher, lambda question: strategy, tag)


def finish(ctx: Context) -> dict:
    correct = {g.solution_id: g.correct for g in ctx.read(Grade, "choose_reviser")}
    solutions = list(ctx.read(Solution, "choose_reviser"))
    tried = []
    for checkpoint in checkpoints(ctx):
        name = model(ctx, checkpoint).name
        chains = by_question(s for s in solutions if s.model == name).values()
        chains = [sorted(chain, key=lambda s: s.attempt) for chain in chains]
        by_attempt: dict[int, list[bool]] = {}
        for s in (s for chain in chains for s in chain):
            by_attempt.setdefault(s.attempt, []).append(correct[s.id])
        curve = [sum(rights) / len(rights) for _, rights in sorted(by_attempt.items())]
        later = curve[1:] or curve
        scores = {"level": sum(later) / len(later), "change": curve[-1] - curve[0]}
        judged = [[(s, correct[s.id]) for s in chain] for chain in chains]
        tried.append(
            {
                **checkpoint,
                "pass@1_by_attempt": curve,
                **scores,
                "score": scores[ctx.recipe.reviser.choose],
                "copies": copies(judged),
            }
        )
    if not tried:
        return {"chosen": None, "checkpoints": []}
    fit = [c for c in tried if c["copies"] <= COPIES]
    if not fit:
        least = min(c["copies"] for c in tried)
        return {
            "chosen": None,
            "checkpoints": tried,
            "why": f"every checkpoint copies: {least:.0%} or more of attempts after an incorrect one repeat it",
        }
    best = max(fit, key=lambda c: (c["score"], -c["step"]))
    shutil.copytree(ctx.path("train_reviser") / best["path"], ctx.dir / "adapter", dirs_exist_ok=True)
    return {
        "model": f"reviser_{ctx.round}",
        "chosen": best,
        "checkpoints": tried,
        "questions": len(by_question(solutions)),
    }


STAGE = Stage(
    name="choose_reviser",
    sections=("problems", "reviser", "sample", "prompts", "engine"),
    inputs=(Input("train_reviser"),),
    items=items,
    open=open_kits,
    work=work,
    finish=finish,
)
