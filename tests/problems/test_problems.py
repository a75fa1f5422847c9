"""Claims about problem files: what is read, what is dropped with a word, what ends in one clear line."""

import gzip
import json
from pathlib import Path

import pytest

from flywheel.errors import UserError
from flywheel.problems.grading import Grader
from flywheel.problems.sources import load
from flywheel.recipe import ProblemSpec
from flywheel.records import Finish, Solution, Split

SPLITS = ["train", "calibrate", "validation", "test"]


def rows(count: int, **more) -> list[dict]:
    return [{"question": f"What is {i} + 1?", "answer": str(i + 1), **more} for i in range(count)]


def write(path: Path, lines: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8"
    )
    return path


def read(path: Path, **keys):
    notes: list[str] = []
    return load(ProblemSpec(path=str(path), **keys), notes), notes


def fault(path: Path, **keys) -> str:
    with pytest.raises(UserError) as error:
        read(path, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_without_splits_is_cut_by_the_text_of_its_questions(tmp_path):
    problems, notes = read(write(tmp_path / "all.jsonl", rows(1000)))
    sizes = {split: len(found) for split, found in problems.items()}
    assert (
        sum(sizes.values()) == 1000
        and sizes[Split.TRAIN] > sizes[Split.CALIBRATE] > sizes[Split.TEST] > sizes[Split.VALIDATION] > 25
    )
    assert 650 < sizes[Split.TRAIN] < 750
    assert len(notes) == 1 and "drawn by hash" in notes[0]
    again, _ = read(write(tmp_path / "more.jsonl", [*rows(1200)[1000:], *rows(1000)[::-1]]))
    for split in Split:  # other rows and another order move no question
        assert {p.id for p in problems[split]} <= {p.id for p in again[split]}
        assert all(p.split is split for p in problems[split])


@pytest.mark.parametrize("count", [4, 5, 12])
def test_a_small_file_leaves_no_split_empty(tmp_path, count):
    problems, _ = read(write(tmp_path / "few.jsonl", rows(count)))
    assert sum(map(len, problems.values())) == count and all(problems.values())


def test_splits_ids_and_levels_of_the_file_are_kept_in_order(tmp_path):
    lines = [{**row, "id": i, "split": SPLITS[i % 4], "level": i % 3} for i, row in enumerate(rows(12))]
    problems, notes = read(write(tmp_path / "own.jsonl", lines), limits={"train": 2})
    assert notes == ["train: the first 2 of 3 (problems.limits)"]
    assert [p.id for p in problems[Split.TRAIN]] == ["0", "4"]
    assert [p.id for p in problems[Split.TEST]] == ["3", "7", "11"]
    assert [p.level for p in problems[Split.TEST]] == ["0", "1", "2"]


def test_a_folder_holds_one_file_a_split_and_what_is_missing_comes_from_train(tmp_path):
    write(tmp_path / "train.jsonl", rows(200))
    write(tmp_path / "test.jsonl", [{"question": "2 * 2?", "answer": 4}])
    problems, notes = read(tmp_path)
    assert [p.answer for p in problems[Split.TEST]] == ["4"]
    assert problems[Split.CALIBRATE] and problems[Split.VALIDATION] and "no calibrate, validation questions" in notes[0]


def test_fields_are_renamed_and_numbers_are_answers(tmp_path):
    lines = [{"Q": f"{i}?", "gold": answer} for i, answer in enumerate([1, 2.0, 2.5, "x"])]
    problems, _ = read(write(tmp_path / "own.jsonl", lines), fields={"question": "Q", "answer": "gold"})
    assert sorted(p.answer for found in problems.values() for p in found) == ["1", "2.0", "2.5", "x"]


def test_a_separator_inside_a_string_and_a_byte_order_mark_are_no_fault(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + "\n".join(
            json.dumps({"question": f"a\u2028b {i}", "answer": "1"}, ensure_ascii=False) for i in range(4)
        ).encode()
    )
    problems, _ = read(path)
    assert sum(map(len, problems.values())) == 4


@pytest.mark.parametrize(
    ("lines", "keys", "message"),
    [
        ([], {}, "own.jsonl: empty; one JSON object a line wanted"),
        (["", "  "], {}, "own.jsonl: empty"),
        ([*rows(1), "{'question': 1}"], {}, "own.jsonl:2: not JSON: "),
        ([*rows(1), "", "[1]"], {}, "own.jsonl:3: a JSON object wanted, got list"),
        (["[" * 100_000], {}, "own.jsonl: not JSON"),
        (["[1]"], {}, "own.jsonl[0]: a JSON object wanted, got int"),
        ([{**row, "id": "a"} for row in rows(3)], {}, "own.jsonl:2: id 'a' is already used at "),
        ([*rows(2), {"question": "?", "answer": " "}], {}, "own.jsonl:3: a question with no answer"),
        ([*rows(2), {"question": "?", "answer": None}], {}, "own.jsonl:3: a question with no answer"),
        ([*rows(2), {"question": "", "answer": "1"}], {}, "own.jsonl:3: the question is empty"),
        ([*rows(2), {"question": "?", "answer": [[1]]}], {}, "own.jsonl:3: answer: text or a number wanted, got [1]"),
        ([*rows(2), {"question": "?", "answer": []}], {}, "own.jsonl:3: a question with no answer"),
        (
            [{"problem": "?", "solution": 1}],
            {},
            "own.jsonl:1: no field 'question'; did you mean 'problem'? Then set problems.fields.question=problem",
        ),
        (
            [{"problem": "?", "solution": 1}],
            {"fields": {"question": "problem"}},
            "no field 'answer'; did you mean 'solution'? Then set problems.fields.answer=solution",
        ),
        (
            [{"Body": "A", "Question": "?", "answer": 1}],
            {"fields": {"question": "{Body} {question}"}},
            "own.jsonl:1: no field 'question'; did you mean 'Question'?",
        ),
        (
            rows(20),
            {"answer": "#### (.*)"},
            "own.jsonl:1: no gold answer by problems.answer '#### (.*)' in 20 of 20 rows",
        ),
        ([*rows(2), {"question": "?", "answer": True}], {}, "own.jsonl:3: answer: text or a number wanted, got true"),
        ([*rows(2), {"question": "?"}], {}, "own.jsonl:3: no field 'answer'; it has question"),
        (
            [{"questions": "?", "answer": 1}],
            {},
            "own.jsonl:1: no field 'question'; did you mean 'questions'? Then set problems.fields.question=questions",
        ),
        (rows(4), {"fields": {"id": "uid"}}, "own.jsonl:1: no field 'uid'"),
        (
            rows(4),
            {"fields": {"qestion": "question"}},
            "problems.fields.qestion: unknown field (did you mean question?)",
        ),
        (
            rows(4, split="tain"),
            {},
            "own.jsonl:1: unknown split 'tain' (did you mean train?); known: train, calibrate, validation, test",
        ),
        (
            [*rows(4), {"question": "What is  3 + 1? ", "answer": "5"}],
            {},
            "own.jsonl:5: this question has answer '5' and, at ",
        ),
        ([*rows(4, split="train"), *rows(1, split="test")], {}, "own.jsonl:5: this question is in split test and, at "),
        (rows(3), {}, "own.jsonl: 3 questions cannot be cut into train, calibrate, validation, test"),
        (rows(4, split="test"), {}, "own.jsonl: 0 questions cannot be cut into train, calibrate, validation"),
    ],
)
def test_a_fault_is_one_line_with_file_line_and_mend(tmp_path, lines, keys, message):
    assert message in fault(write(tmp_path / "own.jsonl", lines), **keys)


def test_bytes_that_are_not_utf8_are_placed(tmp_path):
    path = write(tmp_path / "own.jsonl", rows(3))
    path.write_bytes(path.read_bytes() + b'{"question": "caf\xe9", "answer": 1}\n')
    assert "own.jsonl:4: not UTF-8" in fault(path)


def test_a_path_that_is_not_there_or_holds_nothing(tmp_path):
    assert "no such file or folder (problems.path)" in fault(tmp_path / "none.jsonl")
    assert "no train.jsonl, calibrate.jsonl, validation.jsonl or test.jsonl in it" in fault(tmp_path)
    assert "cannot be read as a data set: " in fault(tmp_path, format="datasets")


def test_a_gzipped_file_an_array_and_dev_are_read_and_parquet_is_named(tmp_path):
    lines = [{**row, "split": "dev" if i < 3 else "train"} for i, row in enumerate(rows(12))]
    path = tmp_path / "own.json.gz"
    path.write_bytes(gzip.compress(json.dumps(lines, indent=1).encode()))
    problems, _ = read(path)
    assert [p.answer for p in problems[Split.VALIDATION]] == ["1", "2", "3"]
    assert sum(map(len, problems.values())) == 12
    path.write_bytes(b"PAR1\xff\xfe")
    assert fault(path).endswith("own.json.gz: a parquet file; set problems.format=datasets")


def test_a_number_stays_as_it_is_written(tmp_path):
    lines = [f'{{"question": "{i}?", "answer": {gold}}}' for i, gold in enumerate(["1e-7", "0.10", "5", "-2.50"])]
    problems, _ = read(write(tmp_path / "own.jsonl", lines))
    assert sorted(p.answer for found in problems.values() for p in found) == ["-2.50", "0.10", "1e-7", "5"]


def test_any_answer_of_a_list_is_right(tmp_path):
    lines = [{"question": f"{i}?", "answer": ["a half", "0.5"], "split": "test"} for i in range(2)] + rows(8)
    problems, _ = read(write(tmp_path / "own.jsonl", lines))
    [problem, _] = problems[Split.TEST]
    assert (problem.answer, problem.also) == ("a half", ("0.5",))
    with Grader(ProblemSpec(path="unused")) as grader:
        solutions = [Solution(a, problem.id, (), Finish.STOP, a, "t", "t", "s") for a in ("0.50", "A half", "5")]
        grades = grader.verdicts([(problem, solution) for solution in solutions])
    assert [grade.correct for grade in grades] == [True, True, False]


def test_an_exact_duplicate_is_dropped_with_a_word(tmp_path):
    problems, notes = read(write(tmp_path / "own.jsonl", [*rows(8), *rows(2)]))
    assert sum(map(len, problems.values())) == 8
    assert notes[0].startswith("2 duplicate questions dropped, the first at ") and notes[0].endswith("own.jsonl:9")


def test_a_row_in_the_file_of_another_split_is_a_fault(tmp_path):
    write(tmp_path / "train.jsonl", rows(4, split="test"))
    assert "train.jsonl:1: split test in the file of split train" in fault(tmp_path)


def test_near_duplicates_across_splits_are_reported_and_kept(tmp_path):
    text = "A shop sells pens at 3 dollars each and Ann buys 12 of them today"  # 15 words, 8 runs of 8
    rows = [
        {"question": text, "answer": "36", "split": "train"},
        {"question": f"{text.upper()} ?!", "answer": "36", "split": "test"},
    ]
    rows += [
        {"question": text.replace("Ann", "Tom"), "answer": "36", "split": "test"}
    ]  # two runs of eight are the same
    rows += [
        {"question": f"{i} + {i}", "answer": str(2 * i), "split": split}
        for i, split in enumerate(["train", "calibrate", "validation", "test"])
    ]
    rows += [
        {"question": "Ann buys twelve pens", "answer": "12", "split": "test"},
        {"question": "Ann buys twelve pens !", "answer": "12", "split": "train"},
    ]
    problems, notes = read(write(tmp_path / "own.jsonl", rows))
    assert len(problems[Split.TEST]) == 4
    [note] = notes
    assert note == (
        "1 of 4 test questions share at least 50% of their runs of 8 words with a question of another split, "
        f"{problems[Split.TEST][0].id} the most: 100% with {problems[Split.TRAIN][0].id}; all are kept"
    )
