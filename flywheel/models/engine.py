"""The interface of a served model: sample completions of a prompt, and score prefixes of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flywheel.records import Finish, Role


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters. Temperature 0 is greedy. A token id in `stop` ends the completion and is kept in it.

    `done`: asked after each token with all tokens of the completion so far; if true, the completion ends there.
    `seed`: of one sequence, set where it is submitted; None: any. An engine may ignore it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: frozenset[int] = frozenset()
    done: Callable[[Sequence[int]], bool] | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def named(self) -> dict[str, Any]:
        """All but `done` and `seed`, by vLLM's names."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "stop_token_ids": sorted(self.stop),
        }


@dataclass(frozen=True, slots=True)
class Completion:
    """`tokens`: the sampled ids, including a final stop token but never the EOS token.

    `eos`: the completion ended with EOS. `finish`: LENGTH if `max_tokens` truncated it, else STOP.
    """

    tokens: tuple[int, ...]
    finish: Finish
    eos: bool


class Engine(Protocol):
    """One model in one role. The backend batches the calls of concurrent coroutines; callers need not."""

    role: Role
    name: str  # of the model, e.g. policy_2
    parameters: int  # all parameters of the model, adapter included
    bare: bool  # the base itself, without an adapter
    max_model_len: int  # tokens

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, purpose: str, n: int = 1
    ) -> list[Completion]:
        """Sample `n` completions of `prompt` (token ids), charged to the ledger under `purpose`.

        Raises TooLong if the prompt plus `max_tokens` exceeds `max_model_len`, and ValueError
        for an empty prompt or for `n` > 1 at temperature 0.
        """
        ...

    async def score(
        self, prompt: Sequence[int], reads: Sequence[int], labels: tuple[int, int], *, purpose: str
    ) -> list[float]:
        """P(labels[0]) / (P(labels[0]) + P(labels[1])) as the next token after each prefix of `prompt`.

        `reads`: the prefix lengths in tokens, ascending; tokens after the last prefix are ignored.
        Raises TooLong if the last prefix plus one token exceeds `max_model_len`.
        """
        ...

    def score_tokens(self, reads: Sequence[int]) -> int:
        """The number of tokens that `score` charges for `reads`, cached ones included."""
        ...
