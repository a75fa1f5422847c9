"""Answer a file of questions, a line of JSON for each as soon as it is answered; finished lines are not asked again."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from flywheel.errors import TooLong, UserError
from flywheel.ledger import Ledger
from flywheel.problems.grading import DEFAULT_CHECKER, Grader
from flywheel.recipe import ProblemSpec
from flywheel.records import Problem, Question, Role, Verdict
from flywheel.runs.run import Run
from flywheel.serving.solver import Ask, Solved, Solver
from flywheel.serving.system import System, by_published, calibrate, system
from flywheel.stages.kit import PUBLISHED, Kit, open_kit


@contextmanager
def opened(served: System, seed: int = 0) -> Iterator[tuple[Kit, Solver]]:
    """The models of a system, open, and the solver that answers with them."""
    ledger = Ledger("solve", served.round)
    models = {**served.models, **served.head}
    with open_kit(served.run, models, ledger=ledger, seed=seed) as kit:
        prm = PUBLISHED if PUBLISHED in models else Role.PRM
        searcher = kit.searcher(prm=prm, reviser=Role.REVISER in models, head=Role.HEAD in models)
        yield kit, Solver(searcher, served.plan, served.edges, served.run.recipe.evaluate.probe)


def row_of(question: Question, found: Solved, show: bool) -> dict:
    """What is printed or written of an answer; with `show` its solution and all candidates with their step values."""
    plain = [item.name for item in fields(found) if item.name not in ("best", "candidates")]
    row = {"id": question.id, "question": question.text, **{name: getattr(found, name) for name in plain}}
    if show:
        row["solution"] = found.best and found.best.solution.text
        row["candidates"] = [
            {"text": c.solution.text, "answer": c.solution.answer, "score": c.score, "values": list(c.values)}
            for c in found.candidates
        ]
    return row


def answer(
    root: str,
    round: int | None,
    ask: Ask,
    problems: Sequence[Problem],
    out: str | None,
    show: bool,
    make_plan: bool,
    published: bool = False,
) -> dict[str, float]:
    """Answer `problems`, writing to the file `out` or to stdout; returns sums over what was answered now.

    A problem with an empty gold answer is not graded. A question that the model cannot read gets a line with `error`.
    published: the recipe's published PRM judges.
    """
    run = Run(root)
    served = calibrate(run, round) if make_plan else system(run, round)
    if published:
        served = by_published(served)
    if ask.strategy is None and not served.plan:
        names = ", ".join(ref.name for ref in served.models.values())
        print(
            f"no plan is made for {names} (--calibrate makes one): sampling until the vote is decided", file=sys.stderr
        )
    sums = {"answered": 0, "failed": 0, "graded": 0, "right": 0, "tokens": 0}
    grader = Grader(checker_of(run.recipe.problems))
    with _output(out) as file, opened(served, run.recipe.seed) as (kit, solver), grader:
        bar = tqdm(total=len(problems), unit="question", disable=not sys.stderr.isatty() or len(problems) == 1)

        async def one(problem: Problem) -> None:
            try:
                found = await solver.solve(problem.question, ask)
            except (TooLong, UserError) as error:
                row = {"id": problem.id, "question": problem.question.text, "error": str(error)}
                sums["failed"] += 1
            else:
                row = row_of(problem.question, found, show)
                sums["answered"] += 1
                sums["tokens"] += found.tokens
                if problem.answer:
                    row["right"] = await right(grader, problem, found)
                    sums["graded"] += row["right"] is not None
                    sums["right"] += bool(row["right"])
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()

        left = map(one, problems)
        kit.stream(lambda: next(left, None))
    return sums


def checker_of(spec: ProblemSpec) -> ProblemSpec:
    """How answers of one's own questions are checked: as in the run, but for the scorers of reasoning-gym's entries."""
    return spec.model_copy(update={"checker": DEFAULT_CHECKER}) if spec.format == "reasoning_gym" else spec


async def right(grader: Grader, problem: Problem, found: Solved) -> bool | None:
    """Whether the answer is right; None if the checker did not decide."""
    if found.best is None:
        return False
    [grade] = await grader.grade([(problem, found.best.solution)])
    return None if grade.verdict is Verdict.UNDECIDED else grade.correct


def _output(path: str | None):
    return open(path, "a", encoding="utf-8") if path else nullcontext(sys.stdout)


def finished(out: Path) -> set[tuple[str, str]]:
    """(id, question) of the lines of `out` without an error. A last line that a kill cut short is removed.

    Creates the file if there is none. Raises UserError.
    """
    try:
        with open(out, "a+b") as file:
            file.seek(0)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            file.truncate(len(whole))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another --out") from None
    try:
        rows = [json.loads(line) for line in whole.split(b"\n") if line]
        return {(row["id"], row["question"]) for row in rows if "error" not in row}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out}: not what flywheel solve writes ({error}); name another --out") from None
