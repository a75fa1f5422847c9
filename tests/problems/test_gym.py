"""Claims about the problems of reasoning-gym: their sizes, seeds, and who judges them."""

import json
import re
import sys
from importlib import metadata
from importlib.util import find_spec

import pytest

from flywheel.errors import UserError
from flywheel.problems import gym
from flywheel.problems.grading import Grader, load_function
from flywheel.problems.pool import CheckerPool
from flywheel.problems.sources import load
from flywheel.recipe import ProblemSpec
from flywheel.records import Finish, Solution, Split, Verdict

SUM = {
    "task": "chain_sum",
    "name": "sum2",
    "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}
SIZES = {"train": 12, "calibrate": 5, "validation": 3, "test": 7}
needs_package = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is missing")


def spec(*tasks: dict, **keys) -> ProblemSpec:
    return ProblemSpec.model_validate({"format": "reasoning_gym", "tasks": list(tasks), **keys})


def answered(problem, answer: str) -> Solution:
    return Solution(f"{problem.id}-{answer}", problem.id, (), Finish.STOP, answer, "test", "test", "s")


@needs_package
def test_sizes_are_exact_and_no_question_is_in_two_splits():
    """Sums of two single digits: 162 questions, so that seeds draw many a question twice."""
    recipe = spec({**SUM, **SIZES}, {"task": "gcd", "train": 2, "test": 2})
    problems = load(recipe)
    sizes = {split: len([p for p in found if p.level == "sum2"]) for split, found in problems.items()}
    assert sizes == {Split(name): size for name, size in SIZES.items()}
    assert [len([p for p in problems[Split(name)] if p.level == "gcd"]) for name in SIZES] == [2, 0, 0, 2]
    texts = [p.question.text for found in problems.values() for p in found]
    assert len(set(texts)) == len(texts) == 31
    assert load(recipe) == problems
    more = load(spec({**SUM, **SIZES, "train": 30}, {"task": "gcd", "train": 2, "test": 2}))
    assert more[Split.TEST] == problems[Split.TEST]  # more training questions move no test question
    others = load(spec({**SUM, **SIZES}, seed=1))
    assert {p.question.text for p in others[Split.TEST]} != {p.question.text for p in problems[Split.TEST]}


@needs_package
def test_a_limit_keeps_some_questions_of_each_task():
    tasks = {**SUM, **SIZES}, {"task": "gcd", **SIZES, "train": 4}
    whole, limited = load(spec(*tasks))[Split.TRAIN], load(spec(*tasks, limits={"train": 8}))[Split.TRAIN]
    assert [problem.level for problem in limited] == ["sum2"] * 6 + ["gcd"] * 2 and set(limited) < set(whole)


def test_its_checker_is_no_other_formats():
    own = {"format": "jsonl", "path": "mine.jsonl"}
    assert ProblemSpec(**own, checker="flywheel.problems.gym:right") == ProblemSpec(**own)
    assert ProblemSpec(**own, checker="mine:right").checker == "mine:right"


@needs_package
def test_a_pattern_cuts_the_bare_question_out():
    [problem, *_] = load(spec({**SUM, **SIZES, "question": ": (.*)"}))[Split.TEST]
    assert re.fullmatch(r"-?\d [-+] \d =", problem.question.text)
    assert "State the final answer" in json.loads(problem.answer)["entry"]["question"]  # the scorer's is whole
    assert int(gym.plain(problem.answer)) == eval(problem.question.text.removesuffix("="))


@needs_package
def test_the_tasks_own_scorer_judges_in_a_worker():
    tasks = [
        {"task": "chain_sum", **SIZES},
        {"task": "countdown", "test": 2},  # many expressions are right, none the one that it stores
        {"task": "decimal_arithmetic", "config": {"max_num_decimal_places": 3}, "test": 2},  # its scorer reads a knob
    ]
    problems = load(spec(*tasks))[Split.TEST]
    by_level = {problem.level: problem for problem in problems}
    sum_, countdown = by_level["chain_sum"], by_level["countdown"]
    right = {p.id: json.loads(p.answer)["entry"]["answer"] for p in problems}
    other = f"({right[countdown.id]})"
    wrong = str(int(right[sum_.id]) + 1)
    with Grader(spec(*tasks, check_seconds=5.0)) as grader:
        assert all(grade.correct for grade in grader.verdicts([(p, answered(p, right[p.id])) for p in problems]))
        grades = grader.verdicts([(countdown, answered(countdown, other)), (sum_, answered(sum_, wrong))])
        assert [grade.verdict for grade in grades] == [Verdict.CORRECT, Verdict.INCORRECT]
        assert grader.counts["undecided"] == 0


@needs_package
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({**SUM, "train": 300}, "problems.tasks sum2: only "),
        ({**SUM, "question": "(no such text)"}, "problems.tasks sum2: its question pattern does not match 'State"),
        ({"task": "chain_sun"}, "problems.tasks chain_sun: Dataset 'chain_sun' not registered"),
        ({"task": "chain_sum", "config": {"min_term": 1}}, "problems.tasks chain_sum with .*: .*'min_term'"),
        ({"task": "chain_sum", "config": {"min_terms": 0}}, "problems.tasks chain_sum with .*: min_terms must be p"),
        ({"task": "rearc"}, "problems.tasks rearc: its scorer refuses the task's own answer once the entry is JSON"),
    ],
)
def test_a_task_that_cannot_be_drawn_is_one_line(task, message):
    with pytest.raises(UserError, match=message) as error:
        load(spec({**SIZES, **task}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "problems.tasks: missing"),
        ([{**SUM, **SIZES}, {**SUM, **SIZES}], "two are called sum2"),
        ([{**SUM, "train": 3, "test": 3}], "no task has calibrate questions"),
        ([{**SUM, **SIZES, "question": ".*"}], "a regular expression with one group wanted"),
        ([{**SUM, **SIZES, "question": "(.*"}], "no regular expression"),
    ],
)
def test_a_faulty_list_of_tasks_is_a_fault_of_the_recipe(tasks, message):
    with pytest.raises(ValueError, match=message):
        spec(*tasks)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    gym._dataset.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setattr(metadata, "version", missing)
    for call in (lambda: load(spec({**SUM, **SIZES})), gym.version):
        with pytest.raises(UserError, match=r"install it: pip install 'flywheel\[reasoning-gym\]'"):
            call()


def test_a_checkers_warm_up_runs_before_the_fork_and_outside_the_time_limit(tmp_path, monkeypatch):
    (tmp_path / "slow_to_start.py").write_text(
        "import os, time\nready = []\n"
        "def warm_up():\n    time.sleep(1.5)\n    ready.append(os.getpid())\n"
        "def check(gold, answer):\n    return ready == [os.getppid()]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    load_function("slow_to_start:check")
    pool = CheckerPool("slow_to_start:check", 1, 1)
    try:
        assert list(pool.check([("a", "a")])) == [(True, "")]
    finally:
        pool.close()
