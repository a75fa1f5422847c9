"""One loop for every kind of engine: coroutines ask, the loop steps the devices, the answers wake them.

An adapter (vllm, transformers, scripted) supplies `Device`s; `Served` puts a role and a
ledger before a device, so that no token can be asked for uncounted, and `Driver` runs the
coroutines.
"""

from __future__ import annotations

import asyncio
import hashlib
import selectors
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from flywheel.engines.base import Completion, R, Sampling, T, TooLong
from flywheel.ledger import Ledger
from flywheel.records import Finish

Labels = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Reading:
    """The values of a text after each prefix of a length in `reads`; the last is the whole text."""

    labels: Labels
    reads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One sequence from a device. `tokens` are all that the model made, EOS included.

    `cached` are the prompt tokens that the prefix cache served; `values` answer a `Reading`.
    """

    tokens: tuple[int, ...]
    finish: Finish
    eos: bool
    cached: int = 0
    values: tuple[float, ...] = ()


class Device(Protocol):
    """Whatever makes tokens in batches. One device may serve several roles.

    one_pass: whether a `Reading` may have more than one read.
    """

    one_pass: bool

    def submit(self, prompt: Sequence[int], ask: Sampling | Reading, adapter: Any) -> asyncio.Future[Drawn]:
        """Queue one sequence; the future is resolved in a later `step`. A cancelled future is dropped."""
        ...

    def seed(self, seed: int) -> None: ...

    @property
    def busy(self) -> bool: ...

    def step(self) -> None:
        """Advance what is queued, as one batch. Raises EngineDied."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Clock:
    """A device's time, shared evenly among the `held` sequences of each step.

    What a sequence took is by how much `pace` rose while it was held, so the shares of all add up to the whole.
    """

    pace: float = 0.0  # seconds
    held: int = 0

    def spend(self, seconds: float) -> None:
        self.pace += seconds / max(1, self.held)


class Served:
    """One model in one role on a device; see `flywheel.engines.base.Engine`.

    Charged is what the device counted: the prompt once for each sample, the tokens of it
    that the prefix cache served as `cached` beside, and EOS among the generated ones. A
    `score` charges its text as scored: once, where the device reads it in one pass; else the
    prefix of each read, and the one token that the device makes behind it.
    """

    def __init__(
        self, role: str, name: str, parameters: int, max_model_len: int, device: Device, ledger: Ledger, adapter: Any = None
    ):
        self.role, self.name, self.parameters, self.max_model_len = role, name, parameters, max_model_len
        self.device, self._ledger, self._adapter = device, ledger, adapter
        self.asked: Callable[[Sequence[int]], None] = lambda prompt: None
        self.clock = Clock()  # the driver gives roles on one device one clock

    async def generate(self, prompt: Sequence[int], sampling: Sampling, *, purpose: str, n: int = 1) -> list[Completion]:
        if n > 1 and sampling.temperature == 0:
            raise ValueError(f"{self.name}: {n} samples at temperature 0 would be the same one; ask for one")
        self._check(prompt, sampling.max_tokens)
        took: list[float] = []
        drawn = await asyncio.gather(*(self._submit(prompt, sampling, took) for _ in range(n)))
        generated = sum(len(d.tokens) for d in drawn)
        self._charge(purpose, prompt=n * len(prompt), cached=sum(d.cached for d in drawn), generated=generated, seconds=sum(took))
        return [Completion(d.tokens[:-1] if d.eos else d.tokens, d.finish, d.eos) for d in drawn]

    async def score(self, prompt: Sequence[int], reads: Sequence[int], labels: Labels, *, purpose: str) -> list[float]:
        if not reads:
            return []
        prompt = prompt[: reads[-1]]
        self._check(prompt, 1)
        asked = [tuple(reads)] if self.device.one_pass else [(read,) for read in reads]
        took: list[float] = []
        drawn = await asyncio.gather(*(self._submit(prompt[: part[-1]], Reading(labels, part), took) for part in asked))
        scored, generated = sum(part[-1] for part in asked), sum(len(d.tokens) for d in drawn)
        self._charge(purpose, scored=scored, cached=sum(d.cached for d in drawn), generated=generated, seconds=sum(took))
        return [value for d in drawn for value in d.values]

    def score_tokens(self, reads: Sequence[int]) -> int:
        return max(reads, default=0) if self.device.one_pass else sum(read + 1 for read in reads)

    def _submit(self, prompt: Sequence[int], ask: Sampling | Reading, took: list[float]) -> asyncio.Future[Drawn]:
        """Queue one sequence; its share of the device's seconds is added to `took` when it is done."""
        self.asked(prompt)
        future = self.device.submit(prompt, ask, self._adapter)
        clock, begun = self.clock, self.clock.pace
        clock.held += 1

        def done(_) -> None:
            clock.held -= 1
            took.append(clock.pace - begun)

        future.add_done_callback(done)  # before any waiter's own: so `took` is whole when the waiter goes on
        return future

    def _check(self, prompt: Sequence[int], new: int) -> None:
        if not prompt:
            raise ValueError(f"{self.name}: an empty prompt")
        if len(prompt) + new > self.max_model_len:
            raise TooLong(
                f"{self.name}: a prompt of {len(prompt)} tokens and {new} to generate"
                f" do not fit engine.max_model_len {self.max_model_len}"
            )

    def _charge(self, purpose: str, **counts: float) -> None:
        # a key such as `prm:base` is another model in the role of the PRM
        self._ledger.charge(self.role.partition(":")[0], purpose, parameters=self.parameters, **counts)


