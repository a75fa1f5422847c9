"""One loop for every kind of engine: coroutines ask, the loop steps the devices, the answers wake them.

An adapter (vllm, transformers, scripted) supplies `Device`s; `Served` puts a role and a
ledger before a device, so that no token can be asked for uncounted, and `Driver` runs the
coroutines.
"""

from __future__ import annotations

import asyncio
import hashlib
import selectors
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flywheel.errors import TooLong
from flywheel.ledger import Ledger
from flywheel.models.engine import Completion, R, Sampling, T
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


class Served:
    """One model in one role on a device; see `flywheel.models.engine.Engine`.

    Charged is what the device counted: the prompt once for each sample, the tokens of it
    that the prefix cache served as `cached` beside, and EOS among the generated ones. A
    `score` charges its text as scored: once, where the device reads it in one pass; else the
    prefix of each read, and the one token that the device makes behind it.
    """

    def __init__(
        self,
        role: str,
        name: str,
        parameters: int,
        max_model_len: int,
        device: Device,
        ledger: Ledger,
        adapter: Any = None,
    ):
        self.role, self.name, self.parameters, self.max_model_len = role, name, parameters, max_model_len
        self.device, self._ledger, self._adapter = device, ledger, adapter
        self.asked: Callable[[Sequence[int]], None] = lambda prompt: None

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, purpose: str, n: int = 1
    ) -> list[Completion]:
        if n > 1 and sampling.temperature == 0:
            raise ValueError(f"{self.name}: {n} samples at temperature 0 would be the same one; ask for one")
        self._check(prompt, sampling.max_tokens)
        drawn = await asyncio.gather(*(self._submit(prompt, sampling) for _ in range(n)))
        generated = sum(len(d.tokens) for d in drawn)
        self._charge(purpose, prompt=n * len(prompt), cached=sum(d.cached for d in drawn), generated=generated)
        return [Completion(d.tokens[:-1] if d.eos else d.tokens, d.finish, d.eos) for d in drawn]

    async def score(self, prompt: Sequence[int], reads: Sequence[int], labels: Labels, *, purpose: str) -> list[float]:
        if not reads:
            return []
        prompt = prompt[: reads[-1]]
        self._check(prompt, 1)
        asked = [tuple(reads)] if self.device.one_pass else [(read,) for read in reads]
        drawn = await asyncio.gather(*(self._submit(prompt[: part[-1]], Reading(labels, part)) for part in asked))
        scored, generated = sum(part[-1] for part in asked), sum(len(d.tokens) for d in drawn)
        self._charge(purpose, scored=scored, cached=sum(d.cached for d in drawn), generated=generated)
        return [value for d in drawn for value in d.values]

    def score_tokens(self, reads: Sequence[int]) -> int:
        return max(reads, default=0) if self.device.one_pass else sum(read + 1 for read in reads)

    def _submit(self, prompt: Sequence[int], ask: Sampling | Reading) -> asyncio.Future[Drawn]:
        self.asked(prompt)
        return self.device.submit(prompt, ask, self._adapter)

    def _check(self, prompt: Sequence[int], new: int) -> None:
        if not prompt:
            raise ValueError(f"{self.name}: an empty prompt")
        if len(prompt) + new > self.max_model_len:
            raise TooLong(
                f"{self.name}: a prompt of {len(prompt)} tokens and {new} to generate"
                f" do not fit engine.max_model_len {self.max_model_len}"
            )

    def _charge(self, purpose: str, **counts: int) -> None:
        # a key such as `prm:base` is another model in the role of the PRM
        self._ledger.charge(self.role.partition(":")[0], purpose, parameters=self.parameters, **counts)


class Driver:
    """The Backend of `devices` that serve `engines`, by role; see `flywheel.models.engine.Backend`."""

    def __init__(self, engines: Mapping[str, Served], devices: Sequence[Device], seed: int):
        self._engines, self._devices, self._seed = dict(engines), list(devices), seed
        self._opening: Any = None  # hash of what a run asked for before its first step
        self._seen: Counter[bytes] = Counter()
        for engine in self._engines.values():
            engine.asked = self._note

    def engine(self, role: str) -> Served:
        return self._engines[role]

    def run(self, items: Iterable[T], work: Callable[[T], Awaitable[R]]) -> list[R]:
        """See Backend.run. An exception of `work` (or EngineDied) ends the run and cancels the rest."""
        self._opening = hashlib.sha256(str(self._seed).encode())
        return drive(items, work, self._step)

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
            device.step()
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


def drive(items: Iterable[T], work: Callable[[T], Awaitable[R]], step: Callable[[], bool]) -> list[R]:
    """`work` on all items at once, calling `step` whenever all of them wait; results in the order of `items`.

    `step` returns whether it had anything to do.
    """

    async def all_items() -> list[R]:
        tasks = [asyncio.ensure_future(work(item)) for item in items]
        try:
            return await asyncio.gather(*tasks)
        finally:  # where one failed, the others must not be left half done
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_SteppingSelector(step))) as runner:
        return runner.run(all_items())
