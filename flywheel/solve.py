"""Answer questions with what a run has learned: flywheel solve RUN --question TEXT, or --problems FILE --out FILE

By the policy, PRM and reviser after a round. Unless --strategy names one, the strategy is the one that the run's plan
found best for questions of this difficulty. Every answer comes with its confidence and its bill in tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flywheel.errors import UserError, exit_code
from flywheel.runs.isolate import PRELOAD

if TYPE_CHECKING:
    from flywheel.records import Problem


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="flywheel solve", description=__doc__.partition("\n\n")[2])
    p.add_argument("run", type=Path, help="a run directory, e.g. runs/chain, or an export of one")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--question", metavar="TEXT")
    what.add_argument(
        "--problems",
        type=Path,
        metavar="FILE",
        help="JSONL: question, and if you like id, level, answer (then it is graded)",
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="append a line of JSON for each question; finished ones are not asked again",
    )
    p.add_argument("--round", type=int, metavar="R", help="the models after this round (default: the last)")
    p.add_argument(
        "--budget", type=int, metavar="N", help="generations, for the plan or until sure (default: evaluate.budget)"
    )
    p.add_argument("--tokens", type=int, metavar="T", help="a hard limit on all tokens of a question, the PRM's too")
    p.add_argument(
        "--strategy",
        default="auto",
        help="auto, greedy, or KIND:N[:OPTION...] as best_of_n:16:majority (default: %(default)s)",
    )
    p.add_argument(
        "--verifier",
        choices=("own", "published"),
        default="own",
        help="the round's PRM, or the recipe's prm.published, for which there is no plan (default: %(default)s)",
    )
    p.add_argument("--calibrate", action="store_true", help="make the plan for these models first, if there is none")
    p.add_argument(
        "--show", action="store_true", help="the solution and all candidates too, with the PRM's step values"
    )
    return p


def read_questions(path: Path) -> list[Problem]:
    """The questions of a JSONL file; those without an answer have an empty gold. Raises UserError."""
    from flywheel.problems.sources import accepted
    from flywheel.recipe import ProblemSpec
    from flywheel.records import Problem, Question, Split

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    found: dict[str, Problem] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not row["question"].strip():
            raise UserError(f"{where}: a field question with some text is wanted")
        id = str(number if row.get("id") is None else row["id"])
        if id in found:
            raise UserError(f"{where}: the id {id} occurs twice")
        gold, *also = [""] if row.get("answer") in (None, "") else accepted(row, ProblemSpec(path=str(path)), where)
        question = Question(id, row["question"], str(row.get("level") or ""))
        found[id] = Problem(question, gold, Split.TEST, tuple(also))
    if not found:
        raise UserError(f"{path}: no questions in it")
    return list(found.values())


def main(argv: list[str] | None = None, *, preload: tuple[str, ...] = PRELOAD) -> int:
    """Run the command; returns the exit code: 1 if a question could not be answered."""
    args = parser().parse_args(argv)
    for option in ("budget", "tokens"):
        if (value := getattr(args, option)) is not None and value < 1:
            parser().error(f"--{option}: 1 or more")
    return exit_code(lambda: solved(args, preload))


def solved(args: argparse.Namespace, preload: tuple[str, ...]) -> int:
    from flywheel.records import Problem, Question, Split
    from flywheel.runs import isolate
    from flywheel.runs.loop import Stopped, signals
    from flywheel.runs.processes import call_alone, threads_alone
    from flywheel.runs.ranks import Ranks
    from flywheel.runs.run import Run
    from flywheel.search.strategies import named
    from flywheel.serving.batch import finished
    from flywheel.serving.solver import Ask
    from flywheel.serving.system import by_published, system

    try:
        run, ranks = Run(args.run), Ranks()
        strategy = None if args.strategy == "auto" else named(args.strategy)
        served = system(run, args.round)
        served.check(strategy)
        if args.verifier == "published":
            if args.calibrate:
                raise UserError("--verifier published: no plan holds for it, so --calibrate has nothing to make")
            by_published(served)
        ask = Ask(strategy, args.budget or run.recipe.evaluate.budget, args.tokens)
        if args.question is not None:
            problems = [Problem(Question("question", args.question), "", Split.TEST)]
        else:
            problems = read_questions(args.problems)
        done = finished(args.out) if args.out else set()
        todo = [problem for problem in problems if (problem.id, problem.question.text) not in done]
        if not todo:
            print(f"nothing to do: {args.out} has all {len(problems)} questions", file=sys.stderr)
            return 0
        arguments = {
            "root": str(args.run),
            "round": served.round,
            "ask": ask,
            "problems": todo,
            "out": args.out and str(args.out),
            "show": args.show,
            "make_plan": args.calibrate,
            "published": args.verifier == "published",
        }
        with signals():
            threads = threads_alone(ranks, run.recipe)
            isolate.start_server(threads, preload)
            sums = call_alone(ranks, run.recipe, "flywheel.serving.batch:answer", arguments, "the answers", threads)
    except Stopped as stop:
        return 128 + stop.args[0]
    line = f"{sums['answered']} answered, {sums['tokens']:,} tokens"
    if sums["graded"]:
        line += f", {sums['right']} of {sums['graded']} right ({sums['right'] / sums['graded']:.1%})"
    print(line + (f", {sums['failed']} failed" if sums["failed"] else ""), file=sys.stderr)
    return 1 if sums["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
