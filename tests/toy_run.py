"""The entry point on the toy stages, as a program of its own. TOY_SILENCE: seconds until a silent rank is gone."""

import os
import sys

from flywheel.iterate import main
from flywheel.runs import ranks

if __name__ == "__main__":
    ranks.SILENCE = float(os.environ.get("TOY_SILENCE", ranks.SILENCE))
    sys.exit(main(stages="toy_stages:stages", report="toy_stages", preload=(), preflight=None, rehearsal="toy_stages"))
