"""Print the figures of every round of a run and what it cost: flywheel summary RUN [--json]"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flywheel.errors import exit_code


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="flywheel summary",
        description="Print the figures of every round of a run and what it cost, read from its manifests.",
    )
    parser.add_argument("run", type=Path, help="a run directory, e.g. runs/chain")
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args(argv)

    def work() -> int:
        from flywheel.report import summary  # imported late to keep --help fast
        from flywheel.report.tables import print_all
        from flywheel.runs.run import Run

        data = summary(Run(args.run))
        print(json.dumps(data, indent=1, allow_nan=False)) if args.json else print_all(data)
        return 0

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
