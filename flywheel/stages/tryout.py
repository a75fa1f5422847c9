"""The try-out: a few questions sampled by the base before a run begins, with what was read of its solutions.

Prompts that do not fit a model are seen here within a minute, not as a run of zeros after hours of sampling.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence

from flywheel.errors import UserError
from flywheel.problems import gym
from flywheel.records import Grade, Problem, Solution, Verdict
from flywheel.stages.kit import Kit

QUESTIONS, SAMPLES, SHOWN = 8, 4, 3
MORE, SOON = 24, 10.0  # further questions, if no solution of the first is right or they took less than so many seconds
FORCE = "; flywheel iterate --force starts the run all the same"


def try_out(kit: Kit, problems: Sequence[Problem], force: bool = False) -> list[tuple[Solution, Grade]]:
    """Sample QUESTIONS of `problems` SAMPLES times each by the base, print what was read, and judge it.

    MORE are sampled if none of these is right, since a base that is right in 5% of its samples may well miss 32, and if
    they came SOON, for the lengths that the estimate rests on. Returns the solutions with their grades.
    Raises UserError, naming the recipe key to look at, if no answer could be read or none is right, unless `force`.
    """
    recipe, fitting = kit.recipe, sorted(problem.id for problem in problems)
    order = random.Random(recipe.seed).sample(fitting, min(QUESTIONS + MORE, len(fitting)))
    started, solutions, grades = time.monotonic(), [], []
    for asked in (order[:QUESTIONS], order[QUESTIONS:]):
        drawn = kit.backend.run(asked, lambda question: kit.sampled(question, SAMPLES, purpose="try", tag="try"))
        made = [record for records in drawn for record in records]
        solutions += [record for record in made if isinstance(record, Solution)]
        grades += [record for record in made if isinstance(record, Grade)]
        if not (line := fault(grades)) and time.monotonic() - started > SOON:
            break
    seconds = time.monotonic() - started
    print(f"try-out: {len(solutions) // SAMPLES} training questions x {SAMPLES} samples of {recipe.model.base}")
    for solution, grade in shown(solutions, grades):
        problem = kit.problems[solution.question_id]
        gold = gym.plain(problem.answer) if recipe.problems.format == "reasoning_gym" else problem.answer
        print(as_read(problem, gold, solution, grade.verdict))
    shares = ", ".join(f"{verdict} {count / len(grades):.0%}" for verdict, count in sorted(kit.ledger.verdicts.items()))
    tokens = sum(solution.generated for solution in solutions)
    length, rate = tokens / len(solutions), tokens / seconds
    print(f"try-out: {shares}; {length:.0f} tokens a solution, {rate:.0f} tokens/s for these few", flush=True)
    if line and not force:
        raise UserError(line + FORCE)
    return list(zip(solutions, grades, strict=True))


def shown(solutions: Sequence[Solution], grades: Sequence[Grade]) -> list[tuple[Solution, Grade]]:
    """SHOWN solutions of different questions, of as many different verdicts as there are."""
    pairs, picked = list(zip(solutions, grades, strict=True)), []
    for key in (lambda s, g: g.verdict, lambda s, g: s.question_id):
        for solution, grade in pairs:
            new = key(solution, grade) not in {key(*pair) for pair in picked}
            if new and solution.question_id not in {s.question_id for s, _ in picked} and len(picked) < SHOWN:
                picked.append((solution, grade))
    return picked


def as_read(problem: Problem, gold: str, solution: Solution, verdict: Verdict) -> str:
    """A solution as the run sees it: question, steps, answer and verdict, long texts shortened."""
    steps = [f"  step {i}: {short(step.text)}" for i, step in enumerate(solution.steps, 1)]
    if len(steps) > 8:
        steps[6:-1] = [f"  ... {len(steps) - 7} more steps"]
    answer = "none" if solution.answer is None else short(solution.answer)
    return "\n".join(
        [
            f"  question {problem.id}: {short(problem.question.text)}",
            *steps,
            f"  answer: {answer} ({verdict}; the right one is {short(gold)})",
        ]
    )


def short(text: str, most: int = 100) -> str:
    shown = ascii(text)[1:-1] if not text.isprintable() else text
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def fault(grades: Sequence[Grade]) -> str | None:
    """One line that says which recipe key to look at, if none is right: of most solutions, what went wrong."""
    counts, total = Counter(grade.verdict for grade in grades), len(grades)
    if counts[Verdict.CORRECT]:
        return None
    read = total - counts[Verdict.TRUNCATED] - counts[Verdict.UNPARSABLE]
    if counts[Verdict.UNDECIDED] == total:
        return f"try-out: the checker decided none of {total} answers; see problems.checker, problems.check_seconds"
    if read >= total / 2:
        return (
            f"try-out: none of {total} answers is right: see above whether prompts.answer reads the whole answer"
            " and whether the problems' answers are written alike; else the questions are too hard for the model"
        )
    found = f"an answer could be read in {read or 'none'} of {total} solutions"
    if counts[Verdict.TRUNCATED] > total / 2:
        return (
            f"try-out: {found}, {counts[Verdict.TRUNCATED]} were cut off; see prompts.stop (what ends a solution),"
            " then sample.max_tokens, then prompts.answer"
        )
    return (
        f"try-out: {found}; see prompts.answer (how an answer is found), and prompts.solve (whether the model is told"
        " to write it so)"
    )
