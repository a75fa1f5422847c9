"""Claims about comparing answers, and about checkers that hang, die or do not exist."""

import json
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from flywheel.errors import UserError
from flywheel.problems.extract import last_boxed
from flywheel.problems.grading import Grader, answer_key, load_function, same_answer
from flywheel.recipe import ProblemSpec
from flywheel.records import Finish, Problem, Question, Solution, Split, Verdict

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real problem sets is not here")


def lines_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def spec(**keys) -> ProblemSpec:
    return ProblemSpec(path="unused", **keys)


def pair(gold: str, answer: str | None, finish: Finish = Finish.STOP) -> tuple[Problem, Solution]:
    solution = Solution(f"s-{answer}"[:20], "q", (), finish, answer, "test", "test", "s")
    return Problem(Question("q", "?"), gold, Split.TRAIN), solution


def verdict(grader: Grader, gold: str, answer: str | None, finish: Finish = Finish.STOP) -> Verdict:
    return grader.verdicts([pair(gold, answer, finish)])[0].verdict


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("1080", "1,080", True),
        ("1,080", "$1080.00$", True),
        ("18", "\\$18.", True),
        ("18", " \\boxed{18} ", True),
        ("18", "+18", True),
        ("0.5", ".50", True),
        ("-0", "0", True),
        ("0.333333", "0.33333331", True),
        ("1080", "10,80", False),
        ("12", "1.2", False),
        ("12", "-12", False),
        ("5", "", False),
        ("", "", False),
        ("7" * 3000, "7" * 3000, True),
        ("x", "y" * 1_000_000, False),
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac{1}{2}", "\\dfrac12", True),
        ("(1,2)", "( 1, 2 )", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("\\text{Even}", "Even", True),
        ("20\\%", "20", True),
        ("0.111", "0,111", True),
        ("x+1", "x+2", False),
    ],
)
def test_equal_answers_are_equal_however_they_are_written(gold, answer, same):
    assert same_answer(gold, answer) is same


def test_the_key_groups_what_selection_should_count_together():
    groups = [
        ["1080", "$1,080$", "\\boxed{1080}", " 1080.0", "+1080."],
        ["Even", "even"],
        ["(1, 2)", "( 1,2 )"],
        ["1/2", "0.5", ".50", "\\dfrac12"],
        ["1 2"],
        ["12"],
    ]
    keys = [{answer_key(answer) for answer in group} for group in groups]
    assert all(len(group) == 1 for group in keys)
    assert len(set.union(*keys)) == len(groups)


def test_plain_numbers_are_decided_both_ways_without_a_worker():
    with Grader(spec()) as grader:
        assert verdict(grader, "10", "10") is Verdict.CORRECT
        assert verdict(grader, "10", "11") is Verdict.INCORRECT
        assert verdict(grader, "1,080", "1081") is Verdict.INCORRECT
        assert verdict(grader, "10", None) is Verdict.UNPARSABLE
        assert verdict(grader, "10", None, Finish.LENGTH) is Verdict.TRUNCATED
        assert grader.pool.workers[0].process is None
        assert grader.counts == Counter(plain=3, checked=0, undecided=0)


def test_a_grade_names_the_rule_by_which_it_fell():
    with Grader(spec()) as grader:
        found = {answer: grader.verdicts([pair("1,2", answer)])[0] for answer in ("1,2", "2, 1", "1, 3", "word")}
        problem, solution = pair("10", "12.0")
        [other] = grader.verdicts([(replace(problem, also=("12",)), solution)])  # by the gold that it equals
    assert [(grade.verdict, grade.rule) for grade in (*found.values(), other)] == [
        (Verdict.CORRECT, "exact"),
        (Verdict.CORRECT, "list"),
        (Verdict.INCORRECT, "list"),
        (Verdict.INCORRECT, "words"),
        (Verdict.CORRECT, "number"),
    ]


def test_grades_come_in_the_order_of_the_pairs_and_a_pair_is_checked_once():
    pairs = [pair("\\sqrt{8}", answer) for answer in ("2\\sqrt{2}", "\\sqrt{4}\\sqrt{2}", None, "2\\sqrt{2}", "3")]
    with Grader(spec(check_workers=2, check_seconds=30)) as grader:
        grades = grader.verdicts(pairs)
        assert [grade.verdict for grade in grades] == [
            Verdict.CORRECT,
            Verdict.CORRECT,
            Verdict.UNPARSABLE,
            Verdict.CORRECT,
            Verdict.INCORRECT,
        ]
        assert [grade.solution_id for grade in grades] == [solution.id for _, solution in pairs]
        assert grader.verdicts(pairs) == grades
        assert grader.counts == Counter(plain=0, checked=3, undecided=0)
        assert [grade.rule for grade in grades] == ["math-verify", "math-verify", "", "math-verify", "math-verify"]
    assert all(worker.process is None for worker in grader.pool.workers)


