"""Fork a run: take over its finished stages that a changed recipe does not affect."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from flywheel.errors import UserError
from flywheel.recipe import Recipe
from flywheel.runs import manifest
from flywheel.runs.files import fence, sync_dir
from flywheel.runs.shards import shard_dirs
from flywheel.runs.stage import At, Scheduled


def fork(
    old: Path, new: Path, recipe: Recipe, sources: dict[str, str], plan: Sequence[Scheduled], dry: bool = False
) -> list[str]:
    """Link into `new` every finished stage of `old` whose fingerprint under `recipe` is unchanged.

    Files are hard-linked, or copied where links do not work; that is safe because finished stages are never modified.
    Stages that `new` already has are kept, so an interrupted fork can be continued. Returns a line per stage: taken
    over, or made anew and why; with `dry`, changes nothing. Raises UserError if a file of `old` is damaged.
    """
    lines, taken = [], set()
    for scheduled in plan:
        directory, name = manifest.stage_dir(new, *scheduled.at), manifest.name_of(scheduled.at)
        if (here := manifest.load(new, *scheduled.at)) or shard_dirs(directory):
            lines.append(f"{name}: already here")
            if here and here == manifest.load(old, *scheduled.at):
                taken.add(scheduled.at)
        elif why := made_anew(old, new, recipe, sources, scheduled, taken):
            lines.append(f"{name}: made anew ({why})")
        else:
            taken.add(scheduled.at)
            if not dry:
                take_over(manifest.stage_dir(old, *scheduled.at), directory)
            lines.append(f"{name}: taken over")
    return lines


def made_anew(
    old: Path, new: Path, recipe: Recipe, sources: dict[str, str], scheduled: Scheduled, taken: set[At]
) -> str:
    """Why the stage cannot be taken over from `old`; empty if it can. `taken`: stages taken over so far."""
    made = manifest.load(old, *scheduled.at)
    if made is None:
        return f"not finished in {old}"
    for at in scheduled.reads:
        if at not in taken and manifest.load(new, *at) is None:
            return f"it reads {manifest.name_of(at)}, which is made anew"
    inputs = old if taken.issuperset(scheduled.reads) else new
    if found := manifest.difference(made["fingerprint"], manifest.fingerprint(inputs, recipe, sources, scheduled)):
        key, was, now = found
        return f"{key} was {was!r}, is {now!r}"
    return ""


def take_over(source: Path, target: Path) -> None:
    """Link a finished stage's files to `target`, atomically. Raises UserError if a file is damaged."""
    made = manifest.load(source.parent.parent, int(source.parent.name.removeprefix("round_")), source.name)
    manifest.check_files(source, made, contents=True)
    scratch = target.with_name(f".{target.name}.fork")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        for name in (*made["files"], manifest.MANIFEST):
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source / name, scratch / name)
            except OSError:  # another file system, or one without links
                shutil.copy2(source / name, scratch / name)
        fence()
        shutil.rmtree(target, ignore_errors=True)  # a started stage without shards, if anything
        scratch.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be taken over from {source}: {error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sync_dir(target.parent)
