"""Train the reviser on trajectories of incorrect attempts, then a correct one (Snell et al., 6.1).

The last incorrect attempt is the one with least edit distance to the correct solution, so that
the two are related; the loss is on the correct solution only.
"""

from __future__ import annotations

import random

from flywheel.measure.stats import edit_distance
from flywheel.records import Role, Solution, Split, Trajectory, Verdict
from flywheel.runs.run import Context
from flywheel.runs.stage import Input, Stage
from flywheel.stages.kit import prompts_and_reader
from flywheel.stages.shared import closed, examples, job, sampled, trace


def trajectories(ctx: Context) -> list[Trajectory]:
    """At most `reviser.trajectories` per question, from its first `reviser.samples` samples."""
    spec = ctx.recipe.reviser
    groups, verdicts = sampled(ctx)
    out = []
    for question in (p.id for p in ctx.problems(Split.TRAIN)):
        group = groups[question][: spec.samples]
        wrong = list({trace(s): s for s in group if verdicts[s.id] is Verdict.INCORRECT}.values())
        right = [s for s in group if verdicts[s.id] is Verdict.CORRECT]
        rng = random.Random(ctx.seed(question))
        rng.shuffle(right)
        for target in right[: spec.trajectories]:
            count = min(rng.randint(0, spec.context), len(wrong))
            out.append(Trajectory(question, (*history(target, wrong, count, rng), target)))
    return out


def history(target: Solution, wrong: list[Solution], count: int, rng: random.Random) -> list[Solution]:
    """`count` distinct incorrect attempts: the nearest to `target` last, the others drawn uniformly."""
    if not count:
        return []
    picked = rng.sample(wrong, count)
    nearest = min(wrong, key=lambda s: edit_distance(s.tokens, target.tokens))
    others = [s for s in picked if s.id != nearest.id][: count - 1]
    return [*others, nearest]


def train(ctx: Context) -> dict:
    from flywheel.training import train_sft

    prompts, reader = prompts_and_reader(ctx)
    spec = ctx.recipe.reviser
    problems = {p.id: p for p in ctx.problems(Split.TRAIN)}
    rows = trajectories(ctx)
    questions = sorted({row.question_id for row in rows})
    held = set(random.Random(ctx.seed("held out")).sample(questions, min(len(questions), max(1, len(questions) // 10))))
    targets = (
        (
            row.question_id,
            prompts.revise(problems[row.question_id].question, row.attempts[:-1]),
            closed(row.attempts[-1], reader.eos),
        )
        for row in rows
    )
    fit, check, too_long = examples(targets, held, spec.max_length)
    if len(fit) < spec.min_examples or not check:
        return {
            "trained": False,
            "trajectories": len(fit),
            "why": f"{len(fit)} trajectories to train on (reviser.min_examples {spec.min_examples}) and {len(check)} to"
            f" validate on, of {len(questions)} questions with a correct solution, {too_long} longer than"
            f" reviser.max_length left out: this round has no reviser",
        }
    report = train_sft(fit, check, job(ctx, spec, "all", Role.REVISER))
    lengths = [len(row.attempts) - 1 for row in rows]
    return {
        "trained": True,
        "trajectories": len(fit),
        "validation_trajectories": len(check),
        "too_long": too_long,
        "by_incorrect_attempts": [lengths.count(k) for k in range(spec.context + 1)],
        "curve": report.curve,
        "checkpoints": [
            {"step": c.step, "epoch": c.epoch, "eval_loss": c.eval_loss, "path": str(ctx.relative(c.path))}
            for c in report.checkpoints
        ],
        "train_seconds": report.seconds,
    }


STAGE = Stage(name="train_reviser", sections=("reviser", "prompts", "model"), inputs=(Input("sample"),), train=train)
