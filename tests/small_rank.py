"""`flywheel.iterate`, of whose ranks the second has no memory for micro batches of more than two texts."""

from __future__ import annotations

import os
import sys

from flywheel.iterate import main
from flywheel.runs.isolate import PRELOAD

if __name__ == "__main__":
    sys.exit(main(preload=(*PRELOAD, "tests.small_rank")))
elif os.environ.get("RANK") == "1":  # in the rank's fork server, whose children train
    from tests.training.training_worker import small_device

    small_device(2)