def test_a_solution_of_another_question_is_refused():
    _, solution = pair("1", "1")
    with Grader(spec()) as grader, pytest.raises(ValueError, match="answers q, not other"):
        grader.verdicts([(Problem(Question("other", "?"), "1", Split.TRAIN), solution)])


def test_a_checker_of_ones_own_sees_even_an_answer_equal_to_gold(tmp_path, monkeypatch):
    (tmp_path / "contrary_checker.py").write_text(
        "def check(gold, answer):\n    return {'a': False, 'b': None}[answer]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Grader(spec(checker="contrary_checker:check")) as grader:
        assert verdict(grader, "a", "a") is Verdict.INCORRECT
        assert verdict(grader, "b", "b") is Verdict.UNDECIDED
        assert grader.counts == Counter(plain=0, checked=1, undecided=1)


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "no_such_module_here:check",
        "flywheel.problems.grading:no_such_function",
        "flywheel.problems.grading:MAX_CHARS",
        ":check",
    ],
)
def test_a_checker_that_is_none_is_one_line_that_names_the_key(name):
    with pytest.raises(UserError) as error:
        Grader(spec(checker=name))
    assert str(error.value).startswith("problems.checker: ") and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^problems\.step_checker: "):
        load_function(name, "problems.step_checker")


def test_hostile_answers_neither_hang_nor_run(tmp_path):
    victim = tmp_path / "pwned"
    answers = [
        "10**10**10",
        "$10^{10^{10}}$",
        "7^{7^{7^{7}}}-1",
        "(" * 5000 + "1" + ")" * 5000,
        "{" * 1500,
        "\\frac{" * 600 + "1",
        f"__import__('os').system('touch {victim}')",
        f"$__import__('os').system('touch {victim}')$",
        "1\x00",
        "\x00",
        "4[4\n\r\n4[\t42\x1b4\x7f4234031",
        "\ud800",
        "9" * 1_000_000,
        "((" * 500_000,
        "\\boxed{" * 1000,
        "\\sum_{n=1}^{10^9} \\sin(n)",
        ".",
        "1/0",
    ]
    with Grader(spec(check_seconds=2)) as grader:
        assert verdict(grader, "42", "\\sqrt{1764}") is Verdict.CORRECT  # the worker is up
        for answer in answers:
            begun = time.monotonic()
            assert verdict(grader, "42", answer) in (Verdict.INCORRECT, Verdict.UNDECIDED), answer[:50]
            assert time.monotonic() - begun < 12, answer[:50]  # 2 s, and the start of another worker
        assert verdict(grader, "42", "\\sqrt{1764}+0") is Verdict.CORRECT
    assert not victim.exists()


@needs_data
def test_the_gate_agrees_with_its_references_as_often_as_math_verify_alone():
    from math_verify import parse, verify

    rows = lines_of("triples/math_verify_tests.jsonl")
    plain = [
        verify(*(parse(row[key], parsing_timeout=None) for key in ("gold", "pred")), timeout_seconds=None)
        for row in rows
    ]
    ours = [same_answer(row["gold"], row["pred"]) for row in rows]
    truth = [row["verdict"] for row in rows]
    assert sum(map(bool.__eq__, ours, truth)) >= sum(map(bool.__eq__, plain, truth)) >= 245


@needs_data
def test_the_published_verdicts_on_gsm8k_solutions_are_reproduced():
    checked = 0
    for row in lines_of("gsm8k/example_model_solutions.jsonl"):
        gold = row["ground_truth"].rpartition("A:")[2].strip()
        for model in row.values():
            if isinstance(model, dict):
                found = re.findall(r"A: *(.*)", model["solution"])
                assert (bool(found) and same_answer(gold, found[-1])) == model["is_correct"], (gold, found)
                checked += 1
    assert checked == 4 * 1319


@needs_data
def test_verdicts_on_sampled_math_solutions_agree_with_their_publisher():
    agree = total = 0
    pairs, scores = [], []
    for row in lines_of("triples/math_cot_100.jsonl"):
        pairs += [pair(row["gt"], last_boxed(text)) for text in row["code"]]
        scores += row["score"]
    with Grader(spec(check_seconds=30)) as grader:
        for grade, score in zip(grader.verdicts(pairs), scores, strict=True):
            agree += grade.correct == score
            total += 1
    assert total == 800 and agree >= 799  # the one: 10{,}000 is 10000
