"""Write a run as one HTML page: flywheel report RUN [--out FILE]"""

from __future__ import annotations

import argparse
from pathlib import Path

from flywheel.errors import UserError, one_line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="flywheel report",
        description="Write a run as one HTML page without outside assets: tables, pictures, cost, questions and their"
        " solutions. The run may still be going on.",
    )
    parser.add_argument("run", type=Path, help="a run directory, e.g. runs/chain")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: RUN/report.html)")
    parser.add_argument("--questions", type=int, default=200, metavar="N", help="of each split (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.questions < 0:
        parser.error("--questions: 0 or more")

    def work() -> str:
        from flywheel.report.html import page  # imported late to keep --help fast
        from flywheel.runs.run import Run

        run, out = Run(args.run), args.out or args.run / "report.html"
        text = page(run, args.questions)
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror})") from None
        return f"{out}: {out.stat().st_size:,} bytes"

    return one_line(work)
