"""How full are the devices of a sampling stage? On simulated clocks, one stream a stage beside a chunk at a time.

    python -m eval.bench.busy

Every device runs `--slots` sequences at once, each a token further in every step. A question takes `--samples` answers
of long-tailed length, at once (`sample`) or in 8 turns that wait for each other (`search`). The scheduling is the
real one (`Kit.stream`; for a chunk at a time `Backend.run`), as is the order of the draws among devices.

Prints JSON: by kind, devices and questions a chunk the busy share: tokens made / (slots x steps x devices). `flow`:
until the last chunk is drawn; `stage`: until the last device ends, which waits for the longest of the last answers.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import random
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np

from flywheel.models.driver import Backend, Output
from flywheel.recipe import EngineSpec
from flywheel.records import Finish
from flywheel.runs.worker import cut
from flywheel.stages.kit import Kit

LONGEST, TURNS = 1024, 8  # tokens of an answer; turns of a search


class Turns:
    """Lets one of many threads run at a time: that whose clock is furthest behind."""

    def __init__(self, count: int):
        self.waiting = [(0, i) for i in range(count)]
        self.go = [threading.Semaphore(0) for _ in range(count)]

    def pass_on(self) -> None:
        if self.waiting:
            self.go[heapq.heappop(self.waiting)[1]].release()

    def take(self, now: int, index: int) -> None:
        if self.waiting and (now, index) > self.waiting[0]:
            heapq.heappush(self.waiting, (now, index))
            self.pass_on()
            self.go[index].acquire()


class Simulated:
    """A device on a clock of its own, which counts steps. A prompt is one number: the tokens that will be made."""

    one_pass = True

    def __init__(self, slots: int, turns: Turns, index: int):
        self.slots, self.turns, self.index = slots, turns, index
        self.now = self.tokens = self.count = 0
        self.made = [(0, 0)]  # (step, tokens so far)
        self.queued: deque[tuple[int, asyncio.Future]] = deque()
        self.running: list[tuple[int, int, asyncio.Future]] = []  # (last step, number, future)

    def submit(self, prompt: Sequence[int], request: object = None, adapter: object = None) -> asyncio.Future[Output]:
        future = asyncio.get_running_loop().create_future()
        self.queued.append((prompt[0], future))
        return future

    @property
    def sequences(self) -> int:
        return len(self.queued) + len(self.running)

    def step(self) -> bool:
        """Go on to the next step in which a sequence ends."""
        self.turns.take(self.now, self.index)
        while self.queued and len(self.running) < self.slots:
            length, future = self.queued.popleft()
            self.count += 1
            heapq.heappush(self.running, (self.now + length, self.count, future))
        end = self.running[0][0]
        self.tokens += (end - self.now) * len(self.running)
        self.now = end
        self.made.append((end, self.tokens))
        while self.running and self.running[0][0] == end:
            heapq.heappop(self.running)[2].set_result(Output((), Finish.STOP, True))
        return True

    def close(self) -> None: ...


def lengths(seed: int, samples: int) -> list[int]:
    """Tokens of a question's answers: log-normal, the mean 1.3 times the median, one in 200 the longest allowed."""
    chance = random.Random(seed)
    return [min(LONGEST, 1 + int(chance.lognormvariate(5, 0.75))) for _ in range(samples)]


async def ask(device: Simulated, question: int, samples: int, turns: int) -> None:
    whole = lengths(question, samples)
    for _ in range(turns):
        await asyncio.gather(*(device.submit([max(1, length // turns)]) for length in whole))


def busy(
    devices: int, chunk: int, kind: str, streamed: bool, slots: int, samples: int, questions: int
) -> dict[str, float]:
    """The busy shares of a stage of `questions` questions a device."""
    turns, left, dry = Turns(devices), iter(cut(range(questions * devices), chunk)), []
    made = [Simulated(slots, turns, i) for i in range(devices)]

    def draws(device: Simulated) -> Iterator[list[int]]:
        while True:
            turns.take(device.now, device.index)
            if (drawn := next(left, None)) is None:
                dry.append(device.now)
                return
            yield drawn

    def fill(device: Simulated) -> None:
        backend, mine = Backend({}, [device]), draws(device)

        async def one(question: int) -> None:
            await ask(device, question, samples, TURNS if kind == "search" else 1)

        async def work(drawn: list[int]) -> None:
            await asyncio.gather(*map(one, drawn))

        turns.go[device.index].acquire()
        try:
            if streamed:
                recipe = SimpleNamespace(engine=EngineSpec(max_running=slots))
                Kit(recipe, backend, None, None, None, {}, None).stream(lambda: next(map(work, mine), None))
            else:
                for drawn in mine:
                    backend.run(drawn, one)
        finally:
            turns.pass_on()

    threads = [threading.Thread(target=fill, args=(device,)) for device in made]
    for thread in threads:
        thread.start()
    turns.pass_on()
    for thread in threads:
        thread.join()
    ends = {"flow": dry[0], "stage": max(device.now for device in made)}
    tokens = {name: sum(np.interp(end, *zip(*device.made)) for device in made) for name, end in ends.items()}
    return {name: round(tokens[name] / (slots * devices * end), 3) for name, end in ends.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--chunks", type=int, nargs="+", default=[4, 16, 50], help="questions a chunk")
    parser.add_argument("--slots", type=int, default=64, help="sequences that a device runs at once")
    parser.add_argument("--samples", type=int, default=16, help="answers a question")
    parser.add_argument("--questions", type=int, default=250, help="a device")
    args = parser.parse_args()
    rows = []
    for kind in ("sample", "search"):
        for devices in args.devices:
            for chunk in args.chunks:
                size = (args.slots, args.samples, args.questions)
                ways = {"stream": True, "a chunk at a time": False}
                shares = {way: busy(devices, chunk, kind, streamed, *size) for way, streamed in ways.items()}
                rows.append({"kind": kind, "devices": devices, "chunk": chunk, **shares})
    print(json.dumps({**vars(args), "busy": rows}, indent=1))


if __name__ == "__main__":
    main()
