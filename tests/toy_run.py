"""The entry point on the toy stages, as a program of its own."""

import sys

from flywheel.iterate import main

if __name__ == "__main__":
    sys.exit(main(stages="toy_stages:stages", report="toy_stages", preload=(), preflight=None, rehearsal="toy_stages"))
