"""The contract between a strategy and whatever runs the model.

A strategy is a coroutine about one question. It awaits `Engine.generate` and
`Engine.score`; `Backend.run` drives many coroutines at once and batches whatever is
waiting (continuous batching in vLLM), so no strategy knows of batches.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from flywheel.records import Finish, Role

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. Temperature 0 is greedy. `stop` token ids end the completion and are kept."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Completion:
    """`tokens` holds the sampled ids including a final stop token, but never the EOS token.

    `eos` says that the model ended its answer; `finish` is LENGTH when `max_tokens` cut it.
    """

    tokens: tuple[int, ...]
    finish: Finish
    eos: bool


class Engine(Protocol):
    """One model in one role."""

    role: Role
    name: str  # e.g. policy_2: the artifact that is served
    parameters: int  # all parameters of the model, adapter included
    max_model_len: int

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, purpose: str, n: int = 1
    ) -> list[Completion]:
        """Sample `n` completions of `prompt` (token ids). Charged to the ledger under `purpose`.

        Raises TooLong, a ValueError, if the prompt and `max_tokens` do not fit `max_model_len`,
        and ValueError for `n` > 1 at temperature 0.
        """
        ...

    async def score(
        self, prompt: Sequence[int], reads: Sequence[int], labels: tuple[int, int], *, purpose: str
    ) -> list[float]:
        """P(labels[0]) / (P(labels[0]) + P(labels[1])) as the next token after each prefix of `prompt`.

        `reads` are the prefixes' lengths, ascending; what lies behind the last is not read.
        """
        ...

    def score_tokens(self, reads: Sequence[int]) -> int:
        """The most that `score` charges for these reads."""
        ...


class Backend(Protocol):
    """Owns the device: the engines of the roles that a stage asked for, and the loop that steps them."""

    def engine(self, role: Role) -> Engine: ...

    def run(self, items: Iterable[T], work: Callable[[T], Awaitable[R]]) -> list[R]:
        """Run `work(item)` for all items at once; the results in the order of `items`."""
        ...

    def close(self) -> None: ...
