"""File systems that lie, for tests/chaos/hosts.py: Python runs this file first, if its folder is in PYTHONPATH.

STORAGE=nfs: a name below STORAGE_ROOT that this host looked up in vain stays absent for STORAGE_SECONDS, unless the
host makes it itself; what a host knows is in its folder STORAGE_HOST. Harsher than Linux, whose NFS client asks again
once the folder was listed. A listing is never out of date: opening a folder asks the server (close-to-open).
STORAGE=lustre: no file locks (ENOSYS). STORAGE=localflock: a lock keeps nobody out, as between two hosts.

Only Python's own calls are caught: what pyarrow opens in C++ was looked up by Python before.
"""

import builtins
import errno
import fcntl
import functools
import hashlib
import io
import os
import time

KIND, ROOT = os.environ.get("STORAGE"), os.environ.get("STORAGE_ROOT", "")
KNOWN, SECONDS = os.environ.get("STORAGE_HOST", ""), float(os.environ.get("STORAGE_SECONDS", 30))
real_stat, real_open, real_os_open = os.stat, io.open, os.open


def note(path: str) -> str:
    return os.path.join(KNOWN, hashlib.sha1(path.encode()).hexdigest())


def below(path: object) -> str | None:
    """The absolute path if it lies below the root."""
    if isinstance(path, int):  # an open file
        return None
    found = os.path.abspath(os.fsdecode(path))
    return found if found.startswith(ROOT + os.sep) else None


def look_up(path: object) -> None:
    """Raises FileNotFoundError for a name that is absent, or that this host believes absent, and notes it."""
    if (found := below(path)) is None:
        return
    parts = found[len(ROOT) + 1 :].split(os.sep)
    for i in range(len(parts)):
        name = os.path.join(ROOT, *parts[: i + 1])
        try:
            believed = time.time() - real_stat(note(name)).st_mtime < SECONDS
        except FileNotFoundError:
            believed = False
        if not believed:
            try:
                real_stat(name)
                continue
            except FileNotFoundError:
                os.close(real_os_open(note(name), os.O_CREAT | os.O_WRONLY))
                os.utime(note(name))
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def made(path: object) -> None:
    """The host makes this name itself."""
    if (found := below(path)) is not None and os.path.lexists(note(found)):
        os.unlink(note(found))


def asks(function, makes):
    """`function(path, ...)` after a look-up, or after `made` if `makes` says of its arguments that it makes a name."""

    @functools.wraps(function)
    def wrapped(path, *args, **kwargs):
        if kwargs.get("dir_fd") is None:
            made(path) if makes(*args, **kwargs) else look_up(path)
        return function(path, *args, **kwargs)

    return wrapped


def moved(function):
    @functools.wraps(function)
    def wrapped(src, dst, **kwargs):
        done = function(src, dst, **kwargs)
        made(dst)
        return done

    return wrapped


def refuse(*args):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


match KIND:
    case "nfs":
        os.stat = asks(os.stat, lambda *args, **kwargs: False)
        os.listdir = asks(os.listdir, lambda *args: False)
        os.scandir = asks(os.scandir, lambda *args: False)
        os.mkdir = asks(os.mkdir, lambda *args, **kwargs: True)
        os.open = asks(os.open, lambda flags, *args, **kwargs: bool(flags & os.O_CREAT))
        io.open = builtins.open = asks(io.open, lambda mode="r", *args, **kwargs: mode[0] in "wax")
        os.rename, os.replace = moved(os.rename), moved(os.replace)
    case "lustre":
        fcntl.lockf = refuse
    case "localflock":
        fcntl.lockf = lambda *args: None
