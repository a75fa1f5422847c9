"""The loop that steps the devices while coroutines wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from flywheel.errors import EngineDied
from flywheel.ledger import Ledger
from flywheel.models.stepping import drive, stream


def test_all_that_can_be_asked_is_asked_before_a_step_and_results_keep_their_order():
    waiting, widths = [], []

    def step():
        widths.append(len(waiting))
        if waiting:
            waiting.pop(0).set_result(None)
        return bool(widths[-1])

    async def work(item):
        for _ in range(item):
            future = asyncio.get_running_loop().create_future()
            waiting.append(future)
            await future
        return item * 10

    assert drive([3, 1, 2, 0, 1], work, step) == [30, 10, 20, 0, 10]
    assert widths == [4, 4, 3, 3, 2, 2, 1]
    assert drive([], work, step) == []


def test_a_fault_cancels_what_is_left():
    cancelled = []

    async def work(item):
        try:
            await asyncio.sleep(0 if item == 0 else 3600)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise
        raise KeyError(item)

    with pytest.raises(KeyError, match="0"):
        drive(range(3), work, lambda: False)
    assert cancelled == [1, 2]


class Queue:
    """A device that ends its oldest sequence in each step."""

    def __init__(self):
        self.waiting, self.widths = [], []

    def ask(self) -> asyncio.Future:
        self.waiting.append(asyncio.get_running_loop().create_future())
        return self.waiting[-1]

    def step(self) -> bool:
        self.widths.append(len(self.waiting))
        if self.waiting:
            self.waiting.pop(0).set_result(None)
        return bool(self.widths[-1])


def numbered(count: int, work) -> Iterator:
    begun = iter(range(count))
    return lambda: next((work(i) for i in begun), None)


def test_the_next_is_begun_as_soon_as_there_are_too_few_sequences():
    device, begun = Queue(), []

    async def work(i):
        begun.append(i)
        for _ in range(2):  # the second is asked for when both of the first have ended
            await asyncio.gather(device.ask(), device.ask())

    stream(numbered(4, work), lambda: len(device.waiting) >= 4, device.step)
    assert begun == [0, 1, 2, 3]
    assert min(device.widths[:10]) >= 4, "until the last is begun"
    device.widths.clear()
    stream(numbered(4, work), lambda: True, device.step)
    assert max(device.widths) == 2, "one at a time"
    stream(lambda: None, lambda: True, device.step)


def test_what_a_thread_works_on_is_waited_for_without_a_step_and_other_sequences_go_on():
    device, done, order = Queue(), threading.Event(), []

    async def checked():
        await asyncio.to_thread(done.wait, 10)
        order.append("checked")

    async def drawn():
        for _ in range(3):
            await device.ask()
        order.append("drawn")
        done.set()

    works = iter([checked(), drawn()])
    stream(lambda: next(works, None), lambda: False, device.step)
    assert order == ["drawn", "checked"]
    assert sum(width == 0 for width in device.widths) <= 2, "it sleeps until the thread has ended"


@pytest.mark.parametrize("where", ["work", "step"])
def test_a_death_ends_the_stream_and_cancels_what_is_under_way(where):
    ended = []

    async def work(i):
        try:
            if where == "work" and i == 2:
                raise EngineDied("dead")
            await asyncio.sleep(3600)
        finally:
            ended.append(i)

    def step():
        raise EngineDied("dead")

    with pytest.raises(EngineDied, match="dead"):
        stream(numbered(3, work), lambda: False, step if where == "step" else lambda: False)
    assert sorted(ended) == [0, 1, 2]


def test_what_chunks_charge_at_the_same_time_is_theirs():
    device, whole = Queue(), Ledger("s", 1)
    parts = [Ledger("s", 1) for _ in range(3)]

    def charge(tokens: int) -> None:
        whole.charge("policy", "x", parameters=1, generated=tokens)

    async def work(i):
        async def one(tokens):
            await device.ask()
            charge(tokens)
            whole.current.verdicts["correct"] += 1

        with whole.charged_to(parts[i]):
            await asyncio.gather(one(i + 1), one(10))
        charge(100)

    stream(numbered(3, work), lambda: False, device.step)
    assert [part.tokens() for part in parts] == [11, 12, 13] and whole.tokens() == 300
    assert [part.verdicts.total() for part in parts] == [2, 2, 2] and not whole.verdicts