class Driver:
    """The Backend of `devices` that serve `engines`, by role; see `flywheel.engines.base.Backend`."""

    def __init__(self, engines: Mapping[str, Served], devices: Sequence[Device], seed: int):
        self._engines, self._devices, self._seed = dict(engines), list(devices), seed
        self._opening: Any = None  # hash of what a run asked for before its first step
        self._seen: Counter[bytes] = Counter()
        self._clocks = {id(device): Clock() for device in self._devices}
        for engine in self._engines.values():
            engine.asked, engine.clock = self._note, self._clocks[id(engine.device)]

    def engine(self, role: str) -> Served:
        return self._engines[role]

    def run(self, items: Iterable[T], work: Callable[[T], Awaitable[R]], in_flight: int) -> Iterator[tuple[T, R]]:
        """See Backend.run. An exception of `work` (or EngineDied) ends the run and cancels the rest."""
        self._opening = hashlib.sha256(str(self._seed).encode())
        return drive(items, work, in_flight, self._step)

    def close(self) -> None:
        for device in self._devices:
            device.close()

    def _note(self, prompt: Sequence[int]) -> None:
        if self._opening is not None:
            self._opening.update(repr(tuple(prompt)).encode())

    def _step(self) -> bool:
        busy = [device for device in self._devices if device.busy]
        if busy and self._opening is not None:
            self._reseed()
        for device in busy:
            begun = time.perf_counter()
            device.step()
            self._clocks[id(device)].spend(time.perf_counter() - begun)
        return bool(busy)

    def _reseed(self) -> None:
        """Seed by what the run asks, not by what this process did before.

        So a chunk that is computed again after a kill, or by another rank, draws what it
        would have drawn; the same run once more in one process draws anew.
        """
        digest, self._opening = self._opening.digest(), None
        again = hashlib.sha256(digest + str(self._seen[digest]).encode()).digest()
        self._seen[digest] += 1
        for i, device in enumerate(self._devices):
            device.seed((int.from_bytes(again[:4], "big") + i) % 2**31)


class _SteppingSelector(selectors.DefaultSelector):
    """A selector that steps the devices where the event loop would otherwise wait.

    asyncio polls with timeout 0 while any coroutine can go on, and waits only when none
    can: then, and only then, everything that could be asked has been asked.
    """

    def __init__(self, step: Callable[[], bool]):
        super().__init__()
        self._step = step

    def select(self, timeout: float | None = None):
        if timeout != 0 and self._step():
            timeout = 0
        return super().select(timeout)


def drive(
    items: Iterable[T], work: Callable[[T], Awaitable[R]], in_flight: int, step: Callable[[], bool]
) -> Iterator[tuple[T, R]]:
    """Run `work` on all items, `in_flight` at once, calling `step` whenever all of them wait.

    `step` returns whether it had anything to do. Yields (item, result) in the order in
    which the work ended, which depends on the items and the devices alone.
    """
    if in_flight < 1:
        raise ValueError(f"in_flight must be at least 1, got {in_flight}")
    loop = asyncio.SelectorEventLoop(_SteppingSelector(step))
    source, running, ended = iter(items), {}, deque()
    closing = False

    async def one(item: T) -> R:
        return await work(item)

    def end(task: asyncio.Task) -> None:
        ended.append(task)
        if not closing:
            loop.stop()  # takes effect before the loop would wait, so room is filled before the next step

    try:
        while True:
            for item in islice(source, in_flight - len(running)):
                task = loop.create_task(one(item))
                task.add_done_callback(end)
                running[task] = item
            if not running:
                return
            loop.run_forever()
            while ended:
                task = ended.popleft()
                yield running.pop(task), task.result()
    finally:
        closing = True
        for task in running:
            task.cancel()
        if running:
            loop.run_until_complete(asyncio.gather(*running, return_exceptions=True))
        loop.close()
