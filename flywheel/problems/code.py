"""Whether a program passes its tests: `problems.checker: flywheel.problems.code:passes_tests`.

The answer is a program, the gold answer a JSON object with its tests as HumanEval or MBPP has them (`read_gold`). The
tests run in one process and the program in another (`judge.py`), without network, files, privilege or a way to each
other: the program never sees tests or verdict, and only the values that its functions return count.

Not defended against: a program that knows the right values for the very arguments of the tests, as one can that has
seen them; functions that a test takes from the program beside the one under test (give HumanEval's `prompt`, whose
helpers are then the judge's); a fault of the kernel. Only the standard library can be imported, and an argument that
the program changes in place stays as it was for the tests.

A program that computes for longer than `judge.PROGRAM` allows is wrong; one that only waits meets
`problems.check_seconds`, and is undecided.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from flywheel.errors import UserError
from flywheel.problems.extract import last_code
from flywheel.records import Problem

TESTS, SETUP = ("test", "test_list"), ("test_imports", "test_setup_code")
KEYS = (*TESTS, *SETUP, "prompt", "entry_point")
START = (  # only flywheel itself is imported from there
    "import sys; sys.path.append(sys.argv[1]); from flywheel.problems.judge import main; sys.path.pop();"
    " main(int(sys.argv[2]))"
)
ROOT = str(Path(__file__).parents[2])
NEEDS = (
    "Linux 5.12 or later and either unprivileged user namespaces (user.max_user_namespaces above 0,"
    " kernel.apparmor_restrict_unprivileged_userns=0; in a container, a seccomp profile that allows them) or root with"
    " CAP_SYS_ADMIN"
)
# Does what must not work, and returns what did
PROBE = """
import os, socket, time

def worked():
    found = []
    for place in ("/probe", "/usr/probe", "/dev/probe"):
        try:
            open(place, "w").close()
            found.append(place)
        except OSError:
            pass
    try:
        socket.create_connection(("127.0.0.1", 9), 1)
        found.append("network")
    except ConnectionRefusedError:
        found.append("network")
    except OSError:
        pass
    try:
        for _ in range(40):
            os.fork() or time.sleep(60)
        found.append("processes")
    except OSError:
        pass
    return found + sorted(os.listdir("."))
"""


def passes_tests(gold: str, answer: str) -> bool:
    """Whether the program in `answer`, its last fenced block or else all of it, passes the tests of `gold`.

    Raises ValueError for a faulty `gold`, and RuntimeError if there is no verdict; nothing has been run then, or what
    ran had no effect.
    """
    verdict = _judge(read_gold(gold), last_code(answer) or answer)
    if verdict == "passed" or verdict.startswith("failed:"):
        return verdict == "passed"
    raise RuntimeError(verdict or "the judge ended without a verdict")


def warm_up() -> None:
    """Raises UserError if programs cannot be isolated on this machine: what must not work is tried once."""
    tests = read_gold('{"test": "assert worked() == []"}')
    if (verdict := _judge(tests, PROBE)) != "passed":
        raise UserError(f"problems.checker: programs cannot be isolated here, so none is run: {verdict}; needs {NEEDS}")


def preflight(problems: Iterable[Problem]) -> None:
    """Raises UserError if programs cannot be isolated here, or a problem's gold answer holds no tests."""
    warm_up()
    for problem in problems:
        try:
            for gold in (problem.answer, *problem.also):
                read_gold(gold)
        except ValueError as error:
            raise UserError(f"question {problem.id}: problems.checker: {error}") from None


@lru_cache(4096)
def read_gold(gold: str) -> dict[str, str]:
    """What `judge.main` wants to know of the tests in `gold`. Raises ValueError that names the fault.

    Keys, of which `test` or `test_list` must be there; each is a text or a list of texts (lines):
    `test`: code with asserts, or HumanEval's `def check(candidate)`, which is called with the function `entry_point`;
    `test_list`, `test_setup_code`, `test_imports`: as in MBPP; `prompt`: code that stands before the program.
    """
    try:
        found = json.loads(gold)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"the gold answer must be a JSON object with test or test_list, got {gold[:40]!r}")
    if unknown := found.keys() - set(KEYS):
        raise ValueError(f"the gold answer's {min(unknown)}: unknown; known: {', '.join(KEYS)}")
    texts = {key: _text(key, found.get(key)) for key in KEYS}
    tests, setup = ("\n".join(texts[key] for key in keys if texts[key]) for keys in (TESTS, SETUP))
    entry = texts["entry_point"].strip()
    if entry and not entry.isidentifier():
        raise ValueError(f"the gold answer's entry_point: {entry!r} is no name of a function")
    trees = {key: _tree(key, text) for key, text in (("test", tests), ("setup", setup), ("prompt", texts["prompt"]))}
    if not any(isinstance(node, ast.Assert) for node in ast.walk(trees["test"])):
        raise ValueError("the gold answer's test: no assert in it, so every program would pass")
    entry = entry or _like_builtin(trees["test"], trees["setup"])
    if any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in trees["test"].body):
        if not entry:
            raise ValueError("the gold answer's entry_point: missing; check(candidate) needs it")
        tests += f"\ncheck({entry})"
    return {"tests": tests, "setup": setup, "prompt": texts["prompt"], "entry_point": entry}


def _like_builtin(*trees: ast.Module) -> str:
    """The function under test if it is called like a builtin one, as in `assert sum(10, 15) == 6`; else empty.

    Raises ValueError if it may be one of several.
    """
    nodes = [node for tree in trees for node in ast.walk(tree)]
    called = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    called -= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    if len(called) > 1 and called <= vars(builtins).keys():
        raise ValueError(f"the gold answer's entry_point: missing; which of {', '.join(sorted(called))} is tested?")
    return next(iter(called)) if called and called <= vars(builtins).keys() else ""


def _text(key: str, value: object) -> str:
    lines = value if isinstance(value, list) else [value or ""]
    if not all(isinstance(line, str) for line in lines):
        raise ValueError(f"the gold answer's {key}: text or a list of texts wanted")
    return "\n".join(lines)


def _tree(key: str, code: str) -> ast.Module:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the gold answer's {key} is not Python: {error}") from None


def _judge(tests: dict[str, str], program: str) -> str:
    """The verdict of `judge.main`; empty if it died. All that it started has ended when this returns."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", START, ROOT, str(os.getpid())],
        input=json.dumps({**tests, "program": program}).encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},  # it holds keys
        cwd="/",
    )
    return done.stdout.decode(errors="replace")
