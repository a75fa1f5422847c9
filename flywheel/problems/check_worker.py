"""The process behind grading.Grader: `python -m flywheel.problems.check_worker module:function SECONDS`.

Reads `[gold, answer]` as JSON lines on stdin and answers `{"same": bool}` or `{"error": text}`.
The checker runs in a fork of this process, which is killed when it hangs and forked again, in
milliseconds: importing a checker takes a second, and a model that writes what makes sympy hang
writes it often. The fork holds itself to limits on memory and processor time, so that one that
computes dies even if everybody else was killed; one that waits ends with the pipe it reads from.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable

from flywheel.errors import UserError
from flywheel.problems import grading

MEMORY = 2 << 30  # bytes of address space above what the imported checker needs


def main(checker: str, seconds: float) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # were it ignored, a fork could not be waited for
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a checker prints must not look like a verdict

    def reply(line: bytes) -> None:
        out.write(line)
        out.flush()

    try:
        same = grading.load_function(checker)
    except UserError as error:
        return reply(_line(error=str(error)))
    if checker == grading.DEFAULT_CHECKER:
        same("x^2+1", "1+x^2+y")  # imports and sets up all that it needs here, once, and on no answer's clock
    reply(_line(ready=True))
    fork = None
    for line in sys.stdin.buffer:
        fork = fork or _Fork(same, seconds, out.fileno())
        answer = fork.ask(line)
        if not fork.alive:
            fork = None
        reply(answer)


class _Fork:
    """A copy of this process, the checker imported, that checks answers until one is too much for it."""

    def __init__(self, same: Callable[[str, str], bool], seconds: float, out: int):
        self.seconds, self.alive = seconds, True
        self.pipe, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            self.pipe.close()
            os.close(out)  # neither our questions nor our verdicts are the checker's to touch
            os.close(0)
            _limit_memory()
            _serve(theirs, same, seconds)
            os._exit(0)
        theirs.close()

    def ask(self, question: bytes) -> bytes:
        """The reply line; afterwards the fork may be gone (`alive`)."""
        try:
            answer = self.heard(question)
        except TimeoutError:
            return self.end(f"no verdict within {self.seconds:g} s")
        except OSError:
            return self.end("the checker died")
        if json.loads(answer).get("leave"):
            self.end("")
        return answer

    def heard(self, question: bytes) -> bytes:
        """Raises TimeoutError, and OSError where the fork is gone."""
        deadline, answer = time.monotonic() + self.seconds, b""
        self.pipe.sendall(question)
        while not answer.endswith(b"\n"):
            if not select.select([self.pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            if not (piece := self.pipe.recv(65536)):
                raise BrokenPipeError
            answer += piece
        return answer

    def end(self, why: str) -> bytes:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pipe.close()
        self.alive = False
        return _line(error=why)


def _serve(pipe: socket.socket, same: Callable[[str, str], bool], seconds: float) -> None:
    for line in pipe.makefile("rb"):
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, 2 * seconds + 1)  # SIGPROF's default action ends the process
        try:
            verdict = same(gold, answer)
            if verdict not in (True, False):
                raise TypeError(f"returned {type(verdict).__name__}, not a bool")
        except MemoryError:
            return pipe.sendall(_line(error="out of memory", leave=True))
        except Exception as error:  # a checker may raise anything on what a model wrote
            reply = _line(error=f"the checker raised {type(error).__name__}: {error}"[:300])
        else:
            reply = _line(same=bool(verdict))
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.sendall(reply)


def _line(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def _limit_memory() -> None:
    try:
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except FileNotFoundError:  # no /proc: this system does not enforce RLIMIT_AS either
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = now + MEMORY if hard == resource.RLIM_INFINITY else min(now + MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
