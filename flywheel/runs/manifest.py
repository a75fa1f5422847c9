"""What a finished stage was made from and what it holds: fingerprints, manifests, their checks.

A manifest is written last, so a stage is finished if and only if it has one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flywheel.runs import shards
from flywheel.errors import UserError
from flywheel.ledger import total
from flywheel.recipe import Recipe
from flywheel.runs.shards import shard_dirs
from flywheel.runs.files import Damaged, read_json, read_rows, sha256, write_json

if TYPE_CHECKING:
    from flywheel.runs.run import Stage

FORMAT = 2  # of records, shards and manifests: another one cannot be continued
MANIFEST, FINGERPRINT = "manifest.json", "fingerprint.json"
SCRATCH = ("trainer",)  # a training's own checkpoints: not part of what the stage made
UNLISTED = (MANIFEST, FINGERPRINT, "claims.lock")
PATHS = ("model.base", "problems.path")  # what the files hold counts, not where they lie


Entry = tuple[int, "Stage", list[tuple[int, str]]]  # round, stage, the (round, stage) pairs that it reads


class Changed(UserError):
    """What a run was made from is not what it would be continued with."""


def stage_dir(run: Path, round: int, stage: str) -> Path:
    return run / f"round_{round}" / stage


def name_of(at: tuple[int, str]) -> str:
    return f"round_{at[0]}/{at[1]}"


def last_round(run: Path) -> int:
    """The latest round that has a directory; 0 if there is none."""
    return max((int(p.name[6:]) for p in run.glob("round_*") if p.name[6:].isdigit()), default=0)


# ---- fingerprints ------------------------------------------------------------------------


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, by dotted key. A list is a leaf."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flat(item, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), value


def recipe_leaves(recipe: Recipe, sections: Sequence[str]) -> dict[str, Any]:
    """The leaves below `sections` (dotted keys). Raises ValueError for a section that is none."""
    leaves = dict(flat(recipe.model_dump(mode="json")))
    for section in sections:
        if not any(key == section or key.startswith(f"{section}.") for key in leaves):
            raise ValueError(f"{section}: no section of a recipe")
    wanted = tuple(f"{section}." for section in sections)
    return {key: leaf for key, leaf in leaves.items() if f"{key}.".startswith(wanted) and key not in PATHS}


def source_files(recipe: Recipe) -> dict[str, str]:
    """sha256 of the base model's and the problem set's files. Raises UserError.

    A base that is no directory is a name on the Hub: it stands for itself.
    """
    base, problems = Path(recipe.model.base), Path(recipe.problems.path)
    if base.is_dir():
        if not (base / "config.json").is_file():
            raise UserError(f"model.base: {base} is not a model (it has no config.json)")
        if not any(base.glob("*.safetensors")):
            raise UserError(f"model.base: {base} has no *.safetensors; pickled weights (.bin, .pt) can run code and are not loaded: convert them with save_pretrained")
        files = {f"model.base/{p.name}": p for p in sorted(base.iterdir()) if p.suffix in (".json", ".safetensors", ".model")}
    elif base.is_absolute() or base.exists() or recipe.model.base.count("/") != 1:
        raise UserError(f"model.base: {base} is not a model directory, nor the name of one on the Hub (owner/name)")
    else:
        files = {}
    if problems.is_dir():
        inside = sorted(p for p in problems.rglob("*") if p.is_file() and not p.name.startswith("."))
        files |= {f"problems.path/{p.relative_to(problems)}": p for p in inside}
    elif problems.is_file():
        files["problems.path"] = problems
    else:
        raise UserError(f"problems.path: {problems} does not exist")
    sums = {name: sha256(path) for name, path in files.items()}
    return sums if base.is_dir() else {"model.base": recipe.model.base, **sums}


def fingerprint(recipe: Recipe, stage: Stage, sources: dict[str, str], inputs: Sequence[tuple[int, str]], run: Path) -> dict[str, Any]:
    """Everything that a stage's outcome depends on, flat. Raises Damaged if an input is not finished."""
    made_from = {}
    for at in inputs:
        path = stage_dir(run, *at) / MANIFEST
        if not path.is_file():
            raise Damaged(f"{path}: missing")
        made_from[f"input {name_of(at)}"] = sha256(path)
    return {"format": FORMAT, "seed": recipe.seed, **recipe_leaves(recipe, stage.sections), **sources, **made_from}


def difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key that differs, with both values ("nothing" where a side lacks it, or has null: a key that came later)."""
    for key in dict.fromkeys([*new, *old]):
        was, now = (_said(side.get(key, "nothing")) for side in (old, new))
        if was != now:
            return key, was, now
    return None


def _said(value: Any) -> Any:
    """Without what is null, in the mappings of a list too: an older run lacks the keys that have come since."""
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return [{k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else item for item in value]
    return value


def check_unchanged(directory: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises Changed, naming the key."""
    if found := difference(old, new):
        key, was, now = found
        if key.startswith("input "):
            raise Changed(f"{directory} was made from another {key.removeprefix('input ')} than the one there now; delete {directory} to redo it")
        if isinstance(was, str) and len(was) == 64:
            was, now = f"sha256 {was[:12]}", f"sha256 {now[:12]}"
        raise Changed(f"{directory} was made with {key} = {was!r}, now it is {now!r}: put it back, or start another run with --name")


def check_recipe(run: Path, recipe: Recipe) -> None:
    """The recipe of an existing run must be this one; `track` and the place of files may change. Raises Changed."""
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
    """None while the stage is not finished. Raises Damaged."""
    return read_json(stage_dir(run, round, stage) / MANIFEST)


def seal(
    directory: Path, made_from: dict[str, Any], figures: dict, seconds: float, ranks: int, place: int, of: int
) -> dict[str, Any]:
    """Write the manifest: from here on the stage is finished. `place`: 0 for the first of the round's `of` stages."""
    files = {str(p.relative_to(directory)): p for p in _listed(directory)}
    counts: dict[str, int] = {}
    for shard in shard_dirs(directory):
        for kind, count in read_json(shard / "shard.json")["counts"].items():
            counts[kind] = counts.get(kind, 0) + count
    spent = [row for name, path in files.items() if path.name.startswith("ledger") and path.suffix == ".parquet" for row in read_rows(path)]
    manifest = {
        "format": FORMAT,
        "round": int(directory.parent.name.removeprefix("round_")),
        "stage": directory.name,
        "place": place,
        "of": of,
        "counts": counts,
        "tokens": sum(sums.tokens for _, sums in total(spent)),
        "seconds": round(seconds, 3),
        "ranks": ranks,
        "figures": figures,
        "files": {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()},
        "fingerprint": made_from,
    }
    write_json(directory / MANIFEST, manifest)
    return manifest


def _listed(directory: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and (folder != str(directory) or name not in SCRATCH))
        found += [Path(folder, name) for name in sorted(names) if name not in UNLISTED and not name.startswith(".") and not name.endswith(".log")]
    return found


def check_files(directory: Path, manifest: dict[str, Any], contents: bool = False) -> None:
    """Every file that the manifest lists has its size (and, with `contents`, its checksum). Raises Damaged with the mend."""
    shards.check_files(directory, manifest["files"], f"delete {directory} to redo the stage", contents)


def check_run(run: Path, recipe: Recipe, sources: dict[str, str], stages: Sequence[Entry]) -> None:
    """Every stage that is there was made from what is there now, and its files are whole.

    `stages` in their order. Raises Damaged or Changed with the mend.
    """
    for entry in stages:
        try:
            check_stage(run, recipe, sources, entry)
        except Lost as lost:
            there = [str(d) for at in made_from(lost.input, stages) if (d := stage_dir(run, *at)).is_dir()]
            raise Damaged(f"{lost}; to redo it all: rm -r {' '.join(there)}") from None


class Lost(Damaged):
    """A stage that another was made from is not there."""

    input: tuple[int, str]


def check_stage(run: Path, recipe: Recipe, sources: dict[str, str], entry: Entry, contents: bool = False) -> bool:
    """Whether the stage is there, finished or not. Raises Damaged, Lost or Changed."""
    round, stage, reads = entry
    directory = stage_dir(run, round, stage.name)
    manifest = load(run, round, stage.name)
    started = manifest["fingerprint"] if manifest else read_json(directory / FINGERPRINT)
    if started is None:
        if shard_dirs(directory):
            raise Damaged(f"{directory}: holds shards, but neither {MANIFEST} nor {FINGERPRINT} says what they were made from; delete {directory} to redo the stage")
        return False
    for at in reads:
        if load(run, *at) is None:
            lost = Lost(f"{directory} was made from {name_of(at)}, which is not there (any more)")
            lost.input = at
            raise lost
    check_unchanged(directory, started, fingerprint(recipe, stage, sources, reads, run))
    if manifest:
        check_files(directory, manifest, contents)
    return True


def made_from(at: tuple[int, str], stages: Sequence[Entry]) -> list[tuple[int, str]]:
    """The stages that were made from `at`, directly or not, in their order."""
    gone = {at}
    for round, stage, reads in stages:
        if gone & set(reads):
            gone.add((round, stage.name))
    return [(round, stage.name) for round, stage, _ in stages if (round, stage.name) in gone - {at}]
