"""Verdicts a second: the gate of flywheel.problems.grading beside math-verify called directly.

    python -m eval.bench_grading SOLUTIONS.jsonl

reads rows with `gold` and `answer` (see --fields), or makes a mixture of its own without a file,
and prints both rates, their ratio and on how many answers the two disagree.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

from flywheel.problems.grading import Grader
from flywheel.recipe import ProblemSpec
from flywheel.records import Finish, Problem, Question, Solution, Split

SHAPES = ("{n}", "{n}", "{n}", "1,0{n}", "{n}.0", "\\frac{{{n}}}{{7}}", "\\sqrt{{{n}}}", "({n}, 3)", "x + {n}")


def mixture(count: int, seed: int) -> list[tuple[str, str]]:
    """(gold, answer) as a small model gives them: mostly numbers, half of them wrong, answers repeated."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count // 16):
        shape = rng.choice(SHAPES)
        gold = shape.format(n=rng.randrange(10, 99))
        wrong = [shape.format(n=rng.randrange(10, 99)) for _ in range(4)]
        pairs += [(gold, gold if rng.random() < 0.5 else rng.choice(wrong)) for _ in range(16)]
    return pairs


def read(path: Path, gold: str, answer: str) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [
        (str(row[gold]), str(item))
        for row in rows
        for item in (row[answer] if isinstance(row[answer], list) else [row[answer]])
    ]


def ungated(pairs: list[tuple[str, str]]) -> list[bool]:
    from math_verify import parse, verify

    return [
        verify(
            parse(f"${gold}$", parsing_timeout=None), parse(f"${answer}$", parsing_timeout=None), timeout_seconds=None
        )
        for gold, answer in pairs
    ]


def gated(pairs: list[tuple[str, str]], workers: int) -> tuple[list[bool], float, dict[str, int]]:
    items = [
        (Problem(Question("q", "?"), gold, Split.TRAIN), Solution(str(i), "q", (), Finish.STOP, answer, "bench"))
        for i, (gold, answer) in enumerate(pairs)
    ]
    with Grader(ProblemSpec(path="bench", check_workers=workers)) as grader:
        started = [
            (item[0], replace(item[1], answer=f"\\frac{{1}}{{{n}}}")) for n, item in enumerate(items[: 4 * workers], 2)
        ]
        grader.verdicts(started)  # the workers' start, a second once, is not on the clock
        grader.counts.clear()
        begun = time.perf_counter()
        return [grade.correct for grade in grader.verdicts(items)], time.perf_counter() - begun, dict(grader.counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--fields", nargs=2, default=("gold", "answer"), metavar=("GOLD", "ANSWER"))
    parser.add_argument("--count", type=int, default=4800, help="pairs to make when there is no file")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    pairs = read(args.file, *args.fields) if args.file else mixture(args.count, seed=0)
    ungated(pairs[:8])  # imports and parser tables are not on the clock
    begun = time.perf_counter()
    plain = ungated(pairs)
    alone = time.perf_counter() - begun
    ours, seconds, counts = gated(pairs, args.workers)
    rates = len(pairs) / alone, len(pairs) / seconds
    print(f"{len(pairs)} answers, distinct ones decided: {counts}")
    print(
        f"math-verify alone {rates[0]:,.0f}/s; gated {rates[1]:,.0f}/s; ratio {rates[1] / rates[0]:.1f}; disagreements {sum(map(bool.__ne__, plain, ours))}"
    )


if __name__ == "__main__":
    main()
