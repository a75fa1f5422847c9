"""One process's part of a stage: draw chunks, keep the engines full with them, write their shards; or train."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from flywheel.errors import EngineDied
from flywheel.ledger import Ledger
from flywheel.recipe import Recipe
from flywheel.runs.files import encode_ledger, plain, wait_for_names, write_file
from flywheel.runs.isolate import resolve
from flywheel.runs.run import Context
from flywheel.runs.shards import Shards

T = TypeVar("T")
CHUNKS = 256  # of a stage, as many as 64 ranks need to end at about the same time
TELL_EVERY = 1.0  # seconds


def perform_stage(
    recipe: Recipe,
    run: Path,
    round: int,
    stage: str,
    stages: str,
    rank: int,
    world: int,
    cores: Sequence[int] | None,
    leave_open: bool,
    tell: Callable[[int, int, dict], None],
    ask: Callable[[str], Any],
) -> dict:
    """Entry point of a stage's process: its part of the stage, on `cores` (None: all cores of the rank).

    `stages`: `module:function(round)` that returns the stages of a round. leave_open: see `Context`. Rank 0 returns
    the figures.
    """
    if cores:
        os.sched_setaffinity(0, cores)
    found = next(s for s in resolve(stages)(round) if s.name == stage)
    return perform(Context(recipe, run, round, found, rank, world, tell, ask, leave_open))


def perform(ctx: Context) -> dict:
    """One rank's part of the stage; rank 0 returns the figures."""
    ctx.dir.mkdir(parents=True, exist_ok=True)
    figures: dict = {}
    with ctx.beating():
        if ctx.stage.train:
            figures |= ctx.stage.train(ctx)
        else:
            shards = fill(ctx)
            ctx.wait_for_others()
            if ctx.rank == 0:
                wait_for_names(shards.dir, [shards.path(i).name for i in range(len(shards.chunks))])
        if ctx.stage.finish and ctx.rank == 0:
            figures |= ctx.stage.finish(ctx)
    if rows := ctx.ledger.take():  # charged by a training, or after the last chunk
        write_file(ctx.dir / ("ledger.parquet" if ctx.rank == 0 else f"ledger_{ctx.rank}.parquet"), encode_ledger(rows))
    return plain(figures)


