"""Check the files and fingerprints of a run: flywheel verify RUN

Compares every file of every stage with its recorded checksum, and every stage's fingerprint with
the current recipe, problems, model and input stages. Changes nothing. Exits with 1 if anything has
to be redone, and says how.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flywheel.errors import UserError, explain
from flywheel.runs.shards import check_shard, shard_dirs

if TYPE_CHECKING:
    from flywheel.runs.stage import Stage


def verify(run: Path, stages: Callable[[int], Sequence[Stage]], say: Callable[[str], None] = print) -> list[Path]:
    """Report one line per stage with `say`; returns the paths to delete so that the next launch redoes them.

    Raises UserError if `run` is not a run.
    """
    from flywheel.runs import manifest  # imported late to keep --help fast
    from flywheel.runs.run import Run
    from flywheel.runs.stage import schedule

    recipe = Run(run).recipe
    sources = manifest.source_files(recipe)
    plan = schedule(stages, manifest.last_round(run))
    redo: dict[Path, str] = {}
    for scheduled in plan:
        at, directory = scheduled.at, manifest.stage_dir(run, *scheduled.at)
        if directory in redo:
            say(f"{manifest.name_of(at):24s} to redo: {redo[directory]}")
            continue
        try:
            if not manifest.check_stage(run, recipe, sources, scheduled, contents=True):
                continue
        except UserError as error:
            redo[directory] = str(error)
            say(f"{manifest.name_of(at):24s} to redo: {error}")
            redo |= {
                path: f"made from {manifest.name_of(at)}"
                for later in manifest.made_from(at, plan)
                if (path := manifest.stage_dir(run, *later)).is_dir()
            }
            continue
        if (made := manifest.load(run, *at)) is not None:
            say(f"{manifest.name_of(at):24s} whole: {len(made['files'])} files")
        else:
            say(f"{manifest.name_of(at):24s} unfinished: {unfinished(directory, redo)}")
    return list(redo)


def unfinished(directory: Path, redo: dict[Path, str]) -> str:
    """The state of a stage without a manifest, in words. Adds its damaged shards to `redo`."""
    whole, of = 0, 0
    bad = []
    for shard in shard_dirs(directory):
        try:
            of = check_shard(shard).get("of", 0)
            whole += 1
        except UserError as error:
            redo[shard] = str(error)
            bad.append(str(error))
    if not shard_dirs(directory):
        return "nothing finished in it yet"
    return f"{whole} whole chunks{f' of {of}' if of else ''}" + "".join(f"; {line}" for line in bad)


def main(argv: Sequence[str] | None = None, stages: str = "flywheel.stages:stages") -> int:
    from flywheel.runs.isolate import resolve

    parser = argparse.ArgumentParser(
        prog="flywheel verify",
        description="Read every file of a run and compare it with its checksum, and every stage with the recipe, "
        "questions, model and stages that it was made from. Changes nothing; prints what would have to be redone.",
    )
    parser.add_argument("run", type=Path, help="a run directory, e.g. runs/chain")
    args = parser.parse_args(argv)
    try:
        redo = verify(args.run, resolve(stages))
    except UserError as error:
        print(f"flywheel: {explain(error)}", file=sys.stderr)
        return 1
    if redo:
        print(
            f"flywheel: {len(redo)} to redo; delete them, and the run's own command makes them again: "
            f"rm -r {' '.join(map(str, redo))}",
            file=sys.stderr,
        )
        return 1
    print("whole: nothing to redo")
    return 0


if __name__ == "__main__":
    sys.exit(main())
