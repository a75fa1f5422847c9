"""What is opened of a stage when it is read by question, in columns, or whole."""

from __future__ import annotations

import pytest
from stage_files import store

from flywheel.recipe import load
from flywheel.records import Finish, Grade, Solution, Split, Step, Verdict
from flywheel.runs.files import Damaged, read_table, stream_table, write_table
from flywheel.runs.manifest import stage_dir
from flywheel.runs.reading import Written, where
from flywheel.runs.run import Context
from flywheel.runs.shards import Shards
from flywheel.stages import label
from flywheel.stages.shared import pass_rates, sampled

QUESTIONS = [f"q{i}" for i in range(10)]


def solution(question: str, number: int) -> Solution:
    id = f"{question}/{number}"
    return Solution(id, question, (Step(f"way {number}", (number,)),), Finish.STOP, "7", "sample", "policy_0", id)


def records(questions: list[str], each: int = 3) -> list:
    """`each` solutions of every question, the first one right; a question's last is not decided."""
    made = [solution(question, i) for question in questions for i in range(each)]
    verdicts = [Verdict.CORRECT, *[Verdict.INCORRECT] * (each - 2), Verdict.UNDECIDED] * len(questions)
    return [*made, *(Grade(s.id, s.question_id, v, "sample") for s, v in zip(made, verdicts))]


def spoil(directory, kept: list[str]) -> None:
    """Make the tables of all shards unreadable but those in `kept`."""
    for path in (directory / "shards").glob("*/*.parquet"):
        if path.parent.name not in kept:
            path.write_bytes(b"not a table")


def test_a_question_is_read_from_its_shard_alone_and_the_order_is_that_of_the_items(tmp_path):
    store(tmp_path, 1, "sample", QUESTIONS, records(QUESTIONS))
    directory = stage_dir(tmp_path, 1, "sample")
    spoil(directory, ["00001", "00003"])
    written = Written(directory)
    assert [s.id for s in written.records(Solution, ["q7", "q2"])] == [f"q{q}/{i}" for q in (2, 7) for i in range(3)]
    assert [s.id for s in written.records(Solution, ["q3"], where("id", ["q3/1"]))] == ["q3/1"]
    assert list(written.groups(["q7", "q2", "q3"])) == [["q2", "q3"], ["q7"]]
    [table] = written.tables(Grade, ["question_id", "verdict"], ["q6"])
    assert table.column_names == ["question_id", "verdict"] and table["question_id"].to_pylist() == ["q6"] * 3
    with pytest.raises(Damaged, match="00000/Solution.parquet: not a parquet file"):
        list(written.records(Solution))
    with pytest.raises(Damaged, match="no shard holds question q99"):
        list(written.records(Solution, ["q99"]))


def test_a_stage_opens_only_the_shards_of_its_chunks_questions(tmp_path):
    recipe = load("recipes/chain.yaml", ["problems.limits={train: 10, calibrate: 4, validation: 1, test: 1}"])
    ctx = Context(recipe, tmp_path, 1, label.STAGE)
    ids = [p.id for p in ctx.problems(Split.TRAIN, Split.CALIBRATE)]
    store(tmp_path, 1, "sample", ids, records(ids))
    assert set(label.questions(ctx)) == set(ids[:10])
    assert pass_rates(ctx, "sample", 1) == dict.fromkeys(ids, 0.5)  # one right of two decided
    spoil(stage_dir(tmp_path, 1, "sample"), ["00002"])
    assert [verdict for _, verdict in sampled(ctx, ids[5])] == list(
        (Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNDECIDED)
    )
    assert {s.id for s, _ in label.chosen(ctx, ids[4])} == {f"{ids[4]}/0", f"{ids[4]}/1"}
    with pytest.raises(Damaged, match="not a parquet file"):
        label.chosen(ctx, ids[6])


def test_a_stages_processes_look_at_names_and_sizes_of_its_shards_but_not_at_their_contents(tmp_path):
    store(tmp_path, 1, "sample", QUESTIONS[:2], records(QUESTIONS[:2]))
    directory = stage_dir(tmp_path, 1, "sample")
    path = directory / "shards" / "00000" / "Grade.parquet"
    path.write_bytes(path.read_bytes()[::-1])
    Shards(directory, [QUESTIONS[:2]])  # rank 0 compares the contents, once a launch
    path.write_bytes(b"short")
    with pytest.raises(Damaged, match="has 5 bytes, was written with"):
        Shards(directory, [QUESTIONS[:2]])


def test_a_long_table_is_written_and_read_in_parts(tmp_path):
    rows = [Grade(str(i), "q", Verdict.CORRECT) for i in range(10_000)]
    write_table(tmp_path / "t.parquet", iter(rows))
    assert list(stream_table(tmp_path / "t.parquet", Grade)) == read_table(tmp_path / "t.parquet", Grade) == rows
