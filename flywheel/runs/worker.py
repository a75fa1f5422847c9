"""One process's part of a stage: draw chunks, process them, write their shards; or train."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flywheel.errors import EngineDied
from flywheel.recipe import Recipe
from flywheel.runs.files import encode_ledger, plain, write_file
from flywheel.runs.isolate import resolve
from flywheel.runs.run import Context
from flywheel.runs.shards import Shards


def perform_stage(
    recipe: Recipe,
    run: Path,
    round: int,
    stage: str,
    stages: str,
    rank: int,
    world: int,
    cores: Sequence[int] | None,
    tell: Callable[[int, int, dict], None],
    ask: Callable[[str], Any],
) -> dict:
    """Entry point of a stage's process: its part of the stage, on `cores` (None: all cores of the rank).

    `stages`: `module:function(round)` that returns the stages of a round. Rank 0 returns the figures.
    """
    if cores:
        os.sched_setaffinity(0, cores)
    found = next(s for s in resolve(stages)(round) if s.name == stage)
    return perform(Context(recipe, run, round, found, rank, world, tell, ask))


def perform(ctx: Context) -> dict:
    """One rank's part of the stage; rank 0 returns the figures."""
    ctx.dir.mkdir(parents=True, exist_ok=True)
    figures: dict = {}
    with ctx.beating():
        if ctx.stage.train:
            figures |= ctx.stage.train(ctx)
        else:
            fill(ctx)
            ctx.wait_for_others()
        if ctx.stage.finish and ctx.rank == 0:
            figures |= ctx.stage.finish(ctx)
    if rows := ctx.ledger.take():  # charged by a training, or after the last chunk
        write_file(ctx.dir / ("ledger.parquet" if ctx.rank == 0 else f"ledger_{ctx.rank}.parquet"), encode_ledger(rows))
    return plain(figures)


def cut(items: Sequence[str], size: int) -> list[list[str]]:
    """`items` in chunks of at most `size` and nearly equal length, so that no process waits for a longer last chunk."""
    count = -(-len(items) // size)
    return [list(items[i * len(items) // count : (i + 1) * len(items) // count]) for i in range(count)]


def fill(ctx: Context, chunk: int | None = None) -> None:
    """Draw missing chunks and write their shards until none is left to draw. Engines are opened at the first chunk.

    `chunk`: items per chunk, `engine.chunk` if None. A dead engine is reopened once per chunk; the tokens that it had
    spent stay in the ledger. Raises EngineDied, naming the chunk's questions, if it dies again.
    """
    shards = Shards(ctx.dir, cut(ctx.stage.items(ctx), chunk or ctx.chunk), ctx.draw)
    with Opened(ctx) as opened:
        while (index := shards.draw()) is not None:
            questions = shards.chunks[index]
            try:
                write_shard(ctx, shards, index, opened)
            except EngineDied as first:
                print(f"{first}; opened again for {len(questions)} questions from {questions[0]}", flush=True)
                opened.drop()
                try:
                    write_shard(ctx, shards, index, opened)
                except EngineDied as second:
                    named = " ".join(questions[:20]) + (" ..." if len(questions) > 20 else "")
                    raise EngineDied(f"{second} (twice, on questions {named})") from second
        ctx.at_chunk(shards, 0)


def write_shard(ctx: Context, shards: Shards, index: int, opened: Opened) -> None:
    started, questions = time.monotonic(), shards.chunks[index]
    ctx.at_chunk(shards, len(questions))
    ctx.verdicts.clear()  # of a chunk whose engine died
    records = ctx.stage.work(ctx, opened.get(), questions)
    shards.write(index, records, ctx.ledger.take, lambda: time.monotonic() - started, ctx.verdicts)


class Opened:
    """Holds the result of a stage's `open` (its engines): opened at the first `get`, and again after a `drop`."""

    def __init__(self, ctx: Context):
        self.ctx, self.stack, self.value = ctx, ExitStack(), None

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def get(self) -> Any:
        if self.value is None and self.ctx.stage.open:
            self.value = self.stack.enter_context(self.ctx.stage.open(self.ctx))
        return self.value

    def drop(self) -> None:
        """Close what is open. Errors while closing are only printed: the engine may be dead already."""
        stack, self.stack, self.value = self.stack, ExitStack(), None
        try:
            stack.close()
        except Exception as error:
            print(f"while it was closed: {type(error).__name__}: {error}", flush=True)
