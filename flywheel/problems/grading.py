"""Is this answer the gold answer? Exact match first, then a checker in killable processes.

Checkers run model output through sympy, which can hang, eat all memory or crash: so what
plain comparison cannot decide runs in worker processes with limits, and an answer on which
a worker is lost is UNDECIDED, never silently wrong.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import queue
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction

from flywheel.errors import UserError
from flywheel.recipe import ProblemSpec
from flywheel.records import Finish, Grade, Problem, Solution, Verdict

log = logging.getLogger(__name__)

DEFAULT_CHECKER = "flywheel.problems.grading:same_answer"
MAX_CHARS = 20_000  # a longer answer that is not the gold text is wrong: nothing true is that long
MAX_DIGITS = 1000  # a longer number is not compared as one (Python refuses beyond 4300)
DECIMALS = 6  # as math-verify rounds decimals
SLACK = 5.0  # seconds beyond the limit for a worker to say that the limit was passed
START_SECONDS = 120.0  # for a worker to import the checker on a cold, busy machine

_NUMBER = re.compile(r"[+-]?(?=\.?[0-9])(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]*)?")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_NUMERIC_TEXT = re.compile(r"[-+0-9\s.,%]+")
_MATH_MARKS = ("$", "\\boxed", "\\(", "\\[")


def same_answer(gold: str, answer: str) -> bool:
    """Whether `answer` equals `gold`: exact after normalisation, then math-verify.

    Both are final answers as extracted (LaTeX or plain, with or without `$`). Two plain numbers
    are compared as numbers, to 6 decimals. Without a time limit of its own: math-verify's uses
    signals, which do not work in threads and do not reach sympy's C loops; `Grader` sets the limit.
    """
    decided = _decide(gold, answer)
    return _math_verify(gold, answer) if decided is None else decided


def answer_key(answer: str) -> str:
    """A cheap normal form: answers with one key are counted as one answer in selection.

    Ignores whitespace around signs, `$`, `\\boxed{}`, case, a trailing dot, digit-group commas,
    a leading + and trailing zeros. No gold, no algebra: 1/2 and 0.5 stay two answers.
    """
    return _clean(answer).casefold()


def last_boxed(text: str) -> str | None:
    """The content of the last balanced \\boxed{...}; None where there is none."""
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
    """Import `module:function`. Raises UserError, one line that names the recipe's `key`."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise UserError(f"{key}: {name!r}: write module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise UserError(
            f"{key}: {name} cannot be imported: {' '.join(f'{type(error).__name__}: {error}'.split())}"
        ) from error
    if not callable(found):
        raise UserError(f"{key}: {name} is not a function")
    return found


def _clean(text: str) -> str:
    text = " ".join(text.split())
    inner = last_boxed(text)
    if (
        inner is not None
        and text.startswith("\\boxed{")
        and len(text) <= len(inner) + 10
        and text.count("\\boxed") == 1
    ):
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
    """What needs no algebra: equal texts, two plain numbers, or absurd length; None otherwise."""
    if len(answer) > max(MAX_CHARS, 10 * len(gold)):
        return False  # not even read: a million characters take a second to clean
    a, b = _clean(gold), _clean(answer)
    if a == b:
        return bool(a)
    if _CONTROL.search(answer):
        return False  # no text, and math-verify would find a number between any two of them
    if len(answer) > MAX_CHARS:
        return False
    if _is_number(a) and _is_number(b):
        return ("." in a or "." in b) and round(Fraction(a), DECIMALS) == round(Fraction(b), DECIMALS)
    return None


def _math_verify(gold: str, answer: str) -> bool:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeout is off
    parsed = [parse(_as_math(text), parsing_timeout=None) for text in (gold, answer)]
    return verify(*parsed, timeout_seconds=None)


def _as_math(text: str) -> str:
    """Bare LaTeX is read only between dollars; bare numbers (1 000; 1,22) only without them."""
    if any(mark in text for mark in _MATH_MARKS) or _NUMERIC_TEXT.fullmatch(text):
        return text
    return f"${text}$"


class _Lost(Exception):
    """The checker hung, died or raised on this answer."""


