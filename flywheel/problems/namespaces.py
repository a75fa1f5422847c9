"""Isolate a process by Linux namespaces, a root of its own and limits, for `judge.py`. It imports nothing of flywheel.

Every call to the kernel is checked: OSError names the one that failed, and whoever called runs nothing then.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress

NOBODY = 65534
VISIBLE = ("/usr", "/lib", "/lib64", sys.base_prefix, "/dev/null", "/dev/urandom")
NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NET = 0x20000, 0x4000000, 0x8000000, 1 << 28, 1 << 29, 1 << 30
NOSUID, NODEV, BIND, RECURSIVE, PRIVATE = 2, 4, 0x1000, 0x4000, 1 << 18  # of mount(2)
PARENT_DEATH, DUMPABLE, NO_NEW_PRIVILEGES = 1, 4, 38  # of prctl(2)

libc = ctypes.CDLL(None, use_errno=True)


def kernel(name: str, *args: object) -> None:
    if getattr(libc, name)(*(arg.encode() if isinstance(arg, str) else arg for arg in args)) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def leave(root: bool) -> None:
    """Leave the namespaces of the machine. Only root can without a user namespace of its own."""
    spaces = NEW_MOUNTS | NEW_UTS | NEW_IPC | NEW_PIDS | NEW_NET
    ids = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
    kernel("unshare", spaces if root else spaces | NEW_USER)
    for file, text in () if root else ids.items():
        write(f"/proc/self/{file}", text)


def write(file: str, text: str) -> None:
    with open(file, "w") as stream:
        stream.write(text)


def new_root() -> None:
    """Make a root that holds `VISIBLE`, read-only, and an empty /tmp in memory, and let go of the old one."""
    os.umask(0o022)
    write("/proc/self/oom_score_adj", "1000")  # if the machine runs out of memory, this ends first
    with suppress(OSError):  # /proc/sys may be read-only; then shared memory is bounded by the machine's alone
        write("/proc/sys/kernel/shmmni", "0")
    kernel("mount", None, "/", None, RECURSIVE | PRIVATE, None)
    root = "/proc"  # a folder that every machine has; no /proc is wanted in the new root
    kernel("mount", "tmpfs", root, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    for path in VISIBLE:
        place = root + path
        if os.path.exists(place) or not os.path.exists(path):
            continue
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if os.path.islink(path) and path != sys.base_prefix:  # /lib is usr/lib on most machines
            os.symlink(os.readlink(path), place)
            continue
        os.mkdir(place) if os.path.isdir(path) else os.close(os.open(place, os.O_CREAT))
        kernel("mount", path, place, None, BIND | RECURSIVE, None)
    os.mkdir(root + "/tmp")
    read_only = (ctypes.c_uint64 * 4)(1 | 2)  # and nosuid
    kernel(
        "syscall", ctypes.c_long(442), -100, root, 0x8000, read_only, ctypes.c_size_t(32)
    )  # mount_setattr, all below
    kernel("mount", "tmpfs", root + "/tmp", "tmpfs", NOSUID | NODEV, "size=64m,nr_inodes=4k,mode=777")
    os.chdir(root)
    kernel("pivot_root", ".", ".")
    kernel("umount2", ".", 2)  # the old root, which now lies over the new one
    os.chdir("/tmp")


def confine(root: bool, limits: dict[str, int]) -> None:
    """Give up all privilege for good, then set limits."""
    os.setsid()  # the process group is the machine's: a signal to it would leave the namespace
    with suppress(OSError):  # a new session keyring: the old one may hold keys; where keyctl is refused, it is to all
        kernel("syscall", ctypes.c_long({"x86_64": 250}.get(os.uname().machine, 219)), 1, None)
    if root:  # root is exempt from the limit on processes
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    kernel("unshare", NEW_USER)  # the limit on processes then counts these alone
    kernel("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    kernel("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    for name, limit in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (limit, limit))


def silence(*files: int) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for file in files:
        os.dup2(null, file)
