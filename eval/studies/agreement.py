"""Does our grader agree with publishers' verdicts, and math-verify alone with ours?

DATA holds `triples/math_verify_tests.jsonl`, `triples/math_cot_100.jsonl` and `gsm8k/example_model_solutions.jsonl`.
By set: pairs, and how often our grader and plain math-verify agree with the publisher; then every disagreement by its
class:

- both: math-verify says what we say; the publisher's verdict is its own policy, or a slip;
- better, worse: math-verify is wrong where we are right, or the other way about;
- undecided: no verdict within the limits.

`rules`: by the rule of `problems/equal.py` that gave the verdict, [pairs, of these against the publisher, of these
against math-verify alone].
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from flywheel.errors import UserError
from flywheel.problems.extract import last_boxed
from flywheel.problems.grading import Grader
from flywheel.recipe import ProblemSpec
from flywheel.records import Finish, Problem, Question, Solution, Split, Step, Verdict

Pair = tuple[str, str | None, bool]  # gold, answer, the publisher's verdict
CLASSES = ("agrees", "both", "better", "worse", "undecided")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--seconds", type=float, default=30, help="limit of a check (%(default)s)")
    parser.add_argument("--show", action="store_true", help="every disagreement")


def lines(path: Path) -> Iterator[dict]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def sets(data: Path) -> dict[str, list[Pair]]:
    """Name -> pairs of each published set. Raises UserError if a file is missing."""
    gsm8k = []
    for row in lines(data / "gsm8k/example_model_solutions.jsonl"):
        gold = row["ground_truth"].rpartition("A:")[2].strip()
        for model in row.values():
            if isinstance(model, dict):
                found = re.findall(r"A: *(.*)", model["solution"])
                gsm8k.append((gold, found[-1] if found else None, model["is_correct"]))
    cot = [
        (row["gt"], last_boxed(text), bool(score))
        for row in lines(data / "triples/math_cot_100.jsonl")
        for text, score in zip(row["code"], row["score"])
    ]
    tests = [(row["gold"], row["pred"], row["verdict"]) for row in lines(data / "triples/math_verify_tests.jsonl")]
    return {"math_verify_tests": tests, "math_cot_100": cot, "gsm8k_example_solutions": gsm8k}


def asked(gold: str, answer: str | None, name: str) -> tuple[Problem, Solution]:
    """A problem with this gold answer and a solution with this answer, as input for the grader."""
    step = Step(answer or "", ())
    solution = Solution(f"{name}/0", name, (step,), Finish.STOP, answer, "agreement", "publisher", f"{name}/0")
    return Problem(Question(name, name), gold, Split.TRAIN), solution


def ours(pairs: list[Pair], seconds: float) -> tuple[list[Verdict], list[str]]:
    """(verdicts, the rules that gave them)."""
    items = [asked(gold, answer, f"q{i}") for i, (gold, answer, _) in enumerate(pairs)]
    with Grader(ProblemSpec(path="", check_seconds=seconds, check_workers=2)) as grader:
        grades = grader.verdicts(items)
    rules = [grade.rule if answer else "no answer" for grade, (_, answer, _) in zip(grades, pairs)]
    return [grade.verdict for grade in grades], rules


def math_verify_alone(gold: str, answer: str | None) -> bool:
    from math_verify import parse, verify

    if answer is None:
        return False
    return bool(verify(parse(gold, parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None))


def kind_of(verdict: Verdict, other: bool, truth: bool) -> str:
    """The class of a pair from our verdict, math-verify's (`other`) and the publisher's (`truth`)."""
    if verdict is Verdict.UNDECIDED:
        return "undecided"
    right = verdict is Verdict.CORRECT
    if right == truth:
        return "agrees" if other == truth else "better"
    return "both" if other == right else "worse"


def measure(args: argparse.Namespace) -> dict:
    out: dict = {}
    for name, pairs in sets(args.data).items():
        theirs = [math_verify_alone(gold, answer) for gold, answer, _ in pairs]
        verdicts, rules = ours(pairs, args.seconds)
        kinds = [kind_of(v, other, truth) for v, other, (_, _, truth) in zip(verdicts, theirs, pairs)]
        by_rule: dict[str, list[int]] = {}
        for rule, verdict, other, (_, _, truth) in zip(rules, verdicts, theirs, pairs):
            right = verdict is Verdict.CORRECT
            counted = by_rule.setdefault(rule, [0, 0, 0])
            by_rule[rule] = [n + more for n, more in zip(counted, (1, right != truth, right != other))]
        counts = Counter(kinds)
        out[name] = {
            "pairs": len(pairs),
            "ours_agrees": counts["agrees"] + counts["better"],
            "math_verify_agrees": sum(other == truth for other, (_, _, truth) in zip(theirs, pairs)),
            **{kind: counts[kind] for kind in CLASSES},
            "rules": by_rule,
        }
        if args.show:
            out[name]["disagreements"] = [
                f"{kind}: gold {gold!r:.80} answer {answer!r:.80} publisher {truth}"
                for kind, (gold, answer, truth) in zip(kinds, pairs)
                if kind != "agrees"
            ]
    return out
