"""Claims about checkers that hang, die, raise or print, and about what is left when others are killed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from toy import gone, wait_for

from flywheel.errors import UserError
from flywheel.problems.pool import CheckerPool

CHECKER = """
import os, time

def check(gold, answer):
    print(answer[:20], flush=True)  # no verdict; the tests read it in stderr
    match answer:
        case "hang":
            time.sleep(60)
        case "spin":
            return 10 ** (10 ** 9) > 0  # one C call: no signal handler of Python's would ever run
        case "die":
            os._exit(3)
        case "eat":
            return len(bytearray(4 << 30)) > 0
        case "raise":
            raise ValueError("what is this?")
        case "none":
            return None
    return sorted(answer) == sorted(gold)
"""


@pytest.fixture
def checker(tmp_path, monkeypatch) -> str:
    (tmp_path / "own_checker_module.py").write_text(CHECKER)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_checker_module:check"
    sys.modules.pop("own_checker_module", None)


def one(pool: CheckerPool, gold: str, answer: str) -> tuple[bool | None, str]:
    [result] = pool.check([(gold, answer)])
    return result


def test_results_come_in_the_order_of_the_pairs(checker):
    pairs = [(f"ab{n}", f"{n}ba" if n % 3 else "no") for n in range(60)]
    with closing(CheckerPool(checker, 30, 2)) as pool:
        assert [same for same, _ in pool.check(pairs)] == [n % 3 > 0 for n in range(60)]
    assert all(worker.process is None for worker in pool.workers)


def test_a_lost_process_costs_its_own_answer_only(checker):
    bad = {
        "hang": "no reply within 1.5 s",
        "spin": "no reply within 1.5 s",
        "die": "died (exit code 3)",
        "eat": "died (exit code 1)",
        "raise": "raised ValueError: what is this?",
        "none": "returned NoneType, not a bool",
    }
    with closing(CheckerPool(checker, 1.5, 1)) as pool:
        for answer, reason in bad.items():
            begun = time.monotonic()
            same, why = one(pool, "ab", answer)
            assert same is None and reason in why
            assert time.monotonic() - begun < 20
            assert one(pool, f"ab{answer}", f"ba{answer}") == (True, "")
        assert one(pool, "ab", "(True, '')") == (False, "")  # what a checker prints is no verdict
        process = pool.workers[0].process
        [fork] = [child.pid for child in psutil.Process(process.pid).children()]
        assert not gone(fork)
    assert process.poll() is not None
    wait_for(lambda: gone(fork))


def test_a_process_killed_from_outside_costs_one_answer(checker):
    with closing(CheckerPool(checker, 30, 1)) as pool:
        assert one(pool, "ab", "ba") == (True, "")
        worker = psutil.Process(pool.workers[0].process.pid)
        for victim in (*worker.children(), worker):
            victim.kill()
            wait_for(lambda: gone(victim.pid))
            assert one(pool, "ab", "ab")[0] is None
            assert one(pool, "ab", "ba") == (True, "")


def test_a_worker_that_cannot_import_the_checker_is_one_line():
    with closing(CheckerPool("no_such_module_here:check", 1, 1)) as pool:
        with pytest.raises(UserError, match="^problems.checker: no_such_module_here:check cannot be imported: "):
            one(pool, "a", "a")
        assert pool.workers[0].process is None


CHECKS_UNTIL_KILLED = """
import sys, time
import psutil
from flywheel.problems.pool import CheckerPool
checker, answer = sys.argv[1:]
pool = CheckerPool(checker, 1, 1)
list(pool.check([("a", "a")]))
worker = psutil.Process(pool.workers[0].process.pid)
print(worker.pid, worker.children()[0].pid, flush=True)
list(pool.check([("ab", answer)]))
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("answer", "worker_too"), [("spin", False), ("spin", True), ("hang", False), ("ba", False), ("ba", True)]
)
def test_nothing_outlives_a_parent_that_was_killed(checker, tmp_path, answer, worker_too):
    """Whether the fork computes in C code, sleeps or waits, and even if its worker is killed with the parent."""
    script = tmp_path / "checks.py"
    script.write_text(CHECKS_UNTIL_KILLED)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [tmp_path, Path(__file__).parents[2], *sys.path]))}
    command = [sys.executable, script, checker, answer]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as parent:
        worker, fork = map(int, parent.stdout.readline().split())
        assert f"{answer}\n" in iter(parent.stderr.readline, "")  # the checker has begun
        assert not gone(worker) and not gone(fork)
        parent.kill()
        if worker_too:
            os.kill(worker, signal.SIGKILL)
    wait_for(lambda: gone(worker) and gone(fork))