class _Worker:
    """One persistent process of check_worker.py. JSON lines in and out. It keeps the time; should it fail to, it is killed.

    A plain subprocess rather than multiprocessing: it re-imports no main module, inherits no
    device and may be started from a daemonic process.
    """

    def __init__(self, checker: str, seconds: float):
        self.checker, self.seconds = checker, seconds
        self.process: subprocess.Popen | None = None

    def ask(self, gold: str, answer: str) -> bool:
        """The checker's verdict. Raises _Lost on a hang, a death or an exception in the checker."""
        if self.process is None:
            self._start()
        try:
            self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            self.kill()
            raise _Lost("the worker died") from None
        reply = self._read(self.seconds + SLACK)
        if "error" in reply:
            raise _Lost(reply["error"])
        return reply["same"]

    def _start(self) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flywheel.problems.check_worker", self.checker, str(self.seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        try:
            reply = self._read(START_SECONDS)
        except _Lost as error:
            raise UserError(f"problems.checker: a worker for {self.checker} did not start: {error}") from None
        if "error" in reply:
            self.kill()
            raise UserError(reply["error"])

    def _read(self, seconds: float) -> dict:
        """One reply line, or _Lost (and the process gone)."""
        out, line, deadline = self.process.stdout.fileno(), b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([out], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(out, 65536) if ready else b""
            if not piece:
                self.kill()
                raise _Lost("the worker died" if ready else f"no verdict within {seconds:g} s")
            line += piece
        return json.loads(line)

    def kill(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # itself and the fork that checks
            process.wait()
            for pipe in (process.stdin, process.stdout):
                try:
                    pipe.close()
                except BrokenPipeError:  # an unsent request is left in the buffer
                    continue


class Grader:
    """Grades solutions of one problem set. A context manager: leaving it ends the workers.

    Workers start with the first answer that plain comparison leaves open. The shortcuts belong
    to the default checker; a checker of the recipe's own sees every answer. `counts` says how
    the distinct (gold, answer) pairs were decided: `plain`, `checked` or left `undecided`.
    Raises UserError if `problems.checker` cannot be imported.
    """

    def __init__(self, spec: ProblemSpec):
        load_function(spec.checker)  # a wrong name fails before the first sample, not after the last
        self.spec = spec
        self.counts: Counter[str] = Counter(plain=0, checked=0, undecided=0)
        self._cache: dict[tuple[str, str], bool | None] = {}
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def verdicts(self, pairs: Sequence[tuple[Problem, Solution]]) -> list[Grade]:
        """One Grade a pair, in order."""
        for problem, solution in pairs:
            if problem.id != solution.question_id:
                raise ValueError(f"solution {solution.id} answers {solution.question_id}, not {problem.id}")
        wanted = dict.fromkeys((p.answer, s.answer) for p, s in pairs if s.answer is not None)
        self._settle([pair for pair in wanted if pair not in self._cache])
        return [Grade(s.id, s.question_id, self._verdict(p, s), s.purpose) for p, s in pairs]

    def _verdict(self, problem: Problem, solution: Solution) -> Verdict:
        if solution.answer is None:
            return Verdict.TRUNCATED if solution.finish is Finish.LENGTH else Verdict.UNPARSABLE
        match self._cache[problem.answer, solution.answer]:
            case None:
                return Verdict.UNDECIDED
            case same:
                return Verdict.CORRECT if same else Verdict.INCORRECT

    def _settle(self, pairs: list[tuple[str, str]]) -> None:
        """Decide every pair into the cache."""
        hard = []
        for pair in pairs:
            decided = _decide(*pair) if self.spec.checker == DEFAULT_CHECKER else None
            if decided is None:
                hard.append(pair)
            else:
                self._cache[pair] = decided
                self.counts["plain"] += 1
        if not hard:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.spec.check_workers, "check")
            self._workers = [
                _Worker(self.spec.checker, self.spec.check_seconds) for _ in range(self.spec.check_workers)
            ]
            self._idle = queue.SimpleQueue()
            for worker in self._workers:
                self._idle.put(worker)
        for pair, (same, why) in zip(hard, self._pool.map(self._check, hard)):
            self._cache[pair] = same
            self.counts["checked" if same is not None else "undecided"] += 1
            if why:
                gold, answer = pair
                log.info("undecided: %s; gold %.80r, answer %.80r", why, gold, answer)

    def _check(self, pair: tuple[str, str]) -> tuple[bool | None, str]:
        worker = self._idle.get()  # never empty: one thread a worker
        try:
            return worker.ask(*pair), ""
        except _Lost as error:
            return None, str(error)
        finally:
            self._idle.put(worker)
