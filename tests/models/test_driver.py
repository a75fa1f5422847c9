"""The loop that steps the devices while coroutines wait."""

from __future__ import annotations

import asyncio

import pytest

from flywheel.models.driver import drive


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
