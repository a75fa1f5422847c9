"""Faults that a person can mend."""

from __future__ import annotations

import errno

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


class UserError(Exception):
    """One clear line for the user."""


class TooLong(UserError, ValueError):
    """A prompt and what is to be generated do not fit the model; nothing is ever cut to fit."""


class EngineDied(RuntimeError):
    """The engine cannot go on; the message says why, and the chunk's shard is not written."""


def explain(error: BaseException) -> str | None:
    """The one line that `error` has for a person; None where it is a bug (its traceback is wanted).

    A UserError speaks to a person; so do a full disk and a refused write.
    """
    if isinstance(error, UserError):
        return " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        where = error.filename or "the disk"
        return f"{where}: no room to write ({error.strerror}); free some space and run the same command again"
    if isinstance(error, OSError) and error.errno in NO_ACCESS:
        return f"{error.filename or 'a file'}: {(error.strerror or 'refused').lower()}"
    return None
