"""Grade hostile answers: python tests/chaos/hostile.py [--answers 10000] [--seconds 1] [--workers 2]

Answers as a model under attack (or a broken one) writes them, all distinct: deep nesting, towers of exponents, factorials,
unbalanced and unicode LaTeX, texts of a million characters, Python that would leave a file behind, null bytes, control
characters. Prints a row a kind: verdicts, undecided ones, the longest wait; exits with 1 if any took longer than its
limit, left a file, was graded right, or ended the grader.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from flywheel.problems.grading import Grader
from flywheel.recipe import ProblemSpec
from flywheel.records import Finish, Problem, Question, Solution, Split, Step, Verdict

GOLD = ["42", "\\frac{1}{2}", "x^2+1", "(1, 2)"]
SLACK = 1.0  # seconds beyond the limit, for a busy machine


def kinds(canary: Path) -> dict[str, Callable[[random.Random], str]]:
    code = [
        "__import__('os').system('touch {c}')",
        "exec(\"open('{c}','w')\")",
        "eval(compile('open(\"{c}\",\"w\")','','exec'))",
        "().__class__.__base__.__subclasses__()[{n}]('touch {c}')",
        "$__import__('pathlib').Path('{c}').touch()$",
        "\\input{{/etc/passwd}} \\write18{{touch {c}}}",
        "lambda: open('{c}','w').write('x')",
        "Integer(open('{c}','w').write('1'))",
    ]

    def nest(r: random.Random) -> str:
        opening, closing = r.choice(
            [
                ("(", ")"),
                ("\\frac{1}{", "}"),
                ("\\sqrt{", "}"),
                ("{", "}"),
                ("\\left(", "\\right)"),
                ("-", ""),
                ("[", "]"),
            ]
        )
        depth = r.randrange(20, 3000)
        return opening * depth + "1" + closing * depth

    def soup(r: random.Random) -> str:
        return "".join(
            r.choice(
                [
                    "\\frac",
                    "{",
                    "}",
                    "^",
                    "_",
                    "\\left(",
                    "\\right]",
                    "\\begin{pmatrix}",
                    "&",
                    "\\\\",
                    "$",
                    "1",
                    "x",
                    "\\int_0^",
                    "\\sum",
                    "|",
                    "√",
                    "²",
                    "∞",
                    "\u202e",
                    "𝟙",
                ]
            )
            for _ in range(r.randrange(3, 60))
        )

    return {
        "nesting": nest,
        "exponents": lambda r: "^".join(f"{{{r.randrange(2, 99999)}" for _ in range(r.randrange(3, 9))) + "}" * 3,
        "plain towers": lambda r: "**".join(str(r.randrange(5, 9999)) for _ in range(r.randrange(3, 7))),
        "factorials": lambda r: f"{r.randrange(10**5, 10**12)}" + "!" * r.randrange(1, 6),
        "big integers": lambda r: r.choice("123456789") + "".join(r.choices("0123456789", k=r.randrange(900, 19000))),
        "unbalanced": soup,
        "a million characters": lambda r: (
            r.choice(["1", "9+", "x", "\\frac", "({", "é"]) * (10**6 // r.randrange(1, 4)) + str(r.random())
        ),
        "code": lambda r: (
            r.choice(code).format(c=canary, n=r.randrange(500)) + " " * r.randrange(3) + str(r.randrange(10**6))
        ),
        "null bytes": lambda r: (
            "".join(r.choice("42\0\x01\x1b[2J\r\n\t\x7f") for _ in range(r.randrange(3, 80))) + str(r.randrange(10**6))
        ),
        "sets": lambda r: (
            "\\{" + ",".join(f"{r.randrange(99)}^{r.randrange(999)}" for _ in range(r.randrange(5, 400))) + "\\}"
        ),
        "sums": lambda r: (
            "\\sum_{k=1}^{" + str(10 ** r.randrange(4, 14)) + "} \\binom{k}{" + str(r.randrange(2, 99)) + "}"
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--answers", type=int, default=10000)
    parser.add_argument("--seconds", type=float, default=1.0, help="problems.check_seconds")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, faults = random.Random(args.seed), []
    verdicts: dict[str, Counter[str]] = defaultdict(Counter)
    longest: Counter[str] = Counter()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        canary = Path(scratch, "canary")
        made = kinds(canary)
        spec = ProblemSpec(path="none", check_seconds=args.seconds, check_workers=args.workers)
        seen: set[str] = set()
        with Grader(spec) as grader:
            warm = [
                (
                    Problem(Question(f"w{i}", "?"), "x^2+1", Split.TRAIN),
                    Solution(f"w{i}/0", f"w{i}", (), Finish.STOP, f"1+x^2+y^{i}", "warm"),
                )
                for i in range(4 * args.workers)
            ]
            grader.verdicts(warm)  # the workers have started
            for start in range(
                0, args.answers, args.workers
            ):  # a worker an answer: what a batch takes, its slowest answer took
                kind, pairs = list(made)[start // args.workers % len(made)], []
                for i in range(start, min(start + args.workers, args.answers)):
                    while (answer := made[kind](rng)) in seen:
                        continue
                    seen.add(answer if len(answer) < 10**5 else str(hash(answer)))
                    problem = Problem(Question(f"q{i}", "?"), GOLD[i % len(GOLD)], Split.TRAIN)
                    pairs.append(
                        (problem, Solution(f"q{i}/0", f"q{i}", (Step(answer, (1,)),), Finish.STOP, answer, "hostile"))
                    )
                begun = time.monotonic()
                grades = grader.verdicts(pairs)
                longest[kind] = max(longest[kind], time.monotonic() - begun)
                for (problem, solution), grade in zip(pairs, grades):
                    verdicts[kind][str(grade.verdict)] += 1
                    if grade.verdict is Verdict.CORRECT:
                        faults.append(f"graded right: gold {problem.answer}, answer {solution.answer[:80]!r}")
                if canary.exists():
                    faults.append(f"ran: {[s.answer[:120] for _, s in pairs]}")
                    canary.unlink()
    print(f"{'kind':22s} {'answers':>8s} {'wrong':>8s} {'undecided':>10s} {'longest, s':>11s}")
    for kind, counts in verdicts.items():
        print(
            f"{kind:22s} {sum(counts.values()):8d} {counts['incorrect']:8d} {counts['undecided']:10d} {longest[kind]:11.2f}"
        )
        if longest[kind] > args.seconds + SLACK:
            faults.append(f"{kind}: one took {longest[kind]:.1f} s, with a limit of {args.seconds}")
    print(f"{args.answers} distinct answers in {time.monotonic() - started:.0f} s", *faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
