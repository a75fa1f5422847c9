"""The entry point on the toy stages, as a program of its own. TOY_SILENCE: seconds until a silent rank is gone.

TOY_FAULT=between: a bug of rank 0 between the stages sample and label, which share their processes.
"""

import os
import sys

from flywheel.iterate import main
from flywheel.runs import loop, ranks

brief = loop.brief


def broken(made: dict, *rest) -> str:
    return brief(made, *rest) if made["stage"] != "sample" else made["no such key"]


if __name__ == "__main__":
    if os.environ.get("TOY_FAULT") == "between":
        loop.brief = broken
    ranks.SILENCE = float(os.environ.get("TOY_SILENCE", ranks.SILENCE))
    sys.exit(main(stages="toy_stages:stages", report="toy_stages", preload=(), preflight=None, rehearsal="toy_stages"))
