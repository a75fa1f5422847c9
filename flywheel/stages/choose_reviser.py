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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from flywheel.measure.health import COPIES, copies
from flywheel.models.stepping import stream
from flywheel.records import Grade, ModelRef, Role, Solution, Split
from flywheel.runs.run import Context
from flywheel.runs.stage import Input, Stage
from flywheel.search.revise import Revise
from flywheel.stages.kit import Kit, kit, runtime_adapters
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
    """Holds the kit of one checkpoint, with its adapter merged; the engine of the one before is closed first."""

    def __init__(self, ctx: Context, stack: ExitStack):
        self.ctx, self.stack, self.step, self.kit = ctx, stack, None, None

    def at(self, checkpoint: dict) -> tuple[Kit, str]:
        if checkpoint["step"] != self.step:
            self.stack.close()
            models = {Role.REVISER: model(self.ctx, checkpoint)}
            self.kit = self.stack.enter_context(kit(self.ctx, models, Split.VALIDATION))
            self.step = checkpoint["step"]
            self.kit.backend.start_run()  # as `Backend.stream` does, which this goes around
        return self.kit, Role.REVISER

    def stream(self, source: Callable, full: Callable[[], bool]) -> None:
        """One chunk at a time: the next may want another engine."""
        stream(source, lambda: True, lambda: self.kit is not None and self.kit.backend.step())


@dataclass(frozen=True)
class AllAtOnce:
    """One engine that serves the adapters of all checkpoints."""

    kit: Kit

    def at(self, checkpoint: dict) -> tuple[Kit, str]:
        return self.kit, key(checkpoint)

    def stream(self, source: Callable, full: Callable[[], bool]) -> None:
        self.kit.stream(source, full)


def key(checkpoint: dict) -> str:
    return f"{Role.REVISER}:{checkpoint['step']}"


@contextmanager
def open_kits(ctx: Context) -> Iterator[OneAtATime | AllAtOnce]:
    if runtime_adapters(ctx.recipe) or ctx.recipe.engine.kind == "server":
        with kit(ctx, {key(c): model(ctx, c) for c in checkpoints(ctx)}, Split.VALIDATION) as opened:
            yield AllAtOnce(opened)
    else:
        with ExitStack() as stack:
            yield OneAtATime(ctx, stack)


async def work(ctx: Context, kits: OneAtATime | AllAtOnce, items: Sequence[str]) -> list[object]:
    """Graded revision chains of each checkpoint."""
    spec, records = ctx.recipe.reviser, []
    strategy = Revise(length=spec.probe_attempts, select="majority", context=spec.context)
    wanted: dict[int, list[str]] = {}
    for step, _, question in (item.partition("|") for item in items):
        wanted.setdefault(int(step), []).append(question)
    for checkpoint in checkpoints(ctx):
        if questions := wanted.get(checkpoint["step"]):
            kit, reviser = kits.at(checkpoint)
            searcher = replace(kit.searcher(policy=False, prm=None, reviser=False), reviser=kit.engine(reviser))
            tag = f"r{ctx.round}/step{checkpoint['step']}"
            records += await kit.each(questions, partial(kit.searched, searcher=searcher, strategy=strategy, tag=tag))
    return records


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
