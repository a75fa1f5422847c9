"""Try a recipe's base and prompts before a run: flywheel try RECIPE

A few training questions are sampled and shown with what was read as their steps and answers, then the base is trained
for some steps and what comes of it is served: every kind of stage in miniature. Nothing is written.
"""

from __future__ import annotations

import argparse
import sys

from flywheel.errors import exit_code
from flywheel.iterate import load_recipe, shipped
from flywheel.runs.isolate import PRELOAD


def main(argv: list[str] | None = None, *, preload: tuple[str, ...] = PRELOAD) -> int:
    """Run the command; returns the exit code: 1 if no answer could be read or none is right."""
    p = argparse.ArgumentParser(
        prog="flywheel try",
        description="Sample a few training questions by a recipe's base model and show what is read as steps and"
        " answers, and the shares of right, unparsable and truncated solutions; then train it for some steps and search"
        " with the result. A new run does the same before its first stage.",
    )
    p.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?",
        help=f"a YAML recipe, or the name of one that ships: {', '.join(shipped('recipes'))} (default: chain)",
    )
    p.add_argument("--problems", metavar="FILE", help="your own questions, as for flywheel iterate")
    p.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="change recipe keys"
    )
    p.set_defaults(dry_run=False)
    args = p.parse_args(argv)
    return exit_code(lambda: rehearsed(args, preload))


def rehearsed(args: argparse.Namespace, preload: tuple[str, ...]) -> int:
    from flywheel.runs import isolate, manifest
    from flywheel.runs.estimate import short
    from flywheel.runs.loop import Stopped, signals
    from flywheel.runs.processes import call_alone, threads_of
    from flywheel.runs.ranks import Ranks
    from flywheel.runs.rehearsal import rehearse

    try:
        recipe, ranks = load_recipe(args), Ranks()
        manifest.source_files(recipe)
        with signals():
            isolate.start_server(threads_of(ranks, recipe), preload)
            call_alone(ranks, recipe, "flywheel.stages.kit:preflight", {"recipe": recipe}, "the recipe and its model")
            if rates := rehearse(ranks, recipe, "flywheel.stages.rehearsal", force=False):
                print(
                    f"one process samples {rates.generate:.0f} and scores {rates.read:.0f} tokens/s, a training reads"
                    f" {rates.train:.0f}; memory {short(rates.serve_memory)}B to search, {short(rates.train_memory)}B"
                    " to train"
                )
    except Stopped as stop:
        return 128 + stop.args[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
