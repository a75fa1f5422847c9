"""`python -m flywheel.summary RUN [--json]`: everything that a run has found and spent."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flywheel.errors import UserError
from flywheel.report.summary import summary
from flywheel.report.tables import print_all
from flywheel.runs.run import Run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flywheel.summary", description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory, e.g. runs/chain")
    parser.add_argument("--json", action="store_true", help="machine-readable, on stdout")
    args = parser.parse_args(argv)
    try:
        data = summary(Run(args.run))
    except UserError as error:
        print(f"flywheel.summary: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(data, indent=1, allow_nan=False))
    else:
        print_all(data)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
