"""What a search strategy may ask of a model: sample completions of a prompt, and score prefixes of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flywheel.records import Finish, Role


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. Temperature 0 is greedy. A token id of `stop` ends the completion and is kept."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Completion:
    """`tokens` are the sampled ids, with a final stop token but never with the EOS token.

    `eos`: the model ended its answer by EOS. `finish`: LENGTH if `max_tokens` cut it, else STOP.
    """

    tokens: tuple[int, ...]
    finish: Finish
    eos: bool


class Engine(Protocol):
    """One model in one role. Calls of many coroutines are batched by the backend; a strategy knows of no batches."""

    role: Role
    name: str  # the model that is served, e.g. policy_2
    parameters: int  # all parameters of the model, adapter included
    max_model_len: int  # tokens

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, purpose: str, n: int = 1
    ) -> list[Completion]:
        """Sample `n` completions of `prompt` (token ids). Charged to the ledger under `purpose`.

        Raises TooLong if the prompt and `max_tokens` do not fit `max_model_len`, and ValueError
        for an empty prompt, or for `n` > 1 at temperature 0.
        """
        ...

    async def score(
        self, prompt: Sequence[int], reads: Sequence[int], labels: tuple[int, int], *, purpose: str
    ) -> list[float]:
        """P(labels[0]) / (P(labels[0]) + P(labels[1])) as the next token after each prefix of `prompt`.

        `reads` are the prefixes' lengths, ascending; tokens behind the last prefix are ignored.
        Raises TooLong if the last prefix and one token do not fit `max_model_len`.
        """
        ...

    def score_tokens(self, reads: Sequence[int]) -> int:
        """The number of tokens that `score` charges for these reads, cached ones included."""
        ...
