"""A sampling stage as one stream of overlapping chunks, on the scripted engine."""

from __future__ import annotations

import json
import time

import pytest
import yaml

from flywheel.errors import EngineDied
from flywheel.ledger import total
from flywheel.models.prm import together
from flywheel.recipe import load
from flywheel.records import ModelRef, Role, Split
from flywheel.runs.files import read_rows
from flywheel.runs.run import Context
from flywheel.runs.shards import shard_dirs
from flywheel.runs.stage import Stage
from flywheel.runs.worker import chunks, fill
from flywheel.search.adaptive import Adaptive
from flywheel.search.beam import Beam
from flywheel.search.best_of_n import BestOfN
from flywheel.stages.kit import kit
from flywheel.stages.shared import ids
from tests import micro

QUESTIONS = [f"{i} + {i % 3}" for i in range(12)]


@pytest.fixture
def project(tmp_path):
    """A base that is a script, and a recipe for it."""
    micro.tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text("{}")
    script(tmp_path)
    rows = [{"id": f"q{i:02d}", "question": q, "answer": str(i), "split": "train"} for i, q in enumerate(QUESTIONS)]
    rows += [{"id": s, "question": f"{s} 1", "answer": "1", "split": s} for s in ("calibrate", "validation", "test")]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "scripted",
        "problems": {"path": str(tmp_path / "questions.jsonl")},
        "model": {"base": str(tmp_path / "base")},
        "engine": {"kind": "tests.scripted:open_backend", "chunk": 2},
        "prompts": {
            "solve": "Q {question} ?\nTry ",
            "check": "Q {question} ?\nCheck ",
            "again": "\nAgain ",
            "answer": r"Answer (\S+)",
        },
        "prm": {"labels": ["ok", "no"]},
        "calibrate": {"strategies": [{"kind": "best_of_n"}], "budgets": [4, 16]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def script(root, **changes) -> None:
    lines = {
        f"Q {q} ?": [
            {"text": f"{q} = {i} \n 1 + 1 = 2 \n Answer {i}", "right": True},
            {"text": f"{q} = {i} \n 1 + 2 = 3 \n Answer {i + 1}"},
            {"text": f"{q} = {i + 2} \n Answer {i + 2}"},
        ]
        for i, q in enumerate(QUESTIONS)
    }
    (root / "base" / "scripted.json").write_text(json.dumps({"questions": lines} | changes))


def searches(ctx, opened, questions):
    """Searches that ask the same prompts at different times."""
    searcher = opened.searcher(reviser=False)
    asked = [BestOfN(4), Adaptive(8), Beam(4, 2), BestOfN(2, "majority")]

    async def one(question):
        found = await together(opened.searched(question, searcher, s, f"r1/{s.name}") for s in asked)
        return [record for records in found for record in records]

    return opened.each(questions, one)


def samples(ctx, opened, questions):
    return opened.each(questions, lambda question: opened.sampled(question, 4, purpose="sample", tag="r1"))


def run(project, name: str, work, *changes: str, world: int = 1) -> Context:
    base = str(project / "base")
    models = {Role.POLICY: ModelRef("policy_0", base), Role.PRM: ModelRef("prm_1", base, "an adapter")}
    stage = Stage(
        "sample",
        None,
        (),
        items=lambda ctx: ids(ctx, Split.TRAIN),
        open=lambda ctx: kit(ctx, models, Split.TRAIN),
        work=work,
    )
    ctx = Context(load(project / "recipe.yaml", list(changes)), project / name, 1, stage, world=world)
    ctx.dir.mkdir(parents=True)
    fill(ctx)
    return ctx


def tables(ctx: Context, spent: bool = True) -> dict[str, bytes]:
    found = {str(p.relative_to(ctx.dir)): p.read_bytes() for p in sorted(ctx.dir.rglob("*.parquet"))}
    return {name: data for name, data in found.items() if spent or "ledger" not in name}


def verdicts(ctx: Context) -> list[dict]:
    return [json.loads((shard / "shard.json").read_text())["verdicts"] for shard in shard_dirs(ctx.dir)]


def test_a_shard_is_the_same_whatever_else_is_under_way(project):
    one = run(project, "one", searches, "engine.max_running=1")  # a chunk at a time
    all_at_once = run(project, "all", searches, "engine.max_running=500")
    assert tables(one) == tables(all_at_once) and verdicts(one) == verdicts(all_at_once) and len(verdicts(one)) == 6
    assert one.ledger.rows() == [] == all_at_once.ledger.rows(), "all was charged to a chunk"


@pytest.mark.parametrize("world, most", [(1, 6), (3, 2), (6, 1)])
def test_a_process_leaves_the_others_their_share_of_a_small_stage(project, world, most):
    under_way, widths = set(), []

    async def counted(ctx, opened, questions):
        under_way.add(questions[0])
        made = await samples(ctx, opened, questions)
        widths.append(len(under_way))
        under_way.remove(questions[0])
        return made

    run(project, "run", counted, world=world)
    assert max(widths) == most and len(widths) == 6


def test_the_seconds_of_overlapping_chunks_add_up_to_the_time_of_the_stage(project):
    script(project, seconds=0.01)
    begun = time.monotonic()
    ctx = run(project, "run", samples)
    spent = [json.loads((shard / "shard.json").read_text())["seconds"] for shard in shard_dirs(ctx.dir)]
    assert 0 < sum(spent) < time.monotonic() - begun


def test_after_a_death_what_was_under_way_is_made_again_and_what_it_cost_is_kept(project, capsys):
    whole = run(project, "whole", samples, "engine.max_running=1")
    script(project, dies_after=44)  # of 48 sequences, 8 a chunk
    died = run(project, "died", samples, "engine.max_running=1")
    assert capsys.readouterr().out.count("opened again for") == 1
    assert tables(died, spent=False) == tables(whole, spent=False) and verdicts(died) == verdicts(whole)
    ledgers = [[row for path in ctx.dir.rglob("ledger.parquet") for row in read_rows(path)] for ctx in (whole, died)]
    tokens = [sum(spent.tokens for _, spent in total(rows, "role")) for rows in ledgers]
    assert tokens[1] > tokens[0]


def test_an_engine_that_dies_twice_on_a_chunk_names_its_questions(project):
    script(project, dies_after=5)
    with pytest.raises(EngineDied, match=r"\(twice, on questions q00 q01 q02 q03\)"):
        run(project, "run", samples, "engine.max_running=1")


def test_an_engine_that_does_not_open_is_tried_twice(project, capsys):
    (project / "base" / "scripted.json").unlink()
    opened = []

    def dead(ctx):
        opened.append(ctx)
        raise EngineDied("it does not start")

    stage = Stage("sample", None, (), items=lambda ctx: ids(ctx, Split.TRAIN), open=dead, work=samples)
    ctx = Context(load(project / "recipe.yaml"), project / "run", 1, stage)
    ctx.dir.mkdir(parents=True)
    with pytest.raises(EngineDied, match=r"it does not start \(twice, on questions q00 q01\)"):
        fill(ctx)
    assert len(opened) == 2


@pytest.mark.parametrize(
    "items, size, count, longest",
    [(3, 0, 1, 3), (400, 0, 50, 8), (7473, 0, 250, 30), (500_000, 0, 7813, 64), (400, 50, 8, 50)],
)
def test_a_stage_has_chunks_enough_for_many_ranks_and_not_too_many_files(items, size, count, longest):
    made = chunks([str(i) for i in range(items)], size)
    assert len(made) == count and max(map(len, made)) == longest and min(map(len, made)) > 1
