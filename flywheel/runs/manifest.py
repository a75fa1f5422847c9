"""Fingerprints (what a stage is made from), manifests (what a finished stage holds), and their checks.

A manifest is written last, so a stage is finished if and only if it has one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flywheel.errors import UserError
from flywheel.ledger import total
from flywheel.problems import gym
from flywheel.problems.sources import digest
from flywheel.recipe import Recipe
from flywheel.runs import shards
from flywheel.runs.files import Damaged, names_in, read_json, read_rows, sha256, write_json
from flywheel.runs.hub import SUFFIXES, is_name
from flywheel.runs.shards import shard_dirs
from flywheel.runs.stage import At, Scheduled

FORMAT = 2  # of records, shards and manifests; a run of another format cannot be continued
MANIFEST, FINGERPRINT = "manifest.json", "fingerprint.json"
# a training's checkpoints to resume from, and the examples that it made of other stages: not part of its result
SCRATCH = ("trainer", "examples")
UNLISTED = (MANIFEST, FINGERPRINT, "claims.lock")
APART = "prm.published"  # of the stages that read `prm`, only those that name it read it: train_prm does not
# fingerprints hold the contents of these files, not their paths; and where servers run changes no result
PATHS = ("model.base", "problems.path", "prm.published.model", "engine.servers")


class Changed(UserError):
    """A stage's fingerprint differs from the one it would get now."""


def stage_dir(run: Path, round: int, stage: str) -> Path:
    return run / f"round_{round}" / stage


def name_of(at: At) -> str:
    return f"round_{at[0]}/{at[1]}"


def last_round(run: Path) -> int:
    """The latest round that has a directory; 0 if there is none."""
    return max((int(p.name[6:]) for p in run.glob("round_*") if p.name[6:].isdigit()), default=0)


# ---- fingerprints ------------------------------------------------------------------------


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of the leaves of nested mappings. A list is a leaf."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flat(item, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), value


def recipe_leaves(recipe: Recipe, sections: Sequence[str] | None) -> dict[str, Any]:
    """The recipe's leaves below `sections` (dotted keys; None: all). Raises ValueError for an unknown section."""
    leaves = dict(flat(recipe.model_dump(mode="json")))
    for section in sections or ():
        if not any(key == section or key.startswith(f"{section}.") for key in leaves):
            raise ValueError(f"{section}: no section of a recipe")
    wanted = ("",) if sections is None else tuple(f"{section}." for section in sections)
    if sections is not None and APART not in sections:
        leaves = {key: leaf for key, leaf in leaves.items() if not f"{key}.".startswith(f"{APART}.")}
    return {key: leaf for key, leaf in leaves.items() if f"{key}.".startswith(wanted) and key not in PATHS}


def source_files(recipe: Recipe) -> dict[str, str]:
    """sha256 by file of the base model and the problem set; for a base not yet downloaded (a dry run), its name.

    Raises UserError if either does not exist or is not of the expected kind.
    """
    base, problems = Path(recipe.model.base), Path(recipe.problems.path)
    if base.is_dir():
        if not (base / "config.json").is_file():
            raise UserError(f"model.base: {base} is not a model (it has no config.json)")
        if not any(base.glob("*.safetensors")):
            raise UserError(
                f"model.base: {base} has no *.safetensors; pickled weights (.bin, .pt) can run code and are not loaded:"
                " convert them with save_pretrained"
            )
        files = model_files("model.base", base)
    elif not is_name(recipe.model.base):
        raise UserError(f"model.base: {base} is not a model directory, nor the name of one on the Hub (owner/name)")
    else:
        files = {}
    made = {}  # of what is in no file: the version, or the content
    if published := recipe.prm.published:
        found = model_files(f"{APART}.model", Path(published.model)) if Path(published.model).is_dir() else {}
        files |= found
        made |= {} if found else {f"{APART}.model": published.model}
    if recipe.problems.format == "reasoning_gym":
        made["reasoning-gym"] = gym.version()
    elif problems.is_dir():
        inside = sorted(p.relative_to(problems) for p in problems.rglob("*") if p.is_file())
        shown = [p for p in inside if not any(part.startswith(".") for part in p.parts)]
        files |= {f"problems.path/{p}": problems / p for p in shown}
    elif problems.is_file():
        files["problems.path"] = problems
    elif recipe.problems.format == "datasets":  # on the Hub
        made["problems.path"] = digest(recipe.problems)
    else:
        raise UserError(f"problems.path: {problems} does not exist")
    sums = {name: sha256(path) for name, path in files.items()} | made
    return sums if base.is_dir() else {"model.base": recipe.model.base, **sums}


