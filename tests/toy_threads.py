"""What a stage's process does with its cores."""

import json
import os
import time
from pathlib import Path


def used(seconds: float) -> str:
    """CPU ticks of each thread that multiplied matrices, as JSON."""
    import torch

    a, end = torch.randn(600, 600), time.monotonic() + seconds
    while time.monotonic() < end:
        a @ a
    ticks = [
        int(Path(f"/proc/self/task/{t}/stat").read_text().rpartition(")")[2].split()[11])
        for t in os.listdir("/proc/self/task")
    ]
    return json.dumps([t for t in ticks if t > 5])
