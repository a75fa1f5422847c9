"""Bring a run to the end of a round: accelerate launch -m flywheel.iterate --round 3

Finished work is skipped, unfinished work is continued, and nothing is computed twice.
Rank 0 decides and prints; the other ranks follow its orders. Every stage runs in its own
process (flywheel.runs.isolate).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flywheel.errors import UserError, explain
from flywheel.runs.isolate import PRELOAD

if TYPE_CHECKING:
    from flywheel.recipe import Recipe

PARENT = os.getppid()  # the launcher: read before imports take seconds, in which it may end
PACKAGE = Path(__file__).resolve().parent
# Recipes and accelerate configs are inside an installed package, but next to the package in a checkout.
SHARE = PACKAGE / "share" if (PACKAGE / "share").is_dir() else PACKAGE.parent
AGAIN = "what is finished is kept; to continue, run the same command again"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="flywheel iterate",
        description="Bring a run to the end of a round: sample, verify, distil, evaluate, and again. "
        "The same command, run again, continues an interrupted run: what is finished is kept.",
        epilog="On several processes or GPUs, with the same options: "
        "accelerate launch --config_file $(flywheel config ddp) -m flywheel.iterate",
    )
    p.add_argument(
        "--recipe",
        metavar="FILE|NAME",
        help=f"a YAML recipe, or the name of one that ships: {', '.join(shipped('recipes'))} (default: chain)",
    )
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
    p.add_argument(
        "--force",
        action="store_true",
        help="start a new run even if the try-out of its base reads no answer or finds none right",
    )
    p.add_argument(
        "--no-test",
        action="store_true",
        help="leave out the stages that read test questions: for runs among which you still choose, by calibration"
        " questions; the same command without it adds them",
    )
    p.add_argument("--dry-run", action="store_true", help="print what would run and what it would cost, and end")
    return p


def main(
    argv: list[str] | None = None,
    *,
    stages: str = "flywheel.stages:stages",
    report: str = "flywheel.report",
    preload: tuple[str, ...] = PRELOAD,
    preflight: str | None = "flywheel.stages.kit:preflight",
    rehearsal: str | None = "flywheel.stages.rehearsal",
) -> int:
    """Run the command; returns the exit code.

    stages: `module:function(round) -> list[Stage]`. report: a module with `after_round(run, round)`,
    `summary(run)` and `print_round(summary, round)`. preload: modules that the fork server imports.
    preflight: `module:function(recipe)`, which returns ids of questions to leave out. rehearsal: a module with
    what `flywheel.runs.rehearsal` calls. Both come before a run is created, and may raise UserError.
    """
    args = parser().parse_args(argv)
    if args.round < 0:
        parser().error("--round: 0 or more")
    if args.no_test and not args.round:
        parser().error("--no-test: round 0 does nothing but test the base; name a later --round")
    if args.fork:
        if not args.name:
            parser().error("--fork: --name, the name of the new run, is missing")
        args.fork = next((p for p in (args.runs / args.fork, Path(args.fork)) if (p / "recipe.yaml").is_file()), None)
        if args.fork is None:
            parser().error("--fork: no run of that name or path")
        args.recipe = args.recipe or str(args.fork / "recipe.yaml")
    from flywheel.runs.loop import Loop, Stopped, signals  # imported late to keep --help fast
    from flywheel.runs.ranks import Ranks

    try:
        ranks = Ranks.from_env()
    except UserError as error:
        parser().error(str(error))
    loop = Loop(args, lambda: load_recipe(args), ranks, stages, report, preload, preflight, rehearsal, parent=PARENT)
    try:
        with signals():
            return loop.go()
    except Stopped as stop:
        name, at = signal.Signals(stop.args[0]).name, f" in {loop.at}" if loop.at else ""
        loop.failed(f"stopped by {name}{at}; {AGAIN}")
        return 128 + stop.args[0]
    except Exception as error:
        if (line := explain(error)) is None:
            loop.failed(f"{type(error).__name__}: {error}")
            raise
        loop.failed(line)
        return 1


def shipped(folder: str) -> dict[str, Path]:
    """Name -> path of the YAML files in `folder` (`recipes` or `accelerate_configs`) that ship with flywheel."""
    return {path.stem: path for path in sorted((SHARE / folder).rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file `name`, else the shipped recipe of that name. Raises UserError if there is neither."""
    path, recipes = Path(name), shipped("recipes")
    if name in recipes and not path.is_file():
        return recipes[name]
    if not path.exists():
        raise UserError(f"{name}: no such recipe file; recipes that ship: {', '.join(recipes)}")
    return path


def load_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe with its overrides applied, paths made absolute and models on the Hub downloaded, but for a dry run.

    Raises UserError, RecipeError.
    """
    from flywheel import recipe
    from flywheel.runs import hub
    from flywheel.search import strategies

    path = find_recipe(args.recipe or "chain")
    overrides = list(args.set)
    if args.problems:  # what the recipe says of its own questions does not fit others; --set may say it anew
        own = json.dumps(str(Path(args.problems).absolute()))
        overrides = [f"problems.{key}={{}}" for key in ("limits", "fields", "splits")]
        overrides += ["problems.answer=null", "problems.step_checker=null", *args.set]
        overrides += [f"problems.path={own}", "problems.format=jsonl"]
    loaded = recipe.load(path, overrides)
    folder = path.resolve().parent
    root = next((place.parent for place in (folder, *folder.parents) if place.name == "recipes"), folder)
    # a recipe may name functions of its project (checkers); a fork's recipe is in a run
    for project in (root, SHARE, Path.cwd()):
        if str(project) not in sys.path:
            # shipped code first: the current directory may contain a package `data` too
            sys.path.insert(0 if project == SHARE else len(sys.path), str(project))
    strategies.strategies(loaded.calibrate)  # raises for an unknown strategy or option
    base = located(loaded.model.base, root)
    if hub.is_name(base):
        base = hub.snapshot(base, loaded.model.revision, download=not args.dry_run)
    prm = loaded.prm
    if published := prm.published:
        model = located(published.model, root)
        if hub.is_name(model):
            model = hub.snapshot(model, None, download=not args.dry_run, key="prm.published.model")
        prm = prm.model_copy(update={"published": published.model_copy(update={"model": model})})
    return loaded.model_copy(
        update={
            "prm": prm,
            "model": loaded.model.model_copy(update={"base": base}),
            "problems": loaded.problems.model_copy(update={"path": located(loaded.problems.path, root)}),
        }
    )


def located(path: str, root: Path) -> str:
    """`path` made absolute, relative to the current directory or else to `root`; unchanged if in neither."""
    for found in (Path(path), root / path):
        if path and found.exists():
            return str(found.absolute())
    return path


if __name__ == "__main__":
    sys.exit(main())
