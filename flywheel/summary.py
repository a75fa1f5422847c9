"""Print every figure of a run and its cost: flywheel summary RUN [--json]"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flywheel.errors import UserError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="flywheel summary", description="Print every figure of a run and what it cost, read from its manifests."
    )
    parser.add_argument("run", type=Path, help="a run directory, e.g. runs/chain")
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args(argv)
    try:
        from flywheel.report import summary  # imported late to keep --help fast
        from flywheel.report.tables import print_all
        from flywheel.runs.run import Run

        data = summary(Run(args.run))
    except UserError as error:
        print(f"flywheel: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(data, indent=1, allow_nan=False))
    else:
        print_all(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
