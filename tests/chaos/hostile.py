"""Grade hostile answers: python tests/chaos/hostile.py [--answers 10000] [--seconds 1] [--workers 2]

Answers as a model under attack, or a broken one, writes them, all distinct: deep nesting, towers of exponents,
factorials, unbalanced and unicode LaTeX, texts of a million characters, Python that would leave a file behind,
null bytes, control characters; and programs that attack their tests or the machine (tests/hostile_programs.py), graded
by running them. Prints a row for each kind: verdicts and the longest wait. Exits with 1 if an
answer took longer than its limit, left a file, reached a listening port or was graded right.
"""

from __future__ import annotations

import argparse
import random
import socket
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import hostile_programs

from flywheel.problems.grading import Grader
from flywheel.recipe import ProblemSpec
from flywheel.records import Finish, Problem, Question, Solution, Split

GOLD = ["42", "\\frac{1}{2}", "x^2+1", "(1, 2)"]
SLACK = 1.0  # seconds beyond the limit, for a busy machine
KINDS = ["nesting", "exponents", "plain towers", "factorials", "big integers", "unbalanced", "a million characters"]
KINDS += ["code", "null bytes", "sets", "sums", "programs"]
PROGRAMS = hostile_programs.FORGERIES | hostile_programs.HARMS | hostile_programs.HANGS
TESTS = '{"test": "def check(candidate):\\n    assert candidate(2) == 3", "entry_point": "f"}'
BRACKETS = ["( )", "\\frac{1}{ }", "\\sqrt{ }", "{ }", "\\left( \\right)", "- ", "[ ]"]  # opening, closing
LATEX = ["\\frac", "{", "}", "^", "_", "\\left(", "\\right]", "\\begin{pmatrix}", "&", "\\\\", "$", "1", "x"]
LATEX += ["\\int_0^", "\\sum", "|", "√", "²", "∞", "\u202e", "𝟙"]
CODE = [
    "__import__('os').system('touch {c}')",
    "exec(\"open('{c}','w')\")",
    "eval(compile('open(\"{c}\",\"w\")','','exec'))",
    "().__class__.__base__.__subclasses__()[{n}]('touch {c}')",
    "$__import__('pathlib').Path('{c}').touch()$",
    "\\input{{/etc/passwd}} \\write18{{touch {c}}}",
    "lambda: open('{c}','w').write('x')",
    "Integer(open('{c}','w').write('1'))",
]


def hostile(kind: str, r: random.Random, canary: Path, port: int) -> str:
    """A random answer of this kind; code in it would create the file `canary`, or connect to `port`."""
    match kind:
        case "nesting":
            opening, closing = r.choice(BRACKETS).split(" ")
            depth = r.randrange(20, 3000)
            return opening * depth + "1" + closing * depth
        case "exponents":
            return "^".join(f"{{{r.randrange(2, 99999)}" for _ in range(r.randrange(3, 9))) + "}" * 3
        case "plain towers":
            return "**".join(str(r.randrange(5, 9999)) for _ in range(r.randrange(3, 7)))
        case "factorials":
            return f"{r.randrange(10**5, 10**12)}" + "!" * r.randrange(1, 6)
        case "big integers":
            return r.choice("123456789") + "".join(r.choices("0123456789", k=r.randrange(900, 19000)))
        case "unbalanced":
            return "".join(r.choice(LATEX) for _ in range(r.randrange(3, 60)))
        case "a million characters":
            return r.choice(["1", "9+", "x", "\\frac", "({", "é"]) * (10**6 // r.randrange(1, 4)) + str(r.random())
        case "code":
            text = r.choice(CODE).format(c=canary, n=r.randrange(500))
            return text + " " * r.randrange(3) + str(r.randrange(10**6))
        case "null bytes":
            text = "".join(r.choice("42\0\x01\x1b[2J\r\n\t\x7f") for _ in range(r.randrange(3, 80)))
            return text + str(r.randrange(10**6))
        case "sets":
            powers = (f"{r.randrange(99)}^{r.randrange(999)}" for _ in range(r.randrange(5, 400)))
            return "\\{" + ",".join(powers) + "\\}"
        case "sums":
            return f"\\sum_{{k=1}}^{{{10 ** r.randrange(4, 14)}}} \\binom{{k}}{{{r.randrange(2, 99)}}}"
        case "programs":
            programs = hostile_programs.programs(PROGRAMS, str(canary), port, "\0flywheel")
            return f"{programs[r.choice(list(programs))]}\n# {r.random()}"
    raise ValueError(kind)


def pair(name: str, gold: str, answer: str) -> tuple[Problem, Solution]:
    solution = Solution(f"{name}/0", name, (), Finish.STOP, answer, "hostile", "none", f"{name}/0")
    return Problem(Question(name, "?"), gold, Split.TRAIN), solution


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--answers", type=int, default=10000)
    parser.add_argument("--seconds", type=float, default=1.0, help="problems.check_seconds")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, faults, seen = random.Random(args.seed), [], set()
    verdicts: dict[str, Counter[str]] = defaultdict(Counter)
    longest: Counter[str] = Counter()
    started = time.monotonic()
    spec = ProblemSpec(path="none", check_seconds=args.seconds, check_workers=args.workers)
    runs = spec.model_copy(update={"checker": "flywheel.problems.code:passes_tests"})
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch, Grader(spec) as grader, Grader(runs) as runner:
        canary = Path(scratch, "canary")
        grader.verdicts([pair(f"w{i}", "x^2+1", f"1+x^2+y^{i}") for i in range(4 * args.workers)])  # starts the workers
        runner.verdicts([pair(f"v{i}", TESTS, f"# {i}") for i in range(4 * args.workers)])
        # One answer for each worker at a time: a batch takes as long as its slowest answer.
        for batch, start in enumerate(range(0, args.answers, args.workers)):
            kind, pairs = KINDS[batch % len(KINDS)], []
            for i in range(start, min(start + args.workers, args.answers)):
                while (answer := hostile(kind, rng, canary, port)) in seen:
                    continue
                seen.add(answer if len(answer) < 10**5 else str(hash(answer)))
                pairs.append(pair(f"q{i}", TESTS if kind == "programs" else GOLD[i % len(GOLD)], answer))
            begun = time.monotonic()
            grades = (runner if kind == "programs" else grader).verdicts(pairs)
            longest[kind] = max(longest[kind], time.monotonic() - begun)
            verdicts[kind].update(str(grade.verdict) for grade in grades)
            for (problem, solution), grade in zip(pairs, grades):
                if grade.correct:
                    faults.append(f"graded right: gold {problem.answer}, answer {solution.answer[:80]!r}")
            if canary.exists():
                faults.append(f"ran: {[solution.answer[:120] for _, solution in pairs]}")
                canary.unlink()
    listener.settimeout(0)
    with suppress(BlockingIOError):
        faults.append(f"connected: {listener.accept()[1]}")
    print(f"{'kind':22s} {'answers':>8s} {'wrong':>8s} {'undecided':>10s} {'longest, s':>11s}")
    for kind, counts in verdicts.items():
        row = f"{kind:22s} {sum(counts.values()):8d} {counts['incorrect']:8d} {counts['undecided']:10d}"
        print(f"{row} {longest[kind]:11.2f}")
        if longest[kind] > args.seconds + SLACK:
            faults.append(f"{kind}: one took {longest[kind]:.1f} s, with a limit of {args.seconds}")
    print(f"{args.answers} distinct answers in {time.monotonic() - started:.0f} s", *faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
