"""Train the reviser on trajectories of incorrect attempts, then a correct one (Snell et al., 6.1).

The last incorrect attempt is the one with least edit distance to the correct solution, so that
the two are related; the loss is on the correct solution only.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rapidfuzz.distance import Levenshtein

from flywheel.records import Role, Solution, Split, Trajectory, Verdict
from flywheel.runs.run import Context
from flywheel.runs.stage import Input, Stage
from flywheel.stages.kit import prompts_and_reader
from flywheel.stages.shared import closed, examples, ids, job, judged, trace
from flywheel.training.stored import FOLDER, Stored


def trajectories(ctx: Context) -> Iterator[Trajectory]:
    """At most `reviser.trajectories` per question, from its first `reviser.samples` samples."""
    spec = ctx.recipe.reviser
    for question, group in judged(ctx, "sample", ctx.round, questions=ids(ctx, Split.TRAIN)):
        group = group[: spec.samples]
        wrong = list({trace(s): s for s, verdict in group if verdict is Verdict.INCORRECT}.values())
        right = [s for s, verdict in group if verdict is Verdict.CORRECT]
        rng = random.Random(ctx.seed(question))
        rng.shuffle(right)
        for target in right[: spec.trajectories]:
            count = min(rng.randint(0, spec.context), len(wrong))
            yield Trajectory(question, (*history(target, wrong, count, rng), target))


def history(target: Solution, wrong: list[Solution], count: int, rng: random.Random) -> list[Solution]:
    """`count` distinct incorrect attempts: the nearest to `target` last, the others drawn uniformly."""
    if not count:
        return []
    picked = rng.sample(wrong, count)
    nearest = min(wrong, key=lambda s: Levenshtein.distance(s.tokens, target.tokens))
    others = [s for s in picked if s.id != nearest.id][: count - 1]
    return [*others, nearest]


def made_examples(ctx: Context) -> Stored:
    """The trajectories as examples; their number by incorrect attempts is the figure `by_incorrect_attempts`."""
    (prompts, reader), spec = prompts_and_reader(ctx), ctx.recipe.reviser
    problems = {p.id: p.question for p in ctx.problems(Split.TRAIN)}
    incorrect: Counter[int] = Counter()

    def texts() -> Iterator[tuple[str, Sequence[int], Sequence[int]]]:
        for row in trajectories(ctx):
            *before, last = row.attempts
            incorrect[len(before)] += 1
            yield row.question_id, prompts.revise(problems[row.question_id], before), closed(last, reader.eos)

    counts = lambda: {"by_incorrect_attempts": [incorrect[k] for k in range(spec.context + 1)]}  # noqa: E731
    return examples(ctx.dir / FOLDER, ctx.rank, texts(), spec.max_length, counts)


def train(ctx: Context) -> dict:
    from flywheel.training import train_sft

    spec, made = ctx.recipe.reviser, made_examples(ctx)
    questions, too_long = made.figures["questions"], made.figures["too_long"]
    held = set(random.Random(ctx.seed("held out")).sample(questions, min(len(questions), max(1, len(questions) // 10))))
    fit, check = made.split(held)
    if len(fit) < spec.min_examples or not len(check):
        return {
            "trained": False,
            "trajectories": len(fit),
            "why": f"{len(fit)} trajectories to train on (reviser.min_examples {spec.min_examples}) and {len(check)} to"
            f" validate on, of {len(questions)} questions with a correct solution, {too_long} longer than"
            f" reviser.max_length left out: this round has no reviser",
        }
    report = train_sft(fit, check, job(ctx, spec, "all", Role.REVISER))
    return {
        "trained": True,
        "trajectories": len(fit),
        "validation_trajectories": len(check),
        "too_long": too_long,
        "by_incorrect_attempts": made.figures["by_incorrect_attempts"],
        "curve": report.curve,
        "checkpoints": [
            # relative, so that a run can be moved
            {**asdict(c), "path": str(Path(c.path).relative_to(ctx.dir))}
            for c in report.checkpoints
        ],
        "train_seconds": report.seconds,
    }


STAGE = Stage(name="train_reviser", sections=("reviser", "prompts", "model"), inputs=(Input("sample"),), train=train)
