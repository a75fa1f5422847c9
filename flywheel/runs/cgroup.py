"""What the control groups of this process leave it of the machine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cpu_quota(root: Path = ROOT, own: Path = OWN) -> float:
    """The CPUs that this process's cgroup and those above it may use (version 2); infinite without a quota."""
    least = math.inf
    for text in files("", "cpu.max", root, own):
        with suppress(ValueError):  # `max` is no number
            quota, period = text.split()
            least = min(least, int(quota) / int(period))
    return least


def memory(root: Path = ROOT, own: Path = OWN) -> int:
    """Bytes of memory that this machine has, or the least that a cgroup of this process (version 1 or 2) allows."""
    least = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for controller, name in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
        for text in files(controller, name, root, own):
            with suppress(ValueError):
                least = min(least, int(text))
    return least


def files(controller: str, name: str, root: Path, own: Path) -> Iterator[str]:
    """The contents of file `name` in this process's cgroup and in those above it; controller: "" in version 2."""
    lines = own.read_text().splitlines() if own.exists() else []
    groups = (line.split(":", 2)[1:] for line in lines)
    group = next((path.lstrip("/") for controllers, path in groups if controllers == controller), None)
    if group is None:
        return
    top = root / controller
    for folder in (top / group, *(top / group).parents):
        with suppress(OSError):  # no such file at the root of all groups
            yield (folder / name).read_text()
        if folder == top:
            break
