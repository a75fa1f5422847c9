"""A build of DeepSpeed's operator that was killed does not stop the trainings after it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

from flywheel.training.jit import LONGEST, clear_stale_locks

BUILD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("building", flush=True)
time.sleep(600)
"""


def test_a_lock_is_kept_while_its_build_runs_and_cleared_when_that_was_killed(tmp_path):
    from torch.utils.file_baton import FileBaton

    lock = tmp_path / "py311_cpu/deepspeed_shm_comm/lock"
    lock.parent.mkdir(parents=True)
    build = subprocess.Popen([sys.executable, "-c", BUILD, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert build.stdout.readline() == "building\n"
        assert clear_stale_locks(tmp_path) == [] and lock.exists()
    finally:
        build.kill()
        build.wait()
    waiting = threading.Thread(target=FileBaton(str(lock)).wait, daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()  # as every later training would, for ever
    assert clear_stale_locks(tmp_path) == [lock] and not lock.exists()
    waiting.join(5)
    assert not waiting.is_alive()
    assert clear_stale_locks(tmp_path / "nothing was ever built") == []


def test_with_several_hosts_a_lock_that_another_may_hold_is_kept_as_long_as_a_build_may_take(tmp_path):
    lock = tmp_path / "fused_adam/lock"
    lock.parent.mkdir()
    lock.touch()
    assert clear_stale_locks(tmp_path, several_hosts=True) == []
    os.utime(lock, (time.time() - LONGEST - 1,) * 2)
    assert clear_stale_locks(tmp_path, several_hosts=True) == [lock]
