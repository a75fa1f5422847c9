"""What do fewer samples cost the oracle? python -m eval.oracle_size RUN [--round 1] [--samples 2048] [--questions 128]

Snell et al., section 3.2, bin questions by pass@1 of 2,048 samples. Here as many are drawn of each of some test questions, by
the policy that searched in that round. Half of them are the reference; bins by the first k of the other half are held against it.

Prints JSON: by k, Spearman's rank correlation with the reference, the share of questions in the same quintile, and tokens a
question. The last row is the other half whole: what even so many samples agree on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from eval.cli import answer
from flywheel.ledger import total
from flywheel.measure.bins import quantile_bins
from flywheel.measure.stats import bootstrap_mean
from flywheel.recipe import load
from flywheel.records import Grade, Role, Split
from flywheel.runs.files import read_rows, read_table
from flywheel.runs.run import Context, Stage, fill
from flywheel.runs.shards import shard_dirs
from flywheel.stages.kit import by_question, ids, kit

BINS = 5


def draw(run: Path, round: int, samples: int, count: int) -> tuple[dict[str, list[bool]], float]:
    """Verdicts of the samples of each question, in order, kept in RUN/studies; tokens a question."""

    def work(ctx, opened, questions):
        sample = lambda q: opened.solutions(
            opened.problems[q].question, samples, purpose="oracle", tag=f"r{round}/oracle_size"
        )
        for _, solutions in opened.each(questions, sample):
            yield from opened.grade(solutions)

    stage = Stage(
        f"oracle_{samples}",
        (),
        ("gate@-1?", "distill@-1?"),
        items=lambda ctx: ids(ctx, Split.TEST)[:count],
        tools=lambda ctx: kit(ctx, {Role.POLICY: ctx.model(Role.POLICY, round - 1)}, Split.TEST),
        work=work,
        test_split=True,
    )
    recipe = load(run / "recipe.yaml")
    ctx = Context(
        recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"chunk": 4})}), run, round, stage
    )
    ctx.dir = run / "studies" / f"round_{round}" / f"{stage.name}_first_{count}"
    ctx.dir.mkdir(parents=True, exist_ok=True)
    fill(ctx)
    shards = shard_dirs(ctx.dir)
    grades = by_question(grade for shard in shards for grade in read_table(shard / "Grade.parquet", Grade))
    [(_, spent)] = total(row for shard in shards for row in read_rows(shard / "ledger.parquet"))
    return {
        q: [g.correct for g in sorted(group, key=lambda g: int(g.solution_id.rpartition("/")[2]))]
        for q, group in grades.items()
    }, spent.tokens / len(grades)


def compare(rights: dict[str, list[bool]], tokens: float) -> dict:
    questions, samples = sorted(rights), len(next(iter(rights.values())))
    half = samples // 2
    rate = lambda k, start: {q: float(np.mean(rights[q][start : start + k])) for q in questions}
    reference = rate(samples - half, half)
    theirs, rows = quantile_bins(reference, BINS), []
    for k in [k for k in (4, 16, 64, 128, 256, 512) if k < half] + [half]:
        ours = rate(k, 0)
        bins = quantile_bins(ours, BINS)
        rows.append(
            {
                "samples": k,
                "spearman": float(spearmanr([ours[q] for q in questions], [reference[q] for q in questions]).statistic),
                "same_bin": bootstrap_mean([float(bins[q] == theirs[q]) for q in questions]),
                "tokens": tokens * k / samples,
            }
        )
    return {
        "questions": len(questions),
        "samples": samples,
        "pass@1": bootstrap_mean([float(np.mean(rights[q])) for q in questions]),
        "by_samples": rows,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.oracle_size", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--round", type=int, default=1)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--questions", type=int, default=128)
    args = parser.parse_args(argv)
    return answer(lambda: compare(*draw(args.run, args.round, args.samples, args.questions)))


if __name__ == "__main__":
    sys.exit(main())
