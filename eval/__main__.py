"""Run a study of finished runs: python -m eval STUDY RUN... [options].

It prints JSON, the command in it; what is kept in eval/results/ is that output. `python -m eval STUDY --help` says
more.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

from flywheel.errors import explain
from flywheel.runs.files import plain


def questions() -> dict[str, str]:
    """Name -> first line of the docstring of every study, without importing it: some studies import torch."""
    files = sorted((Path(__file__).parent / "studies").glob("[!_]*.py"))
    return {file.stem: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).split("\n")[0] for file in files}


def help_text() -> str:
    listed = [f"  {name:18s} {question}" for name, question in questions().items()]
    return "\n".join([__doc__, "studies:", *listed])


def main(argv: Sequence[str] | None = None) -> int:
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(help_text())
        return 0
    if name not in questions():
        print(f"python -m eval: no study {name!r}; known: {', '.join(questions())}", file=sys.stderr)
        return 2
    study = import_module(f"eval.studies.{name}")
    parser = argparse.ArgumentParser(
        prog=f"python -m eval {name}", description=study.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    study.add_arguments(parser)
    try:
        args = parser.parse_args(rest)
        args.command = " ".join(["python -m eval", name, *rest])
        with redirect_stdout(sys.stderr):  # some libraries log to stdout, such as DeepSpeed when imported
            found = study.measure(args)
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        print(f"eval {name}: {line}", file=sys.stderr)
        return 1
    print(json.dumps(plain({"command": args.command, **found}), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
