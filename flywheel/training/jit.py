"""Locks that killed builds of torch's C++ extensions left behind.

DeepSpeed compiles an operator when it starts. torch's lock for that is a file which exists while a process builds, so
after a kill every later training would wait for it for ever.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

LONGEST = 1800.0  # seconds that a build on another host may take

log = logging.getLogger(__name__)


def clear_stale_locks(root: Path, several_hosts: bool = False) -> list[Path]:
    """Remove the locks below `root` of builds that nobody goes on with; returns them.

    A build keeps its lock open, which /proc shows of this host's processes. `several_hosts`: another host may be
    building in the same folder, so its lock must also be older than any build takes.
    """
    cleared: list[Path] = []
    if not root.is_dir():
        return cleared
    with open(root / ".flywheel", "w") as guard:
        with suppress(OSError):  # a file system without locks: the ranks may then clear at the same time
            # only who holds this removes a stale lock, and while that is there torch makes no new one
            fcntl.flock(guard, fcntl.LOCK_EX)
        for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
            with suppress(FileNotFoundError):  # its build has just ended
                age = time.time() - lock.stat().st_mtime
                if not held_open(lock) and (age > LONGEST or not several_hosts):
                    lock.unlink()
                    cleared.append(lock)
                    log.warning("%s: left behind by a killed build, removed", lock)
    return cleared


def held_open(path: Path) -> bool:
    """Whether a process of this host that we may look into has `path` open."""
    wanted = str(path.resolve())
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # closed meanwhile, or another user's
            if os.readlink(entry) == wanted:
                return True
    return False
