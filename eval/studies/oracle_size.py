"""What do fewer samples cost the oracle grade of difficulty?

Snell et al., section 3.2, bin questions by pass@1 of 2,048 samples. Here as many are drawn of each of some test
questions, by the policy that searched in that round. Half of them are the reference; bins by the first k of the other
half are held against it.

By k: Spearman's rank correlation with the reference, the share of questions in the same quintile, and tokens a
question. The last row is the other half whole: what even so many samples agree on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr

from eval.shared import draw
from flywheel.errors import UserError
from flywheel.ledger import total
from flywheel.measure.bins import quantile_bins
from flywheel.measure.stats import bootstrap_mean
from flywheel.records import Grade, ModelRef, Role
from flywheel.runs.files import read_rows
from flywheel.runs.reading import Written
from flywheel.runs.run import Context, Run
from flywheel.runs.shards import shard_dirs
from flywheel.stages.kit import Kit
from flywheel.stages.shared import by_question

BINS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Run, metavar="RUN")
    parser.add_argument("--round", type=int, default=1, metavar="R")
    parser.add_argument("--samples", type=int, default=2048, help="a question (%(default)s)")
    parser.add_argument("--questions", type=int, default=128, help="test questions (%(default)s)")


def verdicts(run: Run, round: int, samples: int, count: int) -> tuple[dict[str, list[bool]], float]:
    """(question -> whether each sample is correct, tokens per question); stored in RUN/studies."""

    def models(ctx: Context) -> dict[str, ModelRef]:
        return {Role.POLICY: ctx.model(Role.POLICY, round - 1)}

    async def work(ctx: Context, kit: Kit, questions: Sequence[str]) -> list[object]:
        async def one(id: str) -> list[Grade]:
            question = kit.problems[id].question
            drawn = await kit.solutions(question, samples, purpose="oracle", tag=f"r{round}/oracle_size")
            return await kit.grade(drawn)

        return await kit.each(questions, one)

    directory = draw(run, round, f"oracle_{samples}_first_{count}", models, work, count=count, chunk=4)
    grades = by_question(Written(directory).records(Grade))  # in the order of the samples
    [(_, spent)] = total(row for shard in shard_dirs(directory) for row in read_rows(shard / "ledger.parquet"))
    return {q: [grade.correct for grade in group] for q, group in grades.items()}, spent.tokens / len(grades)


def compare(rights: dict[str, list[bool]], tokens: float) -> dict:
    """The study's figures. `tokens`: mean tokens of all samples of a question."""
    questions, samples = sorted(rights), len(next(iter(rights.values())))
    half = samples // 2

    def rate(k: int, start: int = 0) -> dict[str, float]:
        return {q: float(np.mean(rights[q][start : start + k])) for q in questions}

    reference, rows = rate(samples - half, half), []
    theirs = quantile_bins(reference, BINS)
    for k in [k for k in (4, 16, 64, 128, 256, 512) if k < half] + [half]:
        ours = rate(k)
        bins = quantile_bins(ours, BINS)
        rows.append(
            {
                "samples": k,
                "spearman": spearmanr(list(ours.values()), list(reference.values())).statistic,
                "same_bin": bootstrap_mean([float(bins[q] == theirs[q]) for q in questions]),
                "tokens": tokens * k / samples,
            }
        )
    every = bootstrap_mean(list(rate(samples).values()))
    return {"questions": len(questions), "samples": samples, "pass@1": every, "by_samples": rows}


def measure(args: argparse.Namespace) -> dict:
    if args.samples < 2:
        raise UserError("--samples: two at least; one half is held against the other")
    return compare(*verdicts(args.run, args.round, args.samples, args.questions))
