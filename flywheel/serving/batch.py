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
from flywheel.records import Problem, Question, Role, Split
from flywheel.runs.run import Run
from flywheel.runs.worker import cut
from flywheel.serving.solver import Ask, Solved, Solver
from flywheel.serving.system import System, calibrate, system
from flywheel.stages.kit import Kit, open_kit


@contextmanager
def opened(served: System, seed: int = 0) -> Iterator[tuple[Kit, Solver]]:
    """The models of a system, open, and the solver that answers with them."""
    ledger = Ledger("solve", served.round)
    with open_kit(served.run, served.models, Split.CALIBRATE, ledger=ledger, seed=seed) as kit:
        searcher = kit.searcher(reviser=Role.REVISER in served.models)
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
    root: str, round: int | None, ask: Ask, problems: Sequence[Problem], out: str | None, show: bool, make_plan: bool
) -> dict[str, float]:
    """Answer `problems`, writing to the file `out` or to stdout; returns sums over what was answered now.

    A problem with an empty gold answer is not graded. A question that the model cannot read gets a line with `error`.
    """
    run = Run(root)
    served = calibrate(run, round) if make_plan else system(run, round)
    if ask.strategy is None and not served.plan:
        names = ", ".join(ref.name for ref in served.models.values())
        print(
            f"no plan is made for {names} (--calibrate makes one): sampling until the vote is decided", file=sys.stderr
        )
    sums = {"answered": 0, "failed": 0, "graded": 0, "right": 0, "tokens": 0}
    with opened(served, run.recipe.seed) as (kit, solver), _output(out) as file:
        if ask.strategy and not solver.searcher.can(ask.strategy):
            raise UserError(f"{ask.strategy.name}: round {served.round} has no {ask.strategy.maker} to search with")
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
                    [grade] = kit.grader.verdicts([(problem, found.best.solution)]) if found.best else [None]
                    row["right"] = bool(grade and grade.correct)
                    sums["graded"] += 1
                    sums["right"] += row["right"]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()

        for some in cut(problems, run.recipe.engine.chunk):
            list(kit.each(some, one))
    return sums


def _output(path: str | None):
    return open(path, "a", encoding="utf-8") if path else nullcontext(sys.stdout)


def finished(out: Path) -> set[str]:
    """The ids that `out` has a line for. A last line that a kill cut short is removed. Raises UserError."""
    if not out.exists():
        return set()
    text = out.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        out.write_bytes(whole)
    try:
        return {json.loads(line)["id"] for line in whole.decode().splitlines()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out}: not what flywheel solve writes ({error}); name another --out") from None