def public(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON for others to read: absolute paths are their last part, addresses their number."""
    data = recipe.model_dump(mode="json")
    for *sections, key in (path.split(".") for path in PATHS):
        spec = data
        for section in sections:
            spec = spec.get(section) or {}
        match spec.get(key):
            case str(path) if Path(path).is_absolute():
                spec[key] = Path(path).name
            case list(servers):
                spec[key] = len(servers)
    return data


def model_files(key: str, folder: Path) -> dict[str, Path]:
    return {f"{key}/{p.name}": p for p in sorted(folder.iterdir()) if p.suffix in SUFFIXES}


def fingerprint(run: Path, recipe: Recipe, sources: dict[str, str], scheduled: Scheduled) -> dict[str, Any]:
    """Everything that a stage's result depends on, by dotted key. Raises Damaged if an input is not finished."""
    made_from = {}
    for at in scheduled.reads:
        path = stage_dir(run, *at) / MANIFEST
        if not path.is_file():
            raise Damaged(f"{path}: missing")
        made_from[f"input {name_of(at)}"] = sha256(path)
    sections = scheduled.stage.sections
    leaves = recipe_leaves(recipe, sections)
    if sections is not None and APART not in sections:
        sources = {key: value for key, value in sources.items() if not key.startswith(APART)}
    return {"format": FORMAT, "seed": recipe.seed, **leaves, **sources, **made_from}


def difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """(key, old value, new value) of the first difference; "nothing" for a missing value, checksums shortened."""
    for key in dict.fromkeys([*new, *old]):
        was, now = old.get(key, "nothing"), new.get(key, "nothing")
        if was != now:
            return key, *(f"sha256 {v[:12]}" if isinstance(v, str) and len(v) == 64 else v for v in (was, now))
    return None


def check_unchanged(directory: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises Changed, naming the first key that differs."""
    if found := difference(old, new):
        key, was, now = found
        if key.startswith("input "):
            other = key.removeprefix("input ")
            raise Changed(
                f"{directory} was made from another {other} than the one there now; delete {directory} to redo it"
            )
        raise Changed(
            f"{directory} was made with {key} = {was!r}, now it is {now!r}:"
            " put it back, or start another run with --name"
            " (and --fork, to take over what this does not touch)"
        )


def check_recipe(run: Path, recipe: Recipe) -> None:
    """Raises Changed if an existing run has another recipe, apart from `track` and PATHS; Damaged if unreadable."""
    import yaml

    try:
        stored = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (yaml.YAMLError, UnicodeDecodeError):
        stored = None
    if not isinstance(stored, dict):
        raise Damaged(f"{run / 'recipe.yaml'}: not a recipe; it was altered or cut short")
    old, new = (
        {key: leaf for key, leaf in flat(data) if key not in PATHS and key.partition(".")[0] != "track"}
        for data in (stored, recipe.model_dump(mode="json"))
    )
    check_unchanged(run, old, new)


# ---- manifests ---------------------------------------------------------------------------


def load(run: Path, round: int, stage: str) -> dict[str, Any] | None:
    """None while the stage is not finished. Raises Damaged, and Changed for a stage of another version's run."""
    path = stage_dir(run, round, stage) / MANIFEST
    found = read_json(path) if MANIFEST in names_in(path.parent) else None
    if found is not None and found.get("format") != FORMAT:
        raise Changed(f"{path}: of format {found.get('format')}, made by another version; this one reads {FORMAT}")
    return found


def seal(
    run: Path, scheduled: Scheduled, made_from: dict[str, Any], figures: dict, seconds: float, ranks: int
) -> dict[str, Any]:
    """Write and return the manifest, which makes the stage finished."""
    directory = stage_dir(run, *scheduled.at)
    files = {str(p.relative_to(directory)): p for p in _listed(directory)}
    counts: dict[str, int] = {}
    sums: dict[Path, str] = {}  # taken when the shards were written; the next stage compares them with the files
    for shard in shard_dirs(directory):
        about = read_json(shard / "shard.json")
        for kind, count in about["counts"].items():
            counts[kind] = counts.get(kind, 0) + count
        sums |= {shard / name: listed["sha256"] for name, listed in about["files"].items()}
    ledgers = [path for path in files.values() if path.name.startswith("ledger") and path.suffix == ".parquet"]
    manifest = {
        "format": FORMAT,
        "round": scheduled.round,
        "stage": scheduled.stage.name,
        "place": scheduled.place,
        "of": scheduled.of,
        "counts": counts,
        "tokens": sum(sums.tokens for _, sums in total(row for path in ledgers for row in read_rows(path))),
        "seconds": round(seconds, 3),
        "ranks": ranks,
        "figures": figures,
        "files": {
            name: {"bytes": path.stat().st_size, "sha256": sums.get(path) or sha256(path)}
            for name, path in files.items()
        },
        "fingerprint": made_from,
    }
    write_json(directory / MANIFEST, manifest)
    return manifest


def _listed(directory: Path) -> list[Path]:
    """The files that a stage made, without scratch, logs and locks."""
    found = []
    for folder, folders, names in os.walk(directory):
        scratch = SCRATCH if folder == str(directory) else ()
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in scratch)
        made = [name for name in sorted(names) if name not in UNLISTED and not name.startswith(".")]
        found += [Path(folder, name) for name in made if not name.endswith(".log")]
    return found


def check_files(directory: Path, manifest: dict[str, Any], contents: bool = False) -> None:
    """Raises Damaged if a file that the manifest lists is missing or has another size or (`contents`) checksum."""
    shards.check_files(directory, manifest["files"], f"delete {directory} to redo the stage", contents)


def check_run(run: Path, recipe: Recipe, sources: dict[str, str], plan: Sequence[Scheduled]) -> None:
    """Check all existing stages: fingerprints match what is there now, and files have their sizes.

    `plan`: the stages in order. Raises Damaged or Changed; the message says how to mend it.
    """
    for scheduled in plan:
        try:
            check_stage(run, recipe, sources, scheduled)
        except Lost as lost:
            there = [str(d) for at in made_from(lost.input, plan) if (d := stage_dir(run, *at)).is_dir()]
            raise Damaged(f"{lost}; to redo it all: rm -r {' '.join(there)}") from None


class Lost(Damaged):
    """An input of an existing stage is missing."""

    input: At


def check_stage(
    run: Path, recipe: Recipe, sources: dict[str, str], scheduled: Scheduled, contents: bool = False
) -> bool:
    """Check one stage; returns whether it has been started. Raises Damaged, Lost or Changed."""
    directory = stage_dir(run, *scheduled.at)
    manifest = load(run, *scheduled.at)
    started = manifest["fingerprint"] if manifest else read_json(directory / FINGERPRINT)
    if started is None:
        if shard_dirs(directory):
            raise Damaged(
                f"{directory}: holds shards, but neither {MANIFEST} nor {FINGERPRINT} says what they were made from;"
                f" delete {directory} to redo the stage"
            )
        return False
    for at in scheduled.reads:
        if load(run, *at) is None:
            lost = Lost(f"{directory} was made from {name_of(at)}, which is not there (any more)")
            lost.input = at
            raise lost
    check_unchanged(directory, started, fingerprint(run, recipe, sources, scheduled))
    if manifest:
        check_files(directory, manifest, contents)
    return True


def made_from(at: At, plan: Sequence[Scheduled]) -> list[At]:
    """The stages that depend on `at`, directly or indirectly, in the order of `plan`."""
    gone = {at}
    for scheduled in plan:
        if gone & set(scheduled.reads):
            gone.add(scheduled.at)
    return [scheduled.at for scheduled in plan if scheduled.at in gone - {at}]
