"""Run many coroutines over batching devices, and charge the ledger.

An engine library (vLLM, or the scripted engine of the tests) implements `Device` and gives a
`Backend` to the stage. Only `ServedModel` calls a device, so every token is charged.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Protocol, TypeVar

from flywheel.errors import TooLong
from flywheel.ledger import Ledger, pairs
from flywheel.models.engine import Completion, Sampling
from flywheel.models.stepping import drive, runner, stream
from flywheel.models.weights import attention_width
from flywheel.recipe import EngineSpec
from flywheel.records import Finish, ModelRef

T = TypeVar("T")
R = TypeVar("R")
Labels = tuple[int, int]
COUNT_EVERY = 1.0  # seconds between two counts of the tokens so far
_DRAWING: ContextVar[tuple[str, Counter[bytes]] | None] = ContextVar("drawing", default=None)


@contextmanager
def drawing(what: str, nested: bool = True) -> Iterator[None]:
    """Inside, the coroutine and the tasks that it starts draw by `what`, not by how often others asked the same prompt.

    So what is drawn does not depend on what else is under way, or on the process. Blocks can be nested: `what`, with
    those around it, is unique in a stage; not `nested`, it is by itself.
    """
    around, _ = (nested and _DRAWING.get()) or ("", None)
    token = _DRAWING.set((f"{around}/{what}", Counter()))
    try:
        yield
    finally:
        _DRAWING.reset(token)


@dataclass(frozen=True, slots=True)
class Scoring:
    """A request for the values after the prefixes of lengths `reads`, ascending; the last is the whole prompt."""

    labels: Labels
    reads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Output:
    """One finished sequence. `tokens`: all generated tokens, EOS included.

    `cached`: number of prompt tokens that the prefix cache served. `values`: one per read of a `Scoring`.
    `spare`: tokens that were made after `tokens` in vain, and are charged too.
    """

    tokens: tuple[int, ...]
    finish: Finish
    eos: bool
    cached: int = 0
    values: tuple[float, ...] = ()
    spare: int = 0


class Device(Protocol):
    """Runs sequences in batches. One device may serve several roles."""

    one_pass: bool  # whether one request can answer several reads; else each read is a request
    tokens: int  # generated so far, of unfinished sequences too; a judge's: of the texts that it has read

    def submit(self, prompt: Sequence[int], request: Sampling | Scoring, adapter: Any) -> asyncio.Future[Output]:
        """Queue one sequence; a later `step` resolves the future. If it is cancelled, the sequence is dropped."""
        ...

    @property
    def sequences(self) -> int:
        """The number of queued and running sequences."""
        ...

    def step(self) -> bool:
        """Advance the queued sequences by one batch. Raises EngineDied.

        Returns False if there is nothing to do here but to wait: the sequences are computed elsewhere.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, eq=False)
class ServedModel:
    """One model in one role on a device; implements `flywheel.models.engine.Engine`.

    Sampling charges the prompt once per completion (tokens that the prefix cache served count as
    `cached` too) and the generated tokens, EOS included. Scoring charges the text once if the device
    is `one_pass`; else each prefix, plus the one token that the device generates after it.
    """

    role: str
    name: str
    parameters: int
    max_model_len: int
    device: Device
    ledger: Ledger
    adapter: Any = None
    bare: bool = False
    attention: int = 0  # see `Ledger.charge`
    seed: int = 0  # of the stage
    asked: Counter[bytes] = field(default_factory=Counter)  # draws outside `drawing`

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, purpose: str, n: int = 1
    ) -> list[Completion]:
        if n > 1 and sampling.temperature == 0:
            raise ValueError(f"{self.name}: {n} samples at temperature 0 would be the same one; ask for one")
        self._check_length(prompt, sampling.max_tokens)
        outputs = await self._run([(prompt, replace(sampling, seed=s)) for s in self._seeds(prompt, purpose, n)])
        self._charge(purpose, outputs, [len(prompt)] * n, "prompt")
        return [Completion(out.tokens[:-1] if out.eos else out.tokens, out.finish, out.eos) for out in outputs]

    async def score(self, prompt: Sequence[int], reads: Sequence[int], labels: Labels, *, purpose: str) -> list[float]:
        if not reads:
            return []
        self._check_length(prompt[: reads[-1]], 1)
        passes = [tuple(reads)] if self.device.one_pass else [(read,) for read in reads]
        outputs = await self._run([(prompt[: part[-1]], Scoring(labels, part)) for part in passes])
        self._charge(purpose, outputs, [part[-1] for part in passes], "scored")
        return [value for out in outputs for value in out.values]

    def score_tokens(self, reads: Sequence[int]) -> int:
        return max(reads, default=0) if self.device.one_pass else sum(read + 1 for read in reads)

    async def _run(self, requests: Sequence[tuple[Sequence[int], Sampling | Scoring]]) -> list[Output]:
        return await asyncio.gather(*(self.device.submit(*request, self.adapter) for request in requests))

    def _seeds(self, prompt: Sequence[int], purpose: str, n: int) -> Iterator[int]:
        """Seeds of 63 bits for `n` sequences, by stage, model, what is drawn (`drawing`), prompt, and draw of it."""
        what, asked = _DRAWING.get() or ("", self.asked)
        whole = sha256(repr((self.seed, self.role, self.name, what, purpose, tuple(prompt))).encode())
        for _ in range(n):
            one = whole.copy()
            one.update(str(asked[whole.digest()]).encode())
            asked[whole.digest()] += 1
            yield int.from_bytes(one.digest()[:8]) >> 1

    def _check_length(self, prompt: Sequence[int], new: int) -> None:
        if not prompt:
            raise ValueError(f"{self.name}: an empty prompt")
        if len(prompt) + new > self.max_model_len:
            raise TooLong(
                f"{self.name}: a prompt of {len(prompt)} tokens and {new} to generate"
                f" do not fit engine.max_model_len {self.max_model_len}"
            )

    def _charge(self, purpose: str, outputs: Sequence[Output], given: Sequence[int], kind: str) -> None:
        """given: by output, the tokens of the request, which are charged as `kind`: prompt or scored."""
        made = [len(out.tokens) + out.spare for out in outputs]
        self.ledger.charge(
            self.role.partition(":")[0],  # the key `prm:base` is another model with the role `prm`
            purpose,
            parameters=self.parameters,
            generated=sum(made),
            cached=sum(out.cached for out in outputs),
            attention=self.attention,
            attended=sum(pairs(out.cached, count + new) for out, count, new in zip(outputs, given, made)),
            **{kind: sum(given)},
        )


