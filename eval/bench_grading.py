"""Verdicts a second: `Grader` beside math-verify called directly.

    python -m eval.bench_grading SOLUTIONS.jsonl

reads rows with `gold` and `answer` (see --fields), or makes pairs of its own without a file. Prints both rates,
their ratio and on how many pairs the two disagree.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from pathlib import Path

from flywheel.problems.grading import Grader
from flywheel.recipe import ProblemSpec
from flywheel.records import Finish, Problem, Question, Solution, Split

SHAPES = ("{n}", "{n}", "{n}", "1,0{n}", "{n}.0", "\\frac{{{n}}}{{7}}", "\\sqrt{{{n}}}", "({n}, 3)", "x + {n}")


def mixture(count: int, seed: int) -> list[tuple[str, str]]:
    """(gold, answer) pairs as a small model makes them: mostly numbers, half of them wrong, many repeated."""
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


def directly(pairs: list[tuple[str, str]]) -> list[bool]:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    parsed = ([parse(f"${text}$", parsing_timeout=None) for text in pair] for pair in pairs)
    return [verify(*pair, timeout_seconds=None) for pair in parsed]


def graded(pairs: list[tuple[str, str]], workers: int) -> tuple[list[bool], float, dict[str, int]]:
    """The verdicts of `Grader`, the seconds that they took, and its counts."""

    def asked(name: str, gold: str, answer: str) -> tuple[Problem, Solution]:
        return Problem(Question("q", "?"), gold, Split.TRAIN), Solution(name, "q", (), Finish.STOP, answer, "bench")

    with Grader(ProblemSpec(path="bench", check_workers=workers)) as grader:
        # The start of the workers, once a second, is not measured.
        grader.verdicts([asked("warm", "7", f"\\frac{{1}}{{{n}}}") for n in range(2, 2 + 4 * workers)])
        grader.counts.clear()
        items = [asked(str(i), *pair) for i, pair in enumerate(pairs)]
        begun = time.perf_counter()
        verdicts = [grade.correct for grade in grader.verdicts(items)]
        return verdicts, time.perf_counter() - begun, dict(grader.counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--fields", nargs=2, default=("gold", "answer"), metavar=("GOLD", "ANSWER"))
    parser.add_argument("--count", type=int, default=4800, help="pairs to make when there is no file")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    pairs = read(args.file, *args.fields) if args.file else mixture(args.count, seed=0)
    directly(pairs[:8])  # imports and parser tables are not measured
    begun = time.perf_counter()
    plain = directly(pairs)
    alone = len(pairs) / (time.perf_counter() - begun)
    ours, seconds, counts = graded(pairs, args.workers)
    rate, different = len(pairs) / seconds, sum(map(bool.__ne__, plain, ours))
    print(f"{len(pairs)} answers; distinct pairs decided: {counts}")
    print(f"math-verify alone {alone:,.0f}/s; Grader {rate:,.0f}/s; ratio {rate / alone:.1f}; disagree on {different}")


if __name__ == "__main__":
    main()
