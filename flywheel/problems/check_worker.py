"""The process of a worker in `pool.py`: `python -m flywheel.problems.check_worker FD`, FD a socket to its parent.

It imports the checker once and forks. The fork checks answers; if it takes too long on one, or dies, it is replaced.
If the parent is killed, no process survives: this one and an idle fork end when their pipe closes, and a fork that
is computing is ended by the limit on its CPU time.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from flywheel.errors import UserError
from flywheel.problems.grading import load_function
from flywheel.problems.pool import Checked, Lost, ask

MEMORY = 2 << 30  # bytes of address space above what the imported checker needs

Checker = Callable[[str, str], bool]


def main(parent: Connection) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it were ignored, a fork could not be waited for
    checker, seconds = parent.recv()
    try:
        same = load_function(checker)
        getattr(sys.modules[checker.partition(":")[0]], "warm_up", bool)()
    except UserError as error:
        return parent.send(str(error))
    parent.send("")  # ready
    fork = _Fork(parent, same, seconds)
    try:
        while True:
            parent.send(fork.check(parent.recv()))
            if not fork.alive:
                fork = _Fork(parent, same, seconds)
    except (EOFError, ConnectionError):  # the parent closed the socket or is gone
        return
    finally:
        fork.kill()


class _Fork:
    """A fork of this process that calls the checker. It is killed when an answer takes too long."""

    def __init__(self, parent: Connection, same: Checker, seconds: float):
        self.seconds, self.alive = seconds, True
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_serve, args=(theirs, [self.pipe, parent], same, seconds))
        self.process.start()
        theirs.close()

    def check(self, pair: tuple[str, str]) -> Checked:
        try:
            return ask(self.pipe, pair, self.seconds)
        except Lost as lost:
            self.kill()
            return None, f"the checker: {lost} (exit code {self.process.exitcode})"

    def kill(self) -> None:
        self.alive = False
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, others: list[Connection], same: Checker, seconds: float) -> None:
    """Check answers until the pipe closes. Runs in the fork."""
    for other in others:  # the parent's ends: while the fork holds them, it cannot see them close
        other.close()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + MEMORY if hard == resource.RLIM_INFINITY else min(used + MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    while True:
        try:
            pair = pipe.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, 2 * seconds + 1)  # SIGPROF ends the process, even in C code
        try:
            verdict = same(*pair)
            if verdict not in (True, False):
                raise TypeError(f"returned {type(verdict).__name__}, not a bool")
            reply = bool(verdict), ""
        except MemoryError:
            os._exit(1)  # caches may still hold the memory, so the next answer gets a new fork
        except Exception as error:  # a checker may raise anything on model output
            reply = None, f"the checker raised {type(error).__name__}: {error}"[:300]
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(reply)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
