"""The process behind grading.Grader: `python -m flywheel.check_worker module:function SECONDS`.

Reads `[gold, answer]` as JSON lines on stdin and answers `{"same": bool}` or `{"error": text}`.
It holds itself to limits on memory and processor time, so that it dies even if the grader was
killed and nobody is left to kill it; the grader's own clock is the tighter one.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys

from flywheel import grading
from flywheel.errors import UserError

MEMORY = 2 << 30  # bytes of address space above what the imported checker needs


def main(checker: str, seconds: float) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a checker prints must not look like a verdict

    def reply(**fields: object) -> None:
        out.write(json.dumps(fields) + "\n")
        out.flush()

    try:
        same = grading.load_function(checker)
    except UserError as error:
        return reply(error=str(error))
    if checker == grading.DEFAULT_CHECKER:
        import math_verify  # noqa: F401  now, so that its import is not on the first answer's clock
    _limit_memory()
    reply(ready=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, 2 * seconds + 1)  # SIGPROF's default action ends the process
        try:
            verdict = same(gold, answer)
            if verdict not in (True, False):
                raise TypeError(f"returned {type(verdict).__name__}, not a bool")
        except MemoryError:
            return reply(error="out of memory", leave=True)
        except Exception as error:  # a checker may raise anything on what a model wrote
            reply(error=f"the checker raised {type(error).__name__}: {error}"[:300])
        else:
            reply(same=bool(verdict))
        signal.setitimer(signal.ITIMER_PROF, 0)


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
