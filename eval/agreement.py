"""Our grader beside math-verify and the publishers' verdicts: python -m eval.agreement DATA [--show]

DATA holds `triples/math_verify_tests.jsonl`, `triples/math_cot_100.jsonl` and
`gsm8k/example_model_solutions.jsonl`. Prints a row for each set: its pairs, how often our grader and plain
math-verify agree with the publisher, and our disagreements by class:

- both: math-verify says what we say; the publisher has a rule of its own, or made a slip;
- better, worse: math-verify is wrong where we are right, or the other way round;
- undecided: no verdict within the limits.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from flywheel.problems.grading import Grader, last_boxed
from flywheel.recipe import ProblemSpec
from flywheel.records import Finish, Problem, Question, Solution, Split, Step, Verdict

Pair = tuple[str, str | None, bool]  # gold, answer, the publisher's verdict


def lines(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def sets(data: Path) -> dict[str, list[Pair]]:
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


def ours(pairs: list[Pair], seconds: float) -> list[Verdict]:
    asked = []
    for i, (gold, answer, _) in enumerate(pairs):
        problem = Problem(Question(f"q{i}", f"q{i}"), gold, Split.TRAIN)
        asked.append((problem, Solution(f"q{i}/0", f"q{i}", (Step(answer or "", ()),), Finish.STOP, answer, "")))
    with Grader(ProblemSpec(path="", check_seconds=seconds, check_workers=2)) as grader:
        return [grade.verdict for grade in grader.verdicts(asked)]


def plain(gold: str, answer: str | None) -> bool:
    """The verdict of math-verify alone."""
    from math_verify import parse, verify

    if answer is None:
        return False
    return bool(verify(*(parse(text, parsing_timeout=None) for text in (gold, answer)), timeout_seconds=None))


def disagreement(ours: Verdict, other: bool, truth: bool) -> str:
    """The class of a pair by our verdict, math-verify's (`other`) and the publisher's (`truth`)."""
    if ours is Verdict.UNDECIDED:
        return "undecided"
    right = ours is Verdict.CORRECT
    if right == truth:
        return "agrees" if other == truth else "better"
    return "both" if other == right else "worse"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.agreement", description=__doc__.split("\n\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--show", action="store_true", help="every disagreement")
    args = parser.parse_args()
    try:
        found = sets(args.data)
    except FileNotFoundError as error:
        print(f"{error.filename}: no such file", file=sys.stderr)
        return 1
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    columns = ["set", "pairs", "ours agrees", "math-verify agrees", "both differ", "better", "worse", "undecided"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    shown = []
    for name, pairs in found.items():
        classes: Counter[str] = Counter()
        agrees = 0
        for (gold, answer, truth), verdict in zip(pairs, ours(pairs, args.seconds)):
            other = plain(gold, answer)
            agrees += other == truth
            kind = disagreement(verdict, other, truth)
            classes[kind] += 1
            if kind != "agrees":
                shown.append(f"{name} {kind}: gold {gold!r:.80} answer {answer!r:.80} publisher {truth}")
        figures = [len(pairs), classes["agrees"] + classes["better"], agrees]
        figures += [classes[kind] for kind in ("both", "better", "worse", "undecided")]
        print(f"| {name} | {' | '.join(f'{figure:,}' for figure in figures)} |")
    if args.show:
        print("\n".join(["", *shown]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
