"""Figures that stages take in streams are those that the whole tables would give."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import asdict, replace

import pytest
from stage_files import seal, store

from flywheel.measure.health import health
from flywheel.recipe import load
from flywheel.records import Finish, Grade, Harvested, Solution, Split, Step, StepValues, Verdict
from flywheel.runs.files import read_table, write_table
from flywheel.runs.run import Context
from flywheel.search.select import majority
from flywheel.stages import distill, evaluate, gate, harvest, label, sample, train_reviser
from flywheel.stages.shared import answer_is_right, by_question, difficulties, rate, trace, votes

SETTINGS = [
    "problems.limits={train: 12, calibrate: 6, validation: 1, test: 6}",
    "problems.step_checker=null",
    "sample={per_question: 8, calibrate: 8}",
    "evaluate.samples=8",
    "harvest={keep: 2, min_votes: 2, balance: 1.0, vote: trace}",
    "reviser={samples: 6, trajectories: 2}",
]
VERDICTS = [Verdict.CORRECT, Verdict.CORRECT, Verdict.INCORRECT, Verdict.TRUNCATED, Verdict.UNDECIDED]


def drawn(questions: list[str], each: int, purpose: str) -> list:
    """Solutions of few texts, graded at random; every fourth question is never right."""
    rng, out = random.Random(purpose), []
    for place, question in enumerate(questions):
        for i in range(each):
            verdict = rng.choice(VERDICTS if place % 4 else VERDICTS[2:])
            texts = rng.choices(["1 + 2\n", "1  + 2\n", "so 3\n"], k=2)
            steps = tuple(Step(text, tuple(rng.choices(range(50), k=4))) for text in texts)
            finish = Finish.LENGTH if verdict is Verdict.TRUNCATED else Finish.STOP
            answer = None if finish is Finish.LENGTH else "3" if verdict is Verdict.CORRECT else rng.choice("45")
            id = f"{question}/{purpose}/{i}"
            out.append(Solution(id, question, steps, finish, answer, purpose, "policy_0", f"{question}/{i // 2}"))
            out.append(Grade(id, question, verdict, purpose))
    return out


def parted(records: list) -> tuple[list[Solution], dict[str, Verdict]]:
    grades = {r.solution_id: r.verdict for r in records if isinstance(r, Grade)}
    return [r for r in records if isinstance(r, Solution)], grades


@pytest.fixture
def run(tmp_path):
    recipe = load("recipes/chain.yaml", SETTINGS)
    ctx = Context(recipe, tmp_path, 1, evaluate.STAGE)
    ids = {split: [p.id for p in ctx.problems(split)] for split in (Split.TRAIN, Split.CALIBRATE, Split.TEST)}
    asked, test = [*ids[Split.TRAIN], *ids[Split.CALIBRATE]], ids[Split.TEST]
    made = {
        (1, "sample"): (asked, drawn(asked, 8, "sample")),
        (1, "harvest"): (ids[Split.TRAIN], drawn(ids[Split.TRAIN], 5, "harvest")),
        (1, "gate"): (ids[Split.CALIBRATE], drawn(ids[Split.CALIBRATE], 8, "gate")),
    }
    for round in (0, 1):
        purposes = (("bin", 8), ("evaluate", 8), ("greedy", 1)) if round == 0 else (("evaluate", 8), ("greedy", 1))
        made[round, "evaluate"] = test, [r for purpose, n in purposes for r in drawn(test, n, purpose)]
    for (round, stage), (items, records) in made.items():
        store(tmp_path, round, stage, items, records, {"verified": 1}, chunk=5)
    seal(tmp_path, 1, "distill", {"trained": True})
    seal(tmp_path, 1, "choose_reviser", {"chosen": None})
    seal(tmp_path, 1, "train_prm")

    def context(stage) -> Context:
        if stage is evaluate.STAGE:
            seal(tmp_path, 1, "gate", {"passed": True})
        return Context(recipe, tmp_path, 1, stage)

    return context, {at: records for at, (_, records) in made.items()}, ids


def rates_of(grades) -> dict[str, float]:
    return {q: rate(Counter(g.verdict for g in group)) for q, group in by_question(grades).items()}


def test_the_sample_stages_figures_are_those_of_all_its_grades(run):
    context, records, ids = run
    ctx, (_, verdicts) = context(sample.STAGE), parted(records[1, "sample"])
    found = sample.finish(ctx)
    assert found["verdicts"] == {str(v): list(verdicts.values()).count(v) for v in Verdict}
    rates = rates_of(r for r in records[1, "sample"] if isinstance(r, Grade))
    assert {q: d.pass_at_1 for q, d in difficulties(ctx).items()} == rates and 0 < sum(rates.values()) < len(rates)
    for split in (Split.TRAIN, Split.CALIBRATE):
        assert found[f"pass@1_{split}"] == sum(rates[q] for q in ids[split]) / len(ids[split])


def test_the_labels_figures_are_those_of_all_values(run):
    context, _, ids = run
    rng = random.Random(0)
    rows = [
        StepValues(f"{q}/sample/{i}", q, tuple(rng.randrange(5) / 4 for _ in range(3)), (4, 4, 0))
        for q in ids[Split.TRAIN]
        for i in range(2)
    ]
    ctx = context(label.STAGE)
    store(ctx.root, 1, "label", ids[Split.TRAIN], rows, chunk=5)
    found, values = label.finish(ctx), [v for row in rows for v in row.values]
    assert (found["questions"], found["solutions"], found["steps"]) == (12, 24, 72)
    assert found["mean_value"] == sum(values) / 72
    assert (found["values_at_0"], found["values_at_1"]) == (values.count(0) / 72, values.count(1) / 72)


def test_the_harvest_has_the_rows_and_the_order_that_the_whole_tables_give(run):
    context, records, ids = run
    ctx, spec = context(harvest.STAGE), context(harvest.STAGE).recipe.harvest
    figures = harvest.finish(ctx)
    right = []
    for stage in ("sample", "harvest"):
        solutions, verdicts = parted(records[1, stage])
        right += [s for s in solutions if s.question_id in ids[Split.TRAIN] and verdicts[s.id] is Verdict.CORRECT]
    problems = {p.id: p for p in ctx.problems(Split.TRAIN)}
    rows, once = [], 0
    for question, group in by_question(right).items():
        first: dict[str, Solution] = {}
        for solution in group:
            first.setdefault(trace(solution), solution)
        for text, count in votes(group).most_common(spec.keep):
            s, bin = first[text], difficulties(ctx)[question].fixed_bin
            row = Harvested(question, problems[question].question.text, s.text, s.answer, bin, 1, count, s.tokens)
            rows, once = (rows + [row], once) if count >= spec.min_votes else (rows, once + 1)
    sizes = Counter(row.bin for row in rows)
    most = int(spec.balance * len(rows) / len(sizes))
    best = {
        id(row)
        for b in sizes
        for row in sorted((r for r in rows if r.bin == b), key=lambda r: (-r.votes, r.question_id))[:most]
    }
    kept = [row for row in rows if id(row) in best]
    assert read_table(ctx.dir / "harvest.parquet", Harvested) == kept and 0 < len(kept) < len(rows)
    write_table(ctx.dir / "again.parquet", kept)
    assert (ctx.dir / "again.parquet").read_bytes() == (ctx.dir / "harvest.parquet").read_bytes()
    assert (figures["verified"], figures["too_few_votes"], figures["kept"]) == (len(right), once, len(kept))
    assert figures["candidates_by_stage"] == {"sample": 12 * 8, "harvest": 12 * 5}
    assert not list(ctx.dir.glob(".rows*"))


def test_the_gate_compares_what_the_whole_tables_give(run):
    context, records, ids = run
    found = gate.finish(context(gate.STAGE))
    asked = sorted(ids[Split.CALIBRATE])
    for place, stage in enumerate(("sample", "gate")):
        rates = rates_of(r for r in records[1, stage] if isinstance(r, Grade) and r.question_id in asked)
        assert found["pass@1"][place] == sum(rates[q] for q in asked) / len(asked)
        solutions = [s for s in parted(records[1, stage])[0] if s.question_id in asked]
        assert found["health"][("before", "after")[place]] == asdict(health(solutions))


def test_the_evaluations_figures_are_those_of_all_solutions(run):
    context, records, ids = run
    found = evaluate.finish(context(evaluate.STAGE))["policy"]
    solutions, verdicts = parted([r for r in records[1, "evaluate"] if r.purpose == "evaluate"])
    groups, correct = by_question(solutions), {id: v is Verdict.CORRECT for id, v in verdicts.items()}
    voted = [answer_is_right(majority([s.answer for s in groups[q]]), groups[q], correct) for q in sorted(groups)]
    assert found["majority@8"] == sum(voted) / 6
    assert found["pass@8"] == sum(any(correct[s.id] for s in group) for group in groups.values()) / 6
    assert found["verdicts"] == {str(v): list(verdicts.values()).count(v) for v in Verdict}
    texts = [{trace(s) for s in group if correct[s.id]} for group in groups.values()]
    assert found["distinct_right"] == sum(map(len, texts)) / 6


def test_trajectories_and_harvests_become_the_same_examples_on_every_rank(run):
    context, _, _ = run
    ctx = context(train_reviser.STAGE)
    made, rows = train_reviser.made_examples(ctx), list(train_reviser.trajectories(ctx))
    assert made.figures["by_incorrect_attempts"] == [sum(len(r.attempts) - 1 == k for r in rows) for k in range(5)]
    assert made.rows["question_id"][:] == [row.question_id for row in rows]
    assert made.figures["questions"] == sorted({row.question_id for row in rows}) and made.figures["too_long"] == 0
    for row, kept in zip(rows, made.rows):
        assert tuple(t for t in kept["labels"] if t != -100)[:-1] == row.attempts[-1].tokens
    harvest.finish(context(harvest.STAGE))
    taught = distill.made_examples(context(distill.STAGE))
    held = read_table(context(harvest.STAGE).dir / "harvest.parquet", Harvested)
    assert taught.figures["by_round"] == [len(held)] and len(taught.rows) == len(held)
    other = context(distill.STAGE)
    other.rank = 1
    assert list(distill.made_examples(other).rows) == list(taught.rows)


def test_the_first_round_that_harvested_a_trace_keeps_it(run):
    from flywheel.stages.shared import harvested

    context, _, _ = run
    ctx = context(distill.STAGE)
    first = Harvested("q", "1 +2", "1 + 2\nso 3", "3", 1, 1, 4, (1, 2))
    for round, rows in (
        (1, [first]),
        (2, [replace(first, solution="1  + 2 so 3", round=2), replace(first, round=2, question_id="r")]),
    ):
        ctx.path("harvest", round).mkdir(parents=True, exist_ok=True)
        write_table(ctx.path("harvest", round) / "harvest.parquet", rows)
    assert [(row.question_id, row.round) for row in harvested(ctx, range(1, 3))] == [("q", 1), ("r", 2)]
