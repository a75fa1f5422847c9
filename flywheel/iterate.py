"""Bring a run to the end of a round: accelerate launch -m flywheel.iterate --round 3

Finished work is skipped, unfinished work is continued, and nothing is computed twice.
Rank 0 decides and prints; the other ranks follow its orders. Every stage runs in a process
of its own (flywheel.runs.isolate).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flywheel.errors import explain
from flywheel.runs.isolate import PRELOAD

if TYPE_CHECKING:
    from flywheel.recipe import Recipe

DEFAULT = "recipes/chain.yaml"
AGAIN = "what is finished is kept; to continue, run the same command again"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="accelerate launch -m flywheel.iterate",
        description="Bring a run to the end of a round: sample, verify, distill, evaluate, and again. "
        "Run the same command again to continue an interrupted run.",
    )
    p.add_argument("--recipe", help=f"YAML recipe (default: {DEFAULT})")
    p.add_argument("--name", help="name of the run (default: the recipe's name)")
    p.add_argument("--runs", default="runs", type=Path, help="directory that holds the runs (default: %(default)s)")
    p.add_argument(
        "--round",
        default=1,
        type=int,
        metavar="R",
        help="the round to reach; 0 evaluates the base (default: %(default)s)",
    )
    p.add_argument(
        "--problems",
        metavar="FILE",
        help="your own questions: JSONL with the fields question, answer and, if you like, id, split",
    )
    p.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change recipe keys; may be repeated",
    )
    p.add_argument(
        "--fork",
        metavar="OLD",
        help="start the run --name with all that the run OLD (a name in --runs, or a directory) has finished and the"
        " change of recipe does not touch; the recipe is OLD's unless --recipe says otherwise",
    )
    p.add_argument("--dry-run", action="store_true", help="say what would run and what it would cost, and end")
    return p


def main(
    argv: list[str] | None = None,
    *,
    stages: str = "flywheel.stages:stages",
    report: str = "flywheel.report",
    preload: tuple[str, ...] = PRELOAD,
    preflight: str | None = "flywheel.stages.kit:preflight",
) -> int:
    """The exit code. `stages` is `module:function(round) -> list[Stage]`; `report` a module with
    `after_round(run, round)`, `summary(run)` and `print_round(summary, round)`; `preflight` is
    `module:function(recipe)`, asked before a run is made."""
    args = parser().parse_args(argv)
    if args.round < 0:
        parser().error("--round: 0 or more")
    if args.fork:
        if not args.name:
            parser().error("--fork: --name, the name of the new run, is missing")
        args.fork = next((p for p in (args.runs / args.fork, Path(args.fork)) if (p / "recipe.yaml").is_file()), None)
        if args.fork is None:
            parser().error("--fork: no run of that name or path")
        args.recipe = args.recipe or str(args.fork / "recipe.yaml")
    from flywheel.runs.loop import Loop, Stopped, signals  # not before --help is answered
    from flywheel.runs.ranks import Ranks

    ranks = Ranks.from_env()
    loop = Loop(args, lambda: load_recipe(args), ranks, stages, report, preload, preflight)
    try:
        with signals():
            return loop.lead() if ranks.rank == 0 else loop.follow()
    except Stopped as stop:
        name = signal.Signals(stop.args[0]).name
        loop.failed(f"stopped by {name}{loop.where}; {AGAIN}")
        return 128 + stop.args[0]
    except Exception as error:
        if (line := explain(error)) is None:
            loop.failed(f"{type(error).__name__}: {error}")
            raise
        loop.failed(line)
        return 1


def find_recipe(name: str) -> Path:
    """As given from the current directory, else from the project that holds this package."""
    here, project = Path(name), Path(__file__).parents[1] / name
    return here if here.exists() or not project.exists() else project


def load_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe with its overrides and with absolute paths. Raises RecipeError."""
    from flywheel import recipe
    from flywheel.search import strategies

    path = find_recipe(args.recipe or DEFAULT)
    own = (
        [f"problems.path={json.dumps(str(Path(args.problems).absolute()))}", "problems.format=jsonl"]
        if args.problems
        else []
    )
    whole = (
        ["problems.limits={}", "problems.step_checker=null"] if args.problems else []
    )  # the recipe's are for its own set; --set may limit again
    loaded = recipe.load(path, [*whole, *args.set, *own])
    folder = path.resolve().parent
    root = folder.parent if folder.name == "recipes" else folder
    if str(root) not in sys.path:
        sys.path.append(str(root))  # a recipe may name functions of its project (checkers)
    strategies.strategies(loaded.calibrate)  # raises for an unknown strategy or option
    return loaded.model_copy(
        update={
            "model": loaded.model.model_copy(update={"base": located(loaded.model.base, root)}),
            "problems": loaded.problems.model_copy(update={"path": located(loaded.problems.path, root)}),
        }
    )


def located(path: str, root: Path) -> str:
    """A recipe's path: from the current directory, else from the recipe's project; else as it is."""
    for found in (Path(path), root / path):
        if found.exists():
            return str(found.absolute())
    return path


if __name__ == "__main__":
    sys.exit(main())
