"""Grade answers: the rules of `equal.py` that need no algebra first, then a checker in killable processes.

Checkers run model output through sympy, which can hang, exhaust memory or crash. So `pool.py` calls them with limits,
and an answer that exceeds a limit or kills its process is UNDECIDED, never wrong.

How to write a checker: a module-level function `check(gold: str, answer: str) -> bool`, set in a recipe as
`problems.checker: module:check`. It gets the extracted final answers and returns True or False; anything else that it
returns or raises makes the answer UNDECIDED. It is called in a fork of a process that has imported its module: load
what it needs at import, or in a function `warm_up()` of the same module, and keep no state between answers, because a
fork is replaced when an answer exceeds `problems.check_seconds` or 2 GiB. Its output goes to stderr. A function
`preflight(problems)` of its module is called before a run and raises UserError for what would fail later.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from flywheel.errors import UserError
from flywheel.problems.equal import decide, equal, key, rule_of
from flywheel.problems.pool import CheckerPool
from flywheel.recipe import ProblemSpec
from flywheel.records import Finish, Grade, Problem, Solution, Verdict

log = logging.getLogger(__name__)

DEFAULT_CHECKER = "flywheel.problems.grading:same_answer"


def same_answer(gold: str, answer: str) -> bool:
    """Whether `answer` equals `gold`, by the rules of `equal.py`.

    Both are extracted final answers (LaTeX or plain, with or without `$`). There is no time limit here, `Grader` sets
    one.
    """
    return equal(gold, answer)[0]


def warm_up() -> None:
    """Make math-verify and sympy import and cache what they need before a worker forks: saves 20 ms per fork."""
    for pair in (("x^2+1", "1+x^2+y"), ("2", "\\frac{6}{2}"), ("(1,2)", "\\{1,\\sqrt{3}\\}")):
        same_answer(*pair)


@lru_cache(maxsize=4096)  # a vote asks for each answer again and again
def answer_key(answer: str) -> str:
    """A normal form of `answer`: answers with the same key count as one in a vote (`key` in `equal.py`).

    A text of several lines, or one that defines a function, is a program, in which every character counts.
    """
    return answer if "\n" in answer or answer.startswith("def ") else key(answer)


def load_function(name: str, key: str = "problems.checker") -> Callable:
    """Import the function `name` (module:function). Raises UserError, naming the recipe's `key`, if that fails."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise UserError(f"{key}: {name!r}: write module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # a user's module may raise anything while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{key}: {name} cannot be imported: {reason}") from error
    if not callable(found):
        raise UserError(f"{key}: {name} is not a function")
    return found


def preflight_of(checker: str) -> Callable[[Iterable[Problem]], None] | None:
    """What the checker's module wants called with all problems before a run; None if nothing."""
    return getattr(importlib.import_module(checker.partition(":")[0]), "preflight", None)


class Grader:
    """Grades solutions. A context manager; its processes start when first needed and end on exit.

    With the default checker, pairs that plain comparison decides never reach a process; a custom checker sees
    every pair. `counts`: number of distinct (gold, answer) pairs decided by plain comparison (`plain`) or by a
    checker (`checked`), or left `undecided`. Raises UserError if `problems.checker` cannot be imported.
    """

    def __init__(self, spec: ProblemSpec):
        load_function(spec.checker)  # so that a wrong name fails before sampling
        self.shortcuts = spec.checker == DEFAULT_CHECKER
        self.pool = CheckerPool(spec.checker, spec.check_seconds, spec.check_workers)
        self.counts: Counter[str] = Counter(plain=0, checked=0, undecided=0)
        # (gold, answer) -> (whether they are the same, None: undecided; the rule of `equal.py` that says so)
        self._known: dict[tuple[str, str], tuple[bool | None, str]] = {}
        self._asked: dict[tuple[str, str], asyncio.Task] = {}  # those being checked

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()

    def verdicts(self, pairs: Sequence[tuple[Problem, Solution]]) -> list[Grade]:
        """As `grade`, where no event loop runs."""
        return asyncio.run(self.grade(pairs))

    async def grade(self, pairs: Sequence[tuple[Problem, Solution]]) -> list[Grade]:
        """One Grade per pair, in order; other coroutines, and the engines, go on while the checker works.

        Raises ValueError if a solution belongs to another question.
        """
        for pair in (hard := self._plain(pairs)):
            if pair not in self._asked:
                self._asked[pair] = asyncio.ensure_future(self._check(pair))
        await asyncio.gather(*(asyncio.shield(self._asked[pair]) for pair in hard))  # others wait for them too
        return [self._grade(p, s) for p, s in pairs]

    async def _check(self, pair: tuple[str, str]) -> None:
        try:
            same, why = await self.pool.checked(pair)
        finally:
            del self._asked[pair]
        if same is None:
            log.info("undecided: %s; gold %.80r, answer %.80r", why, *pair)
        rule = ("undecided" if same is None else rule_of(*pair)) if self.shortcuts else ""
        self._known[pair] = same, rule
        self.counts["undecided" if same is None else "checked"] += 1

    def _grade(self, problem: Problem, solution: Solution) -> Grade:
        answer, rule = solution.answer, ""
        if answer is None:
            verdict = Verdict.TRUNCATED if solution.finish is Finish.LENGTH else Verdict.UNPARSABLE
        else:  # right by any of the gold answers; undecided if one of the others is
            found = [self._known[gold, answer] for gold in (problem.answer, *problem.also)]
            same, rule = min(found, key=lambda item: (True, None, False).index(item[0]))
            verdict = {True: Verdict.CORRECT, None: Verdict.UNDECIDED, False: Verdict.INCORRECT}[same]
        return Grade(solution.id, solution.question_id, verdict, solution.purpose, rule)

    def _plain(self, pairs: Sequence[tuple[Problem, Solution]]) -> list[tuple[str, str]]:
        """Decide what plain comparison can; returns the other (gold, answer) pairs, of which no verdict is known."""
        for problem, solution in pairs:
            if problem.id != solution.question_id:
                raise ValueError(f"solution {solution.id} answers {solution.question_id}, not {problem.id}")
        wanted = dict.fromkeys((g, s.answer) for p, s in pairs if s.answer is not None for g in (p.answer, *p.also))
        hard = []
        for pair in wanted:
            if pair in self._known:
                continue
            decided = decide(*pair) if self.shortcuts else None
            if decided is None:
                hard.append(pair)
            else:
                self._known[pair] = decided
                self.counts["plain"] += 1
        return hard
