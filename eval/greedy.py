"""What does a policy answer at temperature 0? python -m eval.greedy RUN [RUN ...]

pass@1 is of samples at the recipe's temperature, as the paper's is. Served alone, a model would answer greedily, once: this is
the figure that a user of the last policy sees, and the cheapest answer that a search has to beat.

Prints JSON: by round the accuracy of the policy's greedy answers on all test questions with its 95% interval (runs averaged
question by question), each run's alone, the paired gain over round 0, and tokens an answer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.cli import answer
from eval.seeds import together
from eval.study import context
from flywheel.measure.stats import bootstrap_mean, paired_gain
from flywheel.models.engine import Sampling
from flywheel.records import ModelRef, Role, Split
from flywheel.runs.history import History
from flywheel.runs.run import Context, Stage
from flywheel.stages.kit import ids, kit


def reader(run: Path, round: int, *inputs: str) -> Context:
    return context(
        run, round, Stage("greedy", (), inputs, items=lambda ctx: [], work=lambda *_: iter(()), test_split=True), 20
    )


def greedy(ctx: Context, model: ModelRef, questions: Sequence[str]) -> tuple[dict[str, float], float]:
    """1.0 by question that `model` answers right at temperature 0, and the mean tokens of an answer, prompt and all."""
    sample = ctx.recipe.sample
    with kit(ctx, {"model": model}, Split.TEST) as opened:

        async def one(question: str):
            prompt = opened.prompts.solve(opened.problems[question].question)
            [done] = await opened.engine("model").generate(
                prompt, Sampling(sample.max_tokens, 0.0, stop=opened.reader.stop), purpose="greedy"
            )
            return opened.reader.solution(
                done.tokens, done.finish, id=f"{question}/greedy", question_id=question, origin="greedy"
            ), len(prompt) + len(done.tokens) + done.eos

        drawn = [found for _, found in opened.each(questions, one)]
        grades = opened.grade([solution for solution, _ in drawn])
    return {g.question_id: float(g.correct) for g in grades}, float(np.mean([tokens for _, tokens in drawn]))


def study(runs: Sequence[Path]) -> dict:
    rows: list[dict] = []
    first: list[float] = []
    for r in range(min(max(History.of(run).rounds) for run in runs) + 1):
        found, spent = [], []
        for run in runs:
            ctx = reader(run, r, *(f"{stage}@{k}?" for k in range(1, r + 1) for stage in ("gate", "distill")))
            right, tokens = greedy(ctx, ctx.model(Role.POLICY, r), ids(ctx, Split.TEST))
            found.append(right)
            spent.append(tokens)
        values = together(found)
        first = first or values
        rows.append(
            {
                "round": r,
                "accuracy": bootstrap_mean(values),
                "runs": [float(np.mean(list(right.values()))) for right in found],
                "gain": paired_gain(first, values),
                "tokens": float(np.mean(spent)),
            }
        )
    return {"questions": len(first), "rounds": rows}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.greedy", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    args = parser.parse_args(argv)
    return answer(lambda: study(args.runs))


if __name__ == "__main__":
    sys.exit(main())
