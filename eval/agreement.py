"""Our grader beside math-verify and the publishers' verdicts: python -m eval.agreement DATA [--show]

DATA holds `triples/math_verify_tests.jsonl`, `triples/math_cot_100.jsonl` and
`gsm8k/example_model_solutions.jsonl`. Prints a line a set: pairs, and how often our grader and
plain math-verify agree with the publisher; then every disagreement by its class:

- both: math-verify says what we say; the publisher's verdict is its own policy, or a slip;
- better, worse: math-verify is wrong where we are right, or the other way about;
- undecided: no verdict within the limits.
"""

from __future__ import annotations

import argparse
import json
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


def plain(pairs: list[Pair]) -> list[bool]:
    from math_verify import parse, verify

    say = lambda gold, answer: (
        answer is not None
        and bool(verify(parse(gold, parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None))
    )
    return [say(gold, answer) for gold, answer, _ in pairs]


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
    print(
        "| set | pairs | ours agrees | math-verify agrees | both differ | better | worse | undecided |\n|---|---|---|---|---|---|---|---|"
    )
    shown = []
    for name, pairs in found.items():
        mine, theirs = ours(pairs, args.seconds), plain(pairs)
        classes: Counter[str] = Counter()
        for (gold, answer, truth), verdict, other in zip(pairs, mine, theirs):
            right = verdict is Verdict.CORRECT
            if verdict is Verdict.UNDECIDED:
                kind = "undecided"
            elif right == truth:
                kind = "agrees" if other == truth else "better"
            else:
                kind = "both" if other == right else "worse"
            classes[kind] += 1
            if kind != "agrees":
                shown.append(f"{name} {kind}: gold {gold!r:.80} answer {answer!r:.80} publisher {truth}")
        agree = classes["agrees"] + classes["better"]
        other = sum(t == truth for t, (_, _, truth) in zip(theirs, pairs))
        print(
            f"| {name} | {len(pairs):,} | {agree:,} | {other:,} | {classes['both']} | {classes['better']} | {classes['worse']} | {classes['undecided']} |"
        )
    if args.show:
        print("\n".join(["", *shown]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
