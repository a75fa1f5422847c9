"""Compute-optimal search on the training questions; verified solutions are kept for distillation.

Gold is known here, so every verified candidate counts, not only the selected one. The solutions
of the sample stage are candidates too: their tokens are already spent. The plan spends little where it sees little to
gain, so that late rounds would leave hard questions alone: with `harvest.extra` a question is sampled on until a
solution of it is verified, or that often.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from itertools import compress
from typing import NamedTuple

from flywheel.problems.grading import load_function
from flywheel.records import Grade, Harvested, Role, Solution, Split, Verdict
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
    tallies,
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


def verified(ctx: Context) -> Iterator[tuple[str, list[Solution]]]:
    """The right solutions of each training question that has one, those of the sample stage first.

    Questions that only the search solved come last, so the order is that of the first right solution in SOURCES.
    """
    train, counts = ids(ctx, Split.TRAIN), tallies(ctx, "sample", ctx.round)
    solved, rest = ([q for q in train if bool(counts[q][Verdict.CORRECT]) is there] for there in (True, False))
    for questions in (solved, rest):
        for asked in ctx.written("sample").groups(questions):
            found = [dict(judged(ctx, stage, ctx.round, questions=asked, right=True)) for stage in SOURCES]
            for question in asked:
                if right := [solution for one in found for solution, _ in one.get(question, ())]:
                    yield question, right


def finish(ctx: Context) -> dict:
    spec, bins = ctx.recipe.harvest, difficulties(ctx)
    problems = {p.id: p for p in ctx.problems(Split.TRAIN)}
    every: list[Row] = []  # of all rows, what `balanced` looks at; the rows themselves are on disk
    right = once = 0

    def rows() -> Iterator[Harvested]:
        nonlocal right, once
        for question, group in verified(ctx):
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
                every.append(Row(question, bin, count))
                yield Harvested(question, text, s.text, s.answer, bin, ctx.round, count, s.tokens)

    scratch = ctx.dir / ".rows.parquet"
    write_table(scratch, rows())
    chosen = balanced(every, spec.balance)
    write_table(ctx.dir / "harvest.parquet", compress(stream_table(scratch, Harvested), chosen))
    scratch.unlink()
    kept = list(compress(every, chosen))
    candidates = {stage: solutions_of(ctx, stage, problems) for stage in SOURCES}
    figures = {
        "plan": f"harvest_{ctx.round}",
        "models": model_names(search_models(ctx)),
        "candidates": sum(candidates.values()),
        "candidates_by_stage": candidates,
        "verified": right,
        "too_few_votes": once,
        "kept": len(kept),
        "questions": len({r.question_id for r in kept}),
        "training_questions": len(problems),
        "by_bin": [
            {
                "bin": b,
                "training_questions": sum(d.fixed_bin == b for q, d in bins.items() if q in problems),
                "kept": sum(r.bin == b for r in kept),
                "questions": len({r.question_id for r in kept if r.bin == b}),
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


class Row(NamedTuple):
    """What decides whether a row of the harvest is kept."""

    question_id: str
    bin: int
    votes: int


def balanced(rows: Sequence[Row], limit: float) -> list[bool]:
    """Whether each row is kept: each bin at most `limit` times the mean size of the non-empty bins, most votes first.

    Easy questions yield most verified solutions and would otherwise dominate the training set.
    """
    by_bin: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        by_bin.setdefault(row.bin, []).append(place)
    most = int(limit * len(rows) / max(1, len(by_bin)))
    kept = {
        place
        for places in by_bin.values()
        for place in sorted(places, key=lambda i: (-rows[i].votes, rows[i].question_id))[:most]
    }
    return [place in kept for place in range(len(rows))]


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
