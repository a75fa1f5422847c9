"""Compare answers with gold answers: plain comparison first, then a checker in killable processes.

Checkers run model output through sympy, which can hang, exhaust memory or crash. So `pool.py` calls them with limits,
and an answer that exceeds a limit or kills its process is UNDECIDED, never wrong.

How to write a checker: a module-level function `check(gold: str, answer: str) -> bool`, set in a recipe as
`problems.checker: module:check`. It gets the extracted final answers and returns True or False; anything else that it
returns or raises makes the answer UNDECIDED. It is called in a fork of a process that has imported its module: load
what it needs at import, or in a function `warm_up()` of the same module, and keep no state between answers, because a
fork is replaced when an answer exceeds `problems.check_seconds` or 2 GiB. Its output goes to stderr.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

from flywheel.errors import UserError
from flywheel.problems.pool import CheckerPool
from flywheel.recipe import ProblemSpec
from flywheel.records import Finish, Grade, Problem, Solution, Verdict

log = logging.getLogger(__name__)

DEFAULT_CHECKER = "flywheel.problems.grading:same_answer"
MAX_CHARS = 20_000  # a longer answer is wrong unless it equals the gold text
MAX_DIGITS = 1000  # a longer number is compared as text (Python converts at most 4300 digits)
DECIMALS = 6  # as in math-verify

_NUMBER = re.compile(r"[+-]?(?=\.?[0-9])(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]*)?")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_NUMERIC_TEXT = re.compile(r"[-+0-9\s.,%]+")
_MATH_MARKS = ("$", "\\boxed", "\\(", "\\[")


def same_answer(gold: str, answer: str) -> bool:
    """Whether `answer` equals `gold`: as text or number after normalisation, else by math-verify.

    Both are extracted final answers (LaTeX or plain, with or without `$`). Two plain numbers are compared to 6
    decimals. There is no time limit here, `Grader` sets one: math-verify's own uses signals, which threads cannot
    receive and sympy's C loops do not notice.
    """
    decided = _decide(gold, answer)
    return _math_verify(gold, answer) if decided is None else decided


def warm_up() -> None:
    """Make math-verify and sympy import and cache what they need before a worker forks: saves 20 ms per fork."""
    for pair in (("x^2+1", "1+x^2+y"), ("2", "\\frac{6}{2}"), ("(1,2)", "\\{1,\\sqrt{3}\\}")):
        same_answer(*pair)


def answer_key(answer: str) -> str:
    """A normal form of `answer`: answers with the same key count as one in a vote.

    Ignores whitespace around symbols, `$`, `\\boxed{}`, case, a trailing dot, digit-group commas, a leading +
    and trailing zeros of decimals. Uses no gold answer and no algebra: 1/2 and 0.5 stay different.
    """
    return _clean(answer).casefold()


def last_boxed(text: str) -> str | None:
    """The stripped content of the last \\boxed{...}; None if there is none, or it is empty or not balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + 6, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + 7 : i].strip() or None
    return None


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


def _clean(text: str) -> str:
    """One line without `$`, an enclosing \\boxed{}, a final dot and spaces around symbols; numbers normalised."""
    text = " ".join(text.split())
    if text.startswith("\\boxed{") and text.count("\\boxed") == 1:
        inner = last_boxed(text)
        if inner is not None and len(text) <= len(inner) + 10:  # at most a space and a dot follow the brace
            text = inner
    text = text.replace("\\$", "").replace("$", "").replace("\\!", "").removeprefix("\\(").removesuffix("\\)").strip()
    text = text.removesuffix(".").strip()
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", text)
    return _canonical(text) if _is_number(text) else text


def _is_number(text: str) -> bool:
    return len(text) <= MAX_DIGITS and _NUMBER.fullmatch(text) is not None


def _canonical(number: str) -> str:
    """1,080 -> 1080; +3 -> 3; 2.50 -> 2.5; 007 -> 7; -0.0 -> 0."""
    sign = "-" if number.startswith("-") else ""
    whole, _, decimals = number.lstrip("+-").replace(",", "").partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    text = f"{whole}.{decimals}" if decimals else whole
    return text if text == "0" else sign + text


def _decide(gold: str, answer: str) -> bool | None:
    """The verdict if it needs no algebra (equal texts, two plain numbers, excessive length), else None."""
    if len(answer) > max(MAX_CHARS, 10 * len(gold)):
        return False  # before `_clean`, which takes a second for a million characters
    a, b = _clean(gold), _clean(answer)
    if a == b:
        return bool(a)
    if len(answer) > MAX_CHARS or _CONTROL.search(answer):
        return False  # math-verify drops control characters, so it would read "4\x002" as 42
    if _is_number(a) and _is_number(b):
        return ("." in a or "." in b) and round(Fraction(a), DECIMALS) == round(Fraction(b), DECIMALS)
    return None


def _math_verify(gold: str, answer: str) -> bool:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    parsed = [parse(_as_math(text), parsing_timeout=None) for text in (gold, answer)]
    return verify(*parsed, timeout_seconds=None)


def _as_math(text: str) -> str:
    """Add `$` as math-verify needs it: around bare LaTeX, but not around numbers such as `1 000` or `1,22`."""
    if any(mark in text for mark in _MATH_MARKS) or _NUMERIC_TEXT.fullmatch(text):
        return text
    return f"${text}$"


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
        self._same: dict[tuple[str, str], bool | None] = {}  # (gold, answer) -> verdict; None: undecided

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()

    def verdicts(self, pairs: Sequence[tuple[Problem, Solution]]) -> list[Grade]:
        """One Grade per pair, in order. Raises ValueError if a solution belongs to another question."""
        for problem, solution in pairs:
            if problem.id != solution.question_id:
                raise ValueError(f"solution {solution.id} answers {solution.question_id}, not {problem.id}")
        wanted = dict.fromkeys((g, s.answer) for p, s in pairs if s.answer is not None for g in (p.answer, *p.also))
        self._settle([pair for pair in wanted if pair not in self._same])
        return [Grade(s.id, s.question_id, self._verdict(p, s), s.purpose) for p, s in pairs]

    def _verdict(self, problem: Problem, solution: Solution) -> Verdict:
        if solution.answer is None:
            return Verdict.TRUNCATED if solution.finish is Finish.LENGTH else Verdict.UNPARSABLE
        same = {self._same[gold, solution.answer] for gold in (problem.answer, *problem.also)}
        if True in same:
            return Verdict.CORRECT
        return Verdict.UNDECIDED if None in same else Verdict.INCORRECT

    def _settle(self, pairs: list[tuple[str, str]]) -> None:
        """Decide every pair and store the verdict in `_same`."""
        hard = []
        for pair in pairs:
            decided = _decide(*pair) if self.shortcuts else None
            if decided is None:
                hard.append(pair)
            else:
                self._same[pair] = decided
                self.counts["plain"] += 1
        for (gold, answer), (same, why) in zip(hard, self.pool.check(hard)):
            self._same[gold, answer] = same
            self.counts["undecided" if same is None else "checked"] += 1
            if same is None:
                log.info("undecided: %s; gold %.80r, answer %.80r", why, gold, answer)
