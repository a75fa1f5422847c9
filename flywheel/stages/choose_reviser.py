"""Choose the reviser's checkpoint by what it is for: pass@1 of attempts 2 to 4.

The paper keeps a checkpoint somewhat past the lowest validation loss, because that loss is
measured off-policy (on the policy's attempts, not the reviser's own). Here every checkpoint
plays short revision chains on the validation questions, and the best mean pass@1 over its
attempts after the first is kept; ties go to the earlier one. A checkpoint that only copies the
incorrect attempt before it is not fit, and a round all of whose checkpoints do has no reviser.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from flywheel.measure.health import COPIES, copies
from flywheel.records import Grade, ModelRef, Revise, Role, Solution, Split
from flywheel.runs.run import Context, Stage
from flywheel.search.tools import Tools
from flywheel.stages.kit import Kit, by_question, kit


def items(ctx: Context) -> list[str]:
    """`step|question`, checkpoint by checkpoint."""
    questions = [p.id for p in ctx.problems(Split.VALIDATION)][: ctx.recipe.reviser.probe_questions]
    return [f"{c['step']}|{q}" for c in ctx.figures("train_reviser").get("checkpoints", []) for q in questions]


class Checkpoints:
    """The kit of one checkpoint at a time: another one's engine is closed before it opens."""

    def __init__(self, ctx: Context, stack: ExitStack):
        self.ctx, self.stack, self.step, self.kit = ctx, stack, None, None

    def at(self, step: int) -> Kit:
        if step != self.step:
            self.stack.close()
            path = next(c["path"] for c in self.ctx.figures("train_reviser")["checkpoints"] if c["step"] == step)
            adapter = str(self.ctx.path("train_reviser") / path)
            ref = ModelRef(f"reviser_{self.ctx.round}@{step}", self.ctx.recipe.model.base, adapter)
            self.kit = self.stack.enter_context(kit(self.ctx, {Role.REVISER: ref}, Split.VALIDATION))
            self.step = step
        return self.kit


@contextmanager
def tools(ctx: Context) -> Iterator[Checkpoints]:
    with ExitStack() as stack:
        yield Checkpoints(ctx, stack)


def work(ctx: Context, checkpoints: Checkpoints, items: Sequence[str]) -> Iterator[object]:
    pairs = [(int(step), question) for step, _, question in (item.partition("|") for item in items)]
    for step in dict.fromkeys(step for step, _ in pairs):
        yield from play(ctx, checkpoints.at(step), step, [question for s, question in pairs if s == step])


def play(ctx: Context, kit: Kit, step: int, questions: Sequence[str]) -> Iterator[object]:
    """Short revision chains of one checkpoint, graded."""
    spec = ctx.recipe.reviser
    strategy = Revise(length=spec.probe_attempts, select="majority", context=spec.context)
    tools = Tools(None, None, kit.engine(Role.REVISER), kit.prompts, kit.reader, ctx.recipe.sample)
    yield from kit.searched(questions, tools, lambda question: strategy, f"r{ctx.round}/step{step}")


def finish(ctx: Context) -> dict:
    grades = {g.solution_id: g.correct for g in ctx.read(Grade, "choose_reviser")}
    chains = by_question(ctx.read(Solution, "choose_reviser"))
    tried = []
    for checkpoint in ctx.figures("train_reviser").get("checkpoints", []):
        mine = [s for group in chains.values() for s in group if f"/step{checkpoint['step']}/" in s.id]
        curve = [
            sum(rights) / len(rights)
            for attempt in range(1, ctx.recipe.reviser.probe_attempts + 1)
            if (rights := [grades[s.id] for s in mine if s.attempt == attempt])
        ]
        later = curve[1:] or curve
        played = [
            sorted((s for s in mine if s.question_id == q), key=lambda s: s.attempt)
            for q in dict.fromkeys(s.question_id for s in mine)
        ]
        copied = copies([(s, grades[s.id]) for s in chain] for chain in played)
        tried.append({**checkpoint, "pass@1_by_attempt": curve, "score": sum(later) / len(later), "copies": copied})
    if not tried:
        return {"chosen": None, "checkpoints": []}
    fit = [c for c in tried if c["copies"] <= COPIES]
    if not fit:
        least = min(c["copies"] for c in tried)
        return {
            "chosen": None,
            "checkpoints": tried,
            "why": f"every checkpoint copies: {least:.0%} or more of attempts after an incorrect one are that one again",
        }
    best = max(fit, key=lambda c: (c["score"], -c["step"]))
    shutil.copytree(ctx.path("train_reviser") / best["path"], ctx.dir / "adapter", dirs_exist_ok=True)
    return {"model": f"reviser_{ctx.round}", "chosen": best, "checkpoints": tried, "questions": len(chains)}


STAGE = Stage(
    name="choose_reviser",
    sections=("reviser", "sample", "prompts", "engine"),
    inputs=("train_reviser",),
    items=items,
    tools=tools,
    work=work,
    finish=finish,
)
