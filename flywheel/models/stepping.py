"""The event loop that steps devices whenever all coroutines wait."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def drive(items: Iterable[T], work: Callable[[T], Awaitable[R]], step: Callable[[], bool]) -> list[R]:
    """Run `work` on all items concurrently, calling `step` whenever all wait; results in the order of `items`.

    `step` returns whether any device was busy.
    """

    async def all_items() -> list[R]:
        tasks = [asyncio.ensure_future(work(item)) for item in items]
        try:
            return await asyncio.gather(*tasks)
        finally:  # if one failed, cancel the others
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    with runner(step) as loop:
        return loop.run(all_items())


def stream(
    source: Callable[[], Coroutine[Any, Any, None] | None], full: Callable[[], bool], step: Callable[[], bool]
) -> None:
    """Run the coroutines that `source` gives until it gives None and all have ended; `step` as for `drive`.

    Whenever all of them wait, the next is begun, unless `full()`; one at least is always under way. Raises the first
    exception of a coroutine, or one of `source` and `step`, after cancelling the rest.
    """
    flow = _Stream(source, full, step)
    with runner(flow.idle) as loop:
        loop.run(flow.main())


class _Stream:
    def __init__(self, source: Callable, full: Callable[[], bool], step: Callable[[], bool]):
        self.source, self.full, self.step = source, full, step
        self.tasks: set[asyncio.Task] = set()

    async def main(self) -> None:
        self.over = asyncio.get_running_loop().create_future()
        try:
            await self.over
        finally:
            self.source = None
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)

    def idle(self) -> bool:
        """Begin the next coroutine, or step the devices; returns whether there was anything to do."""
        if self.source is None or (self.tasks and self.full()):
            return self.step()
        if (work := self.source()) is not None:
            task = asyncio.ensure_future(work)
            self.tasks.add(task)
            task.add_done_callback(self.ended)
        else:
            self.source = None
            self.end()
        return True

    def ended(self, task: asyncio.Task) -> None:
        self.tasks.discard(task)
        failed = RuntimeError("its coroutine was cancelled") if task.cancelled() else task.exception()
        if failed and not self.over.done():
            self.over.set_exception(failed)
        self.end()

    def end(self) -> None:
        if self.source is None and not self.tasks and not self.over.done():
            self.over.set_result(None)


def runner(step: Callable[[], bool]) -> asyncio.Runner:
    return asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_SteppingSelector(step)))


class _SteppingSelector(selectors.DefaultSelector):
    """A selector that steps the devices where the event loop would otherwise wait.

    asyncio polls with timeout 0 while any coroutine is ready, and waits only when none is: by
    then all possible requests are submitted, so the batches are as full as they can be. What a server's
    clients have sent is read first: each part of a request would else wait for a step.
    """

    def __init__(self, step: Callable[[], bool]):
        super().__init__()
        self._step = step

    def select(self, timeout: float | None = None):
        if timeout != 0:
            if arrived := super().select(0):
                return arrived
            if self._step():
                timeout = 0
        return super().select(timeout)
