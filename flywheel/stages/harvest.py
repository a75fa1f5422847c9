"""Compute-optimal search on the training questions; verified solutions are kept for distillation.

Gold is known here, so every verified candidate counts, not only the selected one. The solutions
of the sample stage are candidates too: their tokens are already spent. The plan spends little where it sees little to
gain, so that late rounds would leave hard questions alone: with `harvest.extra` a question is sampled on until a
solution of it is verified, or that often.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import compress

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flywheel.problems.grading import load_function
from flywheel.records import Difficulty, Grade, Harvested, Role, Solution, Split, Verdict
from flywheel.runs.files import stream_table, write_table
from flywheel.runs.run import Context
from flywheel.runs.stage import Input, Stage
from flywheel.search.best_of_n import BestOfN
from flywheel.search.plan import Plan
from flywheel.stages.kit import Kit, kit
from flywheel.stages.shared import (
    LAST_POLICY,
    difficulties,
    enough_votes,
    ids,
    judged,
    model_names,
    sampled,
    search_models,
    trace,
    votes,
)

SOURCES = ("sample", "harvest")  # the stages whose verified solutions are kept
AT_ONCE = 4  # draws of `harvest.extra` before a question is looked at again


async def work(ctx: Context, kit: Kit, questions: Sequence[str]) -> list[object]:
    plan = Plan.from_dict(ctx.figures("calibrate")["harvest"])
    bins, budget = difficulties(ctx), ctx.recipe.harvest.budget
    searcher, spec = kit.searcher(reviser=Role.REVISER in search_models(ctx)), ctx.recipe.harvest

    async def one(question: str) -> list[object]:
        strategy = plan.strategy(bins[question].quantile_bin, budget)
        made = await kit.searched(question, searcher, strategy, f"r{ctx.round}/harvest")
        right = [s for s, verdict in sampled(ctx, question) if verdict is Verdict.CORRECT] + correct(made)
        for first in range(0, spec.extra, AT_ONCE):
            if enough_votes(spec, right):
                break
            few = BestOfN(min(AT_ONCE, spec.extra - first), "majority")
            more = await kit.searched(question, searcher, few, f"r{ctx.round}/extra{first}")
            made, right = made + more, right + correct(more)
        return made

    return await kit.each(questions, one)


def correct(records: Sequence[object]) -> list[Solution]:
    """The solutions among `records` that a grade among them calls correct."""
    right = {record.solution_id for record in records if isinstance(record, Grade) and record.correct}
    return [record for record in records if isinstance(record, Solution) and record.id in right]


def verified(ctx: Context, bins: Mapping[str, Difficulty]) -> Iterator[tuple[str, list[Solution]]]:
    """The right solutions of each training question that has one, those of the sample stage first.

    Questions that only the search solved come last, so the order is that of the first right solution in SOURCES.
    """
    train = ids(ctx, Split.TRAIN)
    solved, rest = ([q for q in train if (bins[q].pass_at_1 > 0) is there] for there in (True, False))
    for questions in (solved, rest):
        for asked in ctx.written("sample").groups(questions):
            found = [dict(judged(ctx, stage, ctx.round, questions=asked, right=True)) for stage in SOURCES]
            for question in asked:
                if right := [solution for one in found for solution, _ in one.get(question, ())]:
                    yield question, right


def finish(ctx: Context) -> dict:
    spec, bins = ctx.recipe.harvest, difficulties(ctx)
    problems = {p.id: p for p in ctx.problems(Split.TRAIN)}
    right = once = 0

    def rows() -> Iterator[Harvested]:
        nonlocal right, once
        for question, group in verified(ctx, bins):
            right += len(group)
            first: dict[str, Solution] = {}
            for solution in group:
                first.setdefault(trace(solution), solution)
            text, bin = problems[question].question.text, bins[question].fixed_bin
            enough = set(enough_votes(spec, group))
            for found, count in votes(group).most_common(spec.keep):
                if found not in enough:
                    once += 1
                    continue
                s = first[found]
                yield Harvested(question, text, s.text, s.answer, bin, ctx.round, count, s.tokens)

    scratch = ctx.dir / ".rows.parquet"
    write_table(scratch, rows(), Harvested)
    every = pq.read_table(scratch, columns=["question_id", "bin", "votes"])
    chosen = balanced(every, spec.balance)
    write_table(ctx.dir / "harvest.parquet", compress(stream_table(scratch, Harvested), chosen), Harvested)
    scratch.unlink()
    kept = every.filter(chosen)
    candidates = {stage: solutions_of(ctx, stage, problems) for stage in SOURCES}
    figures = {
        "plan": f"harvest_{ctx.round}",
        "models": model_names(search_models(ctx)),
        "candidates": sum(candidates.values()),
        "candidates_by_stage": candidates,
        "verified": right,
        "too_few_votes": once,
        "kept": len(kept),
        "questions": pc.count_distinct(kept["question_id"]).as_py(),
        "training_questions": len(problems),
        "by_bin": [
            {
                "bin": b,
                "training_questions": sum(bins[q].fixed_bin == b for q in problems),
                "kept": len(inside := kept.filter(pc.equal(kept["bin"], b))),
                "questions": pc.count_distinct(inside["question_id"]).as_py(),
            }
            for b in range(1, ctx.recipe.calibrate.bins + 1)
        ],
    }
    if ctx.recipe.problems.step_checker:
        sound = load_function(ctx.recipe.problems.step_checker, "problems.step_checker")
        harvest = stream_table(ctx.dir / "harvest.parquet", Harvested)
        figures["step_verified"] = sum(sound(r.question, r.solution) for r in harvest) / len(kept) if kept else None
    return figures


def solutions_of(ctx: Context, stage: str, questions: Container[str]) -> int:
    """The number of a stage's solutions of `questions`."""
    tables = ctx.written(stage).tables(Solution, ["question_id"])
    return sum(q in questions for table in tables for q in table["question_id"].to_pylist())


def balanced(rows: pa.Table, limit: float) -> np.ndarray:
    """Whether each row is kept: each bin at most `limit` times the mean size of the non-empty bins, most votes first.

    rows: question_id, bin, votes. Easy questions yield most verified solutions and would otherwise dominate the
    training set.
    """
    order = pc.sort_indices(rows, [("bin", "ascending"), ("votes", "descending"), ("question_id", "ascending")])
    bins = rows["bin"].to_numpy()[order]
    place = np.arange(len(bins)) - np.searchsorted(bins, bins)  # within the bin
    kept = np.zeros(len(bins), dtype=bool)
    kept[order] = place < int(limit * len(bins) / max(1, len(np.unique(bins))))
    return kept


STAGE = Stage(
    name="harvest",
    sections=(
        "problems",
        "harvest",
        "sample",
        "prm.aggregate",
        "prm.labels",
        "prompts",
        "engine",
        "calibrate.bins",
        "calibrate.edges",
    ),
    inputs=(Input("sample"), Input("train_prm"), Input("choose_reviser"), Input("calibrate"), *LAST_POLICY),
    items=lambda ctx: ids(ctx, Split.TRAIN),
    open=lambda ctx: kit(ctx, search_models(ctx), Split.TRAIN),
    work=work,
    finish=finish,
    shares="calibrate",
)
