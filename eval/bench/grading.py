"""Verdicts a second: the grader with its gate beside math-verify called directly.

    python -m eval.bench.grading SOLUTIONS.jsonl

reads rows with `gold` and `answer` (see --fields), or makes a mixture of its own without a file. Prints JSON: both
rates, their ratio, and on how many answers the two disagree.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

from eval.studies.agreement import asked, math_verify_alone
from flywheel.problems.grading import Grader
from flywheel.recipe import ProblemSpec

SHAPES = ("{n}", "{n}", "{n}", "1,0{n}", "{n}.0", "\\frac{{{n}}}{{7}}", "\\sqrt{{{n}}}", "({n}, 3)", "x + {n}")
Pairs = list[tuple[str, str]]  # gold, answer


def mixture(count: int, seed: int) -> Pairs:
    """Answers like those of a small model: mostly numbers, about half wrong, many repeated."""
    rng, pairs = random.Random(seed), []
    for _ in range(count // 16):
        shape = rng.choice(SHAPES)
        gold = shape.format(n=rng.randrange(10, 99))
        wrong = [shape.format(n=rng.randrange(10, 99)) for _ in range(4)]
        pairs += [(gold, gold if rng.random() < 0.5 else rng.choice(wrong)) for _ in range(16)]
    return pairs


def read(path: Path, gold: str, answer: str) -> Pairs:
    """The pairs in a JSONL file; `gold` and `answer` name its fields. The answer field may hold a list."""
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            row = json.loads(line)
            answers = row[answer] if isinstance(row[answer], list) else [row[answer]]
            pairs += [(str(row[gold]), str(item)) for item in answers]
    return pairs


def gated(pairs: Pairs, workers: int) -> tuple[list[bool], float, dict[str, int]]:
    """(verdicts, seconds, number of distinct answers by the part of the grader that decided)."""
    items = [asked(gold, answer, f"q{i}") for i, (gold, answer) in enumerate(pairs)]
    warm_up = [asked(gold, f"\\frac{{1}}{{{n}}}", f"w{n}") for n, (gold, _) in enumerate(pairs[: 4 * workers], 2)]
    with Grader(ProblemSpec(path="bench", check_workers=workers)) as grader:
        grader.verdicts(warm_up)  # do not time the start of the workers
        grader.counts.clear()
        begun = time.perf_counter()
        verdicts = [grade.correct for grade in grader.verdicts(items)]
        return verdicts, time.perf_counter() - begun, dict(grader.counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--fields", nargs=2, default=("gold", "answer"), metavar=("GOLD", "ANSWER"))
    parser.add_argument("--count", type=int, default=4800, help="pairs to make when there is no file (%(default)s)")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    pairs = read(args.file, *args.fields) if args.file else mixture(args.count, seed=0)
    marked = [(f"${gold}$", f"${answer}$") for gold, answer in pairs]  # math-verify needs `$` around LaTeX
    for pair in marked[:8]:
        math_verify_alone(*pair)  # do not time imports and parser tables
    begun = time.perf_counter()
    theirs = [math_verify_alone(*pair) for pair in marked]
    alone = len(pairs) / (time.perf_counter() - begun)
    ours, seconds, counts = gated(pairs, args.workers)
    found = {
        "answers": len(pairs),
        "distinct_answers_decided_by": counts,
        "math_verify_alone_per_second": alone,
        "grader_per_second": len(pairs) / seconds,
        "ratio": len(pairs) / seconds / alone,
        "disagreements": sum(a != b for a, b in zip(ours, theirs)),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
