"""The data that `python -m eval study` samples for a run into RUN/studies/round_R/: records, sizes and folders."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from eval.shared import add_runs, folder
from flywheel.errors import UserError
from flywheel.runs.files import read_json, sha256, write_json
from flywheel.runs.reading import Written
from flywheel.runs.run import Run
from flywheel.runs.shards import shard_dirs
from flywheel.search.strategies import AnyStrategy

R = TypeVar("R")
BUDGETS = (4, 16, 64)  # generations; the default


@dataclass(frozen=True, slots=True)
class Difficult:
    """One question's difficulty, from samples that are used for nothing else."""

    question_id: str
    right: int  # number of right ones among `samples`
    samples: int
    predicted: float  # mean PRM score of the scored samples
    tokens: int  # of all samples
    predicted_tokens: int  # of the scored samples, scoring included
    level: (
        float  # difficulty label of the problem set: number of steps in the chain set, MATH's level; 0 if it has none
    )
    prompt_bin: int  # named by the round's difficulty head; 1 is the easiest
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """One sample with its PRM score. `shape`: see `eval.studies.study.shape`; "" for an ordinary one."""

    question_id: str
    answer: str | None
    score: float
    correct: bool
    cost: int
    score_cost: int
    cached: int
    shape: str


@dataclass(frozen=True, slots=True)
class Tried:
    """The result of one strategy on one question."""

    question_id: str
    strategy: AnyStrategy
    budget: int
    correct: bool
    tokens: int
    cached: int  # tokens of `tokens` that the prefix cache served
    odd: float  # fraction of candidates with an odd shape
    winner: str  # shape of the best candidate with the winning answer; "none" if there is no answer
    by_attempt: tuple[bool, ...] = ()  # whether each attempt of a single revision chain is right


# ---- sizes and folders -------------------------------------------------------------------


def add_sizes(parser: argparse.ArgumentParser, count: str = "+") -> None:
    """Add the options that identify a study's data; shared by `study`, `claims` and `flops_matched`."""
    add_runs(parser, count=count)
    parser.add_argument("--questions", type=int, help="the first so many test questions (all)")
    parser.add_argument("--oracle", type=int, default=512, help="samples that bin a question (%(default)s)")
    parser.add_argument("--judged", type=int, default=64, help="of these, how many the PRM judges (%(default)s)")
    parser.add_argument("--pool", type=int, default=256, help="judged samples for best-of-N (%(default)s)")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), metavar="N", help="generations")


def check_sizes(args: argparse.Namespace) -> None:
    """Raises UserError if the options of `add_sizes` contradict each other."""
    if not 1 <= args.judged <= args.oracle:
        raise UserError(f"--judged {args.judged}: 1 to --oracle ({args.oracle}) wanted")
    if wrong := [b for b in args.budgets if b & (b - 1) or not 1 <= b <= args.pool]:
        raise UserError(
            f"--budgets {wrong[0]}: a power of two, and at most --pool ({args.pool}), wanted:"
            " best-of-N is read off the pool"
        )


def titles(args: argparse.Namespace) -> dict[str, str]:
    """Part -> name of its folder, which contains the sizes, so that other sizes have their own folders."""
    budgets = "_".join(map(str, sorted(args.budgets)))
    tail = f"_first_{args.questions}" if args.questions else ""
    names = (f"difficulty_{args.oracle}_{args.judged}", f"pool_{args.pool}", f"trials_{budgets}", f"adaptive_{budgets}")
    return {name.partition("_")[0]: name + tail for name in names}


def check_origin(directory: Path, run: Run, round: int) -> None:
    """Raises UserError if a part was sampled with other models than the round's present ones.

    Compares sha256 of the manifests of the round's models; an empty part records them.
    """
    models = [
        (round, "train_prm"),
        (round, "choose_reviser"),
        (round, "train_head"),
        (round, "sample"),
        *((r, "gate") for r in range(1, round)),
    ]
    files = [run.path(stage, r) / "manifest.json" for r, stage in models]
    note, now = directory / "made_from.json", {str(path.relative_to(run.root)): sha256(path) for path in files}
    if not shard_dirs(directory) and not note.is_file():
        write_json(note, now)
    was = read_json(note) or {}
    if was != now:
        changed = next(name for name in now if was.get(name) != now[name])
        raise UserError(f"{directory}: drawn with another {changed}; remove {directory.parent} and draw again")


def read_part(run: Run, args: argparse.Namespace, part: str, cls: type[R]) -> list[R]:
    """The records of one part of a study of a run. Raises UserError if it is not finished."""
    directory = folder(run, args.round) / titles(args)[part]
    if not (directory / "finished").is_file():
        raise UserError(f"{directory}: not drawn; python -m eval study {run.root} --round {args.round} draws it")
    check_origin(directory, run, args.round)
    return list(Written(directory).records(cls))


def read_all(run: Run, args: argparse.Namespace) -> tuple[list[Difficult], list[Drawn], list[Tried]]:
    """All records of a study of a run. Raises UserError if a part is not finished."""
    tried = [row for part in ("trials", "adaptive") for row in read_part(run, args, part, Tried)]
    return read_part(run, args, "difficulty", Difficult), read_part(run, args, "pool", Drawn), tried


def largest(run: Run, args: argparse.Namespace) -> argparse.Namespace:
    """`args` with the largest number of questions for which all parts are finished, unless they set a number."""
    parent = folder(run, args.round)

    def is_drawn(asked: argparse.Namespace) -> bool:
        return all((parent / title / "finished").is_file() for title in titles(asked).values())

    if args.questions or is_drawn(args):
        return args
    sizes = {int(path.parent.name.rpartition("_first_")[2]) for path in parent.glob("trials_*_first_*/finished")}
    found = [argparse.Namespace(**{**vars(args), "questions": n}) for n in sorted(sizes, reverse=True)]
    return next(filter(is_drawn, found), args)  # if no study is complete, `read_all` says what is missing