def cut(items: Sequence[T], size: int) -> list[list[T]]:
    """`items` in chunks of at most `size` and nearly equal length, so that no process waits for a longer last chunk."""
    count = -(-len(items) // size)
    return [list(items[i * len(items) // count : (i + 1) * len(items) // count]) for i in range(count)]


def chunks(items: Sequence[str], size: int) -> list[list[str]]:
    """`items` in chunks of at most `size`; 0: in CHUNKS chunks, of 8 to 64 items."""
    return cut(items, size or min(64, max(8, -(-len(items) // CHUNKS))))


def fill(ctx: Context, chunk: int | None = None) -> Shards:
    """Draw missing chunks and write their shards until none is left to draw. Engines are opened at the first chunk.

    `chunk`: items per chunk, `engine.chunk` if None. When an engine dies, it is reopened and the chunks that were under
    way are made again; the tokens that were spent on them stay in the ledger. Raises EngineDied, naming the questions,
    if it dies twice on a chunk.
    """
    shards = Shards(ctx.dir, chunks(ctx.stage.items(ctx), ctx.chunk if chunk is None else chunk), ctx.draw)
    with Opened(ctx) as opened:
        Flow(ctx, shards, opened).run()
    return shards


class Flow:
    """The chunks that this process has under way, each with a ledger of its own."""

    def __init__(self, ctx: Context, shards: Shards, opened: Opened):
        self.ctx, self.shards, self.opened = ctx, shards, opened
        self.sizes = [len(chunk) for chunk in shards.chunks]
        self.todo: list[int] = []  # drawn, not yet begun (again); the last is the next
        self.ledgers: dict[int, Ledger] = {}  # by chunk under way
        self.died: Counter[int] = Counter()  # on how many of its chunks an engine died
        self.writing, self.written = 0, time.monotonic()  # shards; the time of the last one
        self.told, self.missing = 0.0, len(self.sizes)  # the time and the missing shards of the last count

    def run(self) -> None:
        """Make chunks until there are none left to draw. No engine is opened if there is none."""
        self.tell()
        self.todo = [first] if (first := self.shards.draw()) is not None else []
        self.written = time.monotonic()
        while self.todo:
            try:
                self.opened.get().stream(self.next, self.enough)
            except EngineDied as error:
                self.todo = self.lost(error)
        self.tell()

    def next(self) -> Coroutine[Any, Any, None] | None:
        index = self.todo.pop() if self.todo else self.shards.draw()
        return None if index is None else self.make(index)

    def enough(self) -> bool:
        """Whether no chunk is to be begun: a shard is being written, or this process has its share of those missing.

        Else the first process to come would take a small stage whole.
        """
        under_way = len(self.ledgers.keys() - set(self.todo))
        return self.writing > 0 or under_way * self.ctx.world >= self.missing

    async def make(self, index: int) -> None:
        """Make the records of a chunk and write its shard.

        While the disk is waited for, the engines go on with the other chunks; none is begun, or a kill could lose many.
        """
        ledger = self.ledgers.setdefault(index, Ledger(self.ctx.stage.name, self.ctx.round))
        ledger.verdicts.clear()  # of an attempt whose engine died
        with self.ctx.ledger.charged_to(ledger):
            records = await self.ctx.stage.work(self.ctx, self.opened.get(), self.shards.chunks[index])
        # chunks overlap: the time since the last one ended adds up to the time that this process spent
        seconds, self.written = time.monotonic() - self.written, time.monotonic()
        self.writing += 1
        try:
            await asyncio.to_thread(self.shards.write, index, records, ledger.rows(), seconds, ledger.verdicts)
        finally:
            self.writing -= 1
        del self.ledgers[index]
        self.tell(TELL_EVERY)

    def lost(self, error: EngineDied) -> list[int]:
        """The chunks to make again after the engine died. Raises EngineDied if it died before on one of them."""
        self.opened.drop(error)
        done = set(self.shards.done())  # a shard that was being written is whole
        self.ledgers = {index: ledger for index, ledger in self.ledgers.items() if index not in done}
        again = sorted({*self.ledgers, *self.todo})  # an engine that did not open has the first in `todo`
        self.died.update(again)
        if twice := [q for index in again if self.died[index] > 1 for q in self.shards.chunks[index]]:
            named = " ".join(twice[:20]) + (" ..." if len(twice) > 20 else "")
            raise EngineDied(f"{error} (twice, on questions {named})") from error
        questions = [q for index in again for q in self.shards.chunks[index]]
        print(f"{error}; opened again for {len(questions)} questions from {' '.join(questions[:1])}", flush=True)
        return again[::-1]

    def tell(self, pause: float = 0.0) -> None:
        """Count and report finished shards of all processes, unless that was less than `pause` seconds ago."""
        if time.monotonic() - self.told >= pause:
            self.told, done = time.monotonic(), self.shards.done()
            self.missing = len(self.sizes) - len(done)
            self.ctx.progress(sum(self.sizes[index] for index in done), sum(self.sizes))


class Opened:
    """Holds the result of a stage's `open` (its engines): opened at the first `get`, and again after a `drop`."""

    def __init__(self, ctx: Context):
        self.ctx, self.stack, self.value = ctx, ExitStack(), None

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.__exit__(*error)

    def get(self) -> Any:
        if self.value is None and self.ctx.stage.open:
            self.value = self.stack.enter_context(self.ctx.stage.open(self.ctx))
        return self.value

    def drop(self, error: EngineDied) -> None:
        """Close what is open because of `error`. Errors while closing are only printed: the engine may be dead."""
        stack, self.stack, self.value = self.stack, ExitStack(), None
        try:
            stack.__exit__(type(error), error, error.__traceback__)
        except Exception as other:  # never `error` itself, which an exit stack leaves to its caller
            print(f"while it was closed: {type(other).__name__}: {other}", flush=True)
