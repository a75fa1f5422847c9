"""The process reward model (PRM): the values of a solution's steps, and one score from them.

A PRM is a causal language model that predicts one of two label tokens after a step (Snell et al. 2024,
section 5.1 and appendix D; the labels are those of Math-Shepherd). The value of a prefix is
P(good) / (P(good) + P(bad)) as the next token, so any engine can serve it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Iterable, Sequence
from typing import TypeVar

from flywheel.errors import TooLong
from flywheel.models.engine import Engine
from flywheel.models.prompts import Prompts
from flywheel.models.steps import one_token
from flywheel.records import Question, Step

T = TypeVar("T")
SURE = 1e-6  # `odds` takes no value as nearer to 0 or 1


class Prm:
    """Computes step values of solutions with an engine.

    labels: the words for a good and a bad step (recipe `prm.labels`). aggregate: how step values become
    one score (recipe `prm.aggregate`). Raises ValueError naming `prm.labels` if a word is not a single
    token or both are the same token.
    """

    def __init__(self, engine: Engine, prompts: Prompts, labels: tuple[str, str], aggregate: str):
        self.engine, self.prompts, self.aggregate = engine, prompts, aggregate
        self.labels = label_ids(prompts.tokenizer, labels)

    async def values(self, question: Question, steps: Sequence[Step], *, since: int = 0) -> tuple[float, ...]:
        """The value in [0, 1] after each of `steps[since:]`.

        Raises TooLong, naming the question, if the text does not fit the model.
        """
        tokens, reads = self.prompts.check(question, steps)
        return await self._read(question, tokens, reads[since:])

    async def _read(self, question: Question, tokens: Sequence[int], reads: Sequence[int]) -> tuple[float, ...]:
        try:
            values = await self.engine.score(tokens, reads, self.labels, purpose="verify")
        except TooLong as error:
            raise TooLong(f"question {question.id}: {error}") from None
        for value in values:
            if not 0 <= value <= 1:  # NaN too
                raise ValueError(f"question {question.id}: {self.engine.name} gave the value {value}")
        return tuple(values)


async def together(work: Iterable[Awaitable[T]]) -> list[T]:
    """Await all of `work` concurrently; results in order. If one fails, its error is raised after all have ended."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def label_ids(tokenizer, labels: tuple[str, str]) -> tuple[int, int]:
    """Token ids of the good and the bad label.

    Raises ValueError naming `prm.labels` if one is not a single token or both are the same token.
    """
    good, bad = (one_token(tokenizer, word, "prm.labels") for word in labels)
    if good == bad:
        raise ValueError(f"prm.labels: {labels[0]!r} and {labels[1]!r} are the same token")
    return good, bad


def aggregate(values: Sequence[float], how: str) -> float:
    """One score in [0, 1] from a solution's step values in [0, 1]; 0.0 for a solution without steps.

    Snell et al. found `last` best with soft Monte Carlo labels (appendix E); `min` and `product` are from
    Lightman et al. (2023, arXiv 2305.20050); `odds` multiplies the odds of the steps, for `prm.target: ratio`. Raises
    ValueError for a NaN or an unknown `how`.
    """
    if any(math.isnan(value) for value in values):
        raise ValueError(f"a step value is not a number: {tuple(values)}")
    if not values:
        return 0.0
    match how:
        case "last":
            return values[-1]
        case "min":
            return min(values)
        case "product":
            return math.prod(values)
        case "mean":
            return sum(values) / len(values)
        case "odds":
            sure = [min(max(value, SURE), 1 - SURE) for value in values]
            return 1 / (1 + math.prod((1 - value) / value for value in sure))
    raise ValueError(f"prm.aggregate: {how!r} is none of last, min, product, mean, odds")
