"""What a stage is, what it sees, and how one rank carries it out.

A stage computes; this module writes. A sampling stage is cut into chunks that the ranks
draw; a training stage runs on all ranks at once; `finish` then runs on rank 0. The
manifest, written last by `iterate`, makes the stage finished.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from flywheel.runs import manifest
from flywheel.errors import EngineDied
from flywheel.records import ModelRef
from flywheel.errors import UserError
from flywheel.ledger import Ledger
from flywheel.recipe import Recipe
from flywheel.records import Problem, Role, Split
from flywheel.runs.shards import Shards, shard_dirs
from flywheel.runs.files import encode_ledger, plain, read_table, write_file, write_table

__all__ = ["Context", "Stage", "TestSplitForbidden", "inputs", "perform", "read_table", "write_table"]

R = TypeVar("R")


class TestSplitForbidden(UserError):
    """A stage that is not for measuring asked for test questions."""

    __test__ = False  # its name is not a test's


@dataclass(frozen=True)
class Stage:
    """One step of a round. Either `items` and `work` (sampling) or `train`; `finish` may follow.

    sections: dotted recipe keys whose change makes the stage another one.
    inputs: the stages it reads: "sample" (of the same round), "gate@-1" (of the previous
    round), "evaluate@0" (of that round), "harvest@all" (of this and every earlier round); with
    a "?" behind, except where that is round 0, which is the base and has been trained by nothing.
    items: ids of the work items, in a fixed order; `work` turns a chunk of them into records
    (dataclasses), with the `tools` (engines) that each rank opens once.
    train: called on every rank, its environment ready for torch.distributed; resumable.
    finish: on rank 0, when all shards exist; its figures go into the manifest.
    """

    name: str
    sections: tuple[str, ...]
    inputs: tuple[str, ...]
    items: Callable[[Context], list[str]] | None = None
    tools: Callable[[Context], AbstractContextManager[Any]] | None = None
    work: Callable[[Context, Any, Sequence[str]], Iterator[object]] | None = None
    train: Callable[[Context], dict] | None = None
    finish: Callable[[Context], dict] | None = None
    test_split: bool = False

    def __post_init__(self) -> None:
        if bool(self.train) == bool(self.items and self.work):
            raise ValueError(f"stage {self.name}: either items and work, or train")


def inputs(stage: Stage, round: int) -> list[tuple[int, str]]:
    """(round, stage) pairs that `stage` may read in `round`, itself apart. A round before 0 is dropped."""
    pairs = []
    for item in stage.inputs:
        name, _, at = item.rstrip("?").partition("@")
        rounds = range(1, round + 1) if at == "all" else [round + int(at or 0) if at.startswith("-") or not at else int(at)]
        pairs += [(r, name) for r in rounds if r >= item.endswith("?") and (r, name) != (round, stage.name)]
    return list(dict.fromkeys(pairs))


def entries(stages: Callable[[int], Sequence[Stage]], rounds: int) -> list[manifest.Entry]:
    """All stages of rounds 0..rounds in order, each with those of its inputs that exist."""
    by_round = [stages(r) for r in range(rounds + 1)]
    there = {(r, stage.name) for r, group in enumerate(by_round) for stage in group}
    return [(r, stage, [at for at in inputs(stage, r) if at in there]) for r, group in enumerate(by_round) for stage in group]


class Context:
    """All that a stage sees of its run."""

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        round: int,
        stage: Stage,
        rank: int = 0,
        world: int = 1,
        tell: Callable[[int, int, dict], None] = lambda done, total, figures: None,
    ):
        self.recipe, self.run, self.round, self.stage = recipe, Path(run), round, stage
        self.rank, self.world = rank, world
        self.ledger = Ledger(stage.name, round)
        self.dir = self.path(stage.name)
        self._tell = tell
        self._before = self._chunk = self._items = 0  # where `progress` stands among the items

    def path(self, stage: str, round: int | None = None) -> Path:
        return manifest.stage_dir(self.run, self.round if round is None else round, stage)

    def relative(self, path: str | Path) -> Path:
        """`path` as seen from this stage's directory, so that a run can be moved."""
        return Path(path).relative_to(self.dir)

    def seed(self, *parts: object) -> int:
        """63 bits by identity: run seed, round, stage and `parts`, wherever and whenever asked."""
        text = "\x1f".join(map(str, (self.recipe.seed, self.round, self.stage.name, *parts)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1

    # ---- what may be read ----

    def problems(self, *splits: Split) -> list[Problem]:
        """The problems of these splits, in the file's order. Raises TestSplitForbidden."""
        if not splits:
            raise ValueError("which splits?")
        if Split.TEST in splits and not self.stage.test_split:
            raise TestSplitForbidden(f"stage {self.stage.name} must not see the test split")
        return [problem for split in splits for problem in self._problems.get(split, [])]

    @cached_property
    def _problems(self) -> dict[Split, list[Problem]]:
        from flywheel.problems.sources import load

        return load(self.recipe.problems)

    def _finished(self, stage: str, round: int | None) -> dict[str, Any]:
        at = (self.round if round is None else round, stage)
        if at not in inputs(self.stage, self.round):
            raise ValueError(f"stage {self.stage.name} reads {manifest.name_of(at)} but does not name it among its inputs")
        if (found := manifest.load(self.run, *at)) is None:
            raise UserError(f"{manifest.name_of(at)} is not finished, and {self.stage.name} needs it")
        return found

    def read(self, cls: type[R], stage: str, round: int | None = None) -> Iterator[R]:
        """Records of a finished stage (or of this one, in `finish`), in the order of its items."""
        if (stage, round) not in ((self.stage.name, None), (self.stage.name, self.round)):
            self._finished(stage, round)
        for shard in shard_dirs(self.path(stage, round)):
            if (table := shard / f"{cls.__name__}.parquet").is_file():  # a chunk may yield none of a kind
                yield from read_table(table, cls)

    def figures(self, stage: str, round: int | None = None) -> dict:
        """The figures of a finished stage."""
        return self._finished(stage, round)["figures"]

    def model(self, role: Role, round: int | None = None) -> ModelRef:
        """The model of `role` after `round` (this one if None).

        A policy stands until a later round's gate lets another pass, so policy_1 may still be
        the policy of round 3. A PRM that was refused leaves the un-finetuned base to judge. Raises UserError if a gate on the way is not finished.
        """
        round, base = self.round if round is None else round, self.recipe.model.base
        match role:
            case Role.POLICY:
                for r in range(round, 0, -1):
                    if (gate := manifest.load(self.run, r, "gate")) is None:
                        raise UserError(f"the policy of round {r} is not decided: {manifest.name_of((r, 'gate'))} is not finished")
                    if gate["figures"]["passed"]:
                        return ModelRef(f"policy_{r}", base, str(self.path("distill", r) / "adapter"))
                return ModelRef("policy_0", base)
            case Role.PRM:
                if (trained := manifest.load(self.run, round, "train_prm")) and trained["figures"].get("refused"):
                    return ModelRef("policy_0", base)
                return ModelRef(f"prm_{round}", base, str(self.path("train_prm", round) / "adapter"))
            case Role.REVISER:
                return ModelRef(f"reviser_{round}", base, str(self.path("choose_reviser", round) / "adapter"))

    # ---- what is told ----

    def progress(self, done: int, total: int, **figures: float) -> None:
        """`done` of `total` of a training, or of the chunk at hand."""
        if self._items:
            done, total = self._before + self._chunk * done // max(1, total), self._items
        self._tell(done, total, figures)

    def _at_chunk(self, shards: Shards, chunk: int) -> None:
        self._items = sum(map(len, shards.chunks))
        self._before, self._chunk = sum(len(shards.chunks[i]) for i in shards.done()), chunk
        self._tell(self._before, self._items, {})


def perform(ctx: Context) -> dict:
    """One rank's part of the stage, in the stage's own process; rank 0 returns the figures."""
    ctx.dir.mkdir(parents=True, exist_ok=True)
    figures: dict = {}
    if ctx.stage.train:
        figures |= ctx.stage.train(ctx)
    else:
        fill(ctx)
    if ctx.stage.finish and ctx.rank == 0:
        figures |= ctx.stage.finish(ctx)
    if rows := ctx.ledger.take():  # of a training, or charged after the last chunk
        write_file(ctx.dir / ("ledger.parquet" if ctx.rank == 0 else f"ledger_{ctx.rank}.parquet"), encode_ledger(rows))
    return plain(figures)


def chunks(items: Sequence[str], size: int) -> list[list[str]]:
    """`items` in chunks of at most `size`, all of nearly one length: a short last one would keep one process waiting for another."""
    count = -(-len(items) // size)
    return [list(items[i * len(items) // count : (i + 1) * len(items) // count]) for i in range(count)]


def fill(ctx: Context) -> None:
    """Draw missing chunks and write their shards until all exist. The tools open at the first one.

    An engine that dies is opened again, once a chunk; what it had spent stays in the ledger.
    Raises EngineDied with the questions of the chunk if it dies again.
    """
    shards = Shards(ctx.dir, chunks(ctx.stage.items(ctx), ctx.recipe.engine.chunk))
    with ExitStack() as stack:
        stack.callback(shards.close)
        tools = stack.enter_context(Tools(ctx))
        for index in shards.claims(idle=lambda: ctx._at_chunk(shards, 0)):
            started, chunk = time.monotonic(), shards.chunks[index]

            def write(index: int = index, started: float = started, chunk: Sequence[str] = chunk) -> None:
                ctx._at_chunk(shards, len(chunk))
                shards.write(index, ctx.stage.work(ctx, tools.open(), chunk), ctx.ledger.take, lambda: time.monotonic() - started)

            try:
                write()
            except EngineDied as first:
                print(f"{first}; opened again for {len(chunk)} questions from {chunk[0]}", flush=True)
                tools.drop()
                try:
                    write()
                except EngineDied as second:
                    raise EngineDied(f"{second} (twice, on questions {' '.join(chunk[:20])}{' ...' if len(chunk) > 20 else ''})") from second
        ctx._at_chunk(shards, 0)


class Tools:
    """A stage's tools, opened when they are first wanted and again after a `drop`."""

    def __init__(self, ctx: Context):
        self.ctx, self.stack, self.tools = ctx, ExitStack(), None

    def __enter__(self) -> Tools:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def open(self) -> Any:
        if self.tools is None and self.ctx.stage.tools:
            self.tools = self.stack.enter_context(self.ctx.stage.tools(self.ctx))
        return self.tools

    def drop(self) -> None:
        """Close what is open. What a dead engine says as it closes is noted and changes nothing."""
        stack, self.stack, self.tools = self.stack, ExitStack(), None
        try:
            stack.close()
        except Exception as error:
            print(f"while it was closed: {type(error).__name__}: {error}", flush=True)
