"""Errors that a user can fix, and their one-line messages."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


class UserError(Exception):
    """An error that the user can fix; the message is one line."""


class StartAgain(UserError):
    """A stage has to be started again on all ranks, and will then go on; the message says why."""


class TooLong(UserError, ValueError):
    """A prompt plus the tokens to generate exceeds the model's context; nothing is ever truncated to fit."""


class EngineDied(RuntimeError):
    """The engine cannot continue; the message says why, and the chunk's shard is not written."""


def explain(error: BaseException) -> str | None:
    """A one-line message for a UserError, a full disk or a denied access; None for any other error.

    None means a bug in the program: print the traceback.
    """
    if isinstance(error, UserError):
        return " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        where = error.filename or "the disk"
        return f"{where}: no room to write ({error.strerror}); free some space and run the same command again"
    if isinstance(error, OSError) and error.errno in NO_ACCESS:
        return f"{error.filename or 'a file'}: {(error.strerror or 'refused').lower()}"
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def exit_code(work: Callable[[], int], program: str = "flywheel") -> int:
    """What `work` returns; what a person can mend ends as one line on stderr and 1. Other exceptions pass."""
    try:
        return work()
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        print(f"{program}: {line}", file=sys.stderr, flush=True)
        return 1


def one_line(work: Callable[[], str], program: str = "flywheel") -> int:
    """As `exit_code`, of a command that prints one line: what `work` returns."""
    return exit_code(lambda: print(work()) or 0, program)
