"""How a study's command ends: JSON on stdout, the command in it, or one clear line and 1."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout

from flywheel.errors import UserError, explain
from flywheel.runs.files import plain


def answer(measure: Callable[[], dict]) -> int:
    """Print what `measure` returns; libraries that log to stdout (DeepSpeed, as it is imported) go to stderr."""
    try:
        with redirect_stdout(sys.stderr):
            found = measure()
    except UserError as error:
        print(explain(error), file=sys.stderr)
        return 1
    print(json.dumps(plain({"command": " ".join(["python", *sys.orig_argv[1:]]), **found}), indent=1))
    return 0
