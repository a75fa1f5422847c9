"""The entry point on the toy stages, as a program of its own. TOY_SILENCE: seconds until a silent rank is gone.

TOY_FAULT=bug_between, killed_between: what befalls rank 0 between sample and label, which share their processes.
"""

import os
import signal
import sys
import time

from flywheel.iterate import main
from flywheel.runs import loop, ranks

brief = loop.brief


def broken(made: dict, *rest) -> str:
    if made["stage"] != "sample":
        return brief(made, *rest)
    if os.environ["TOY_FAULT"] == "killed_between":
        time.sleep(2.0)  # until the other rank waits for the next order
        os.kill(os.getpid(), signal.SIGKILL)
    return made["no such key"]


if __name__ == "__main__":
    if os.environ.get("TOY_FAULT", "").endswith("_between"):
        loop.brief = broken
    ranks.SILENCE = float(os.environ.get("TOY_SILENCE", ranks.SILENCE))
    sys.exit(main(stages="toy_stages:stages", report="toy_stages", preload=(), preflight=None, rehearsal="toy_stages"))