class Backend:
    """The engines that a stage opened, by role (or other key), and the loop that steps their devices.

    `on_run` is called with the stage's seed at the start of every call of `run` and `stream`.
    """

    def __init__(
        self,
        engines: Mapping[str, ServedModel],
        devices: Sequence[Device],
        seed: int = 0,
        on_run: Callable[[int], None] = lambda seed: None,
    ):
        self._engines, self._devices, self._seed, self._on_run = dict(engines), list(devices), seed, on_run
        self._counted, self._told = time.monotonic(), 0

    def engine(self, role: str) -> ServedModel:
        return self._engines[role]

    def take_over(self, ledger: Ledger, seed: int) -> None:
        """For another stage: charge `ledger` from now on, and seed sequences by `seed`."""
        self._seed = seed
        self._engines = {
            role: replace(engine, ledger=ledger, seed=seed, asked=Counter()) for role, engine in self._engines.items()
        }

    def start_run(self) -> None:
        self._on_run(self._seed)

    def run(self, items: Iterable[T], work: Callable[[T], Awaitable[R]]) -> list[R]:
        """Run `work(item)` for all items concurrently; results in the order of `items`.

        Raises the first exception of `work`, or EngineDied, after cancelling the rest.
        """
        self.start_run()
        return drive(items, work, self.step)

    def stream(
        self, source: Callable[[], Coroutine[Any, Any, None] | None], full: Callable[[], bool] = lambda: False
    ) -> None:
        """See `stream`."""
        self.start_run()
        stream(source, full, self.step)

    def serve(self, main: Coroutine[Any, Any, R]) -> R:
        """Run `main`, such as a server's loop, stepping the devices whenever it waits. Raises EngineDied."""
        with runner(self.step) as loop:
            return loop.run(main)

    def close(self) -> None:
        for device in self._devices:
            device.close()

    @property
    def sequences(self) -> int:
        """The number of sequences that are queued or running on the devices."""
        return sum(device.sequences for device in self._devices)

    def step(self) -> bool:
        """Step every device that has sequences; returns whether any had something to do."""
        stepped = [device.step() for device in self._devices if device.sequences]
        if time.monotonic() - self._counted > COUNT_EVERY:
            self._counted, before, self._told = time.monotonic(), self._told, sum(d.tokens for d in self._devices)
            for ledger in {id(engine.ledger): engine.ledger for engine in self._engines.values()}.values():
                ledger.so_far += self._told - before
        return any(stepped)


def served(
    role: str, ref: ModelRef, size: int, spec: EngineSpec, device: Device, ledger: Ledger, adapter: Any, seed: int
) -> ServedModel:
    """A model of `size` parameters on its device, by what a recipe and the run say of it."""
    bare, attention = ref.adapter is None, attention_width(ref.base)
    return ServedModel(
        role, ref.name, size, spec.max_model_len, device, ledger, adapter, bare=bare, attention=attention, seed=seed
    )
