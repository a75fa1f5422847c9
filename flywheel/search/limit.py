"""A token limit for a search, which is cut off when the limit is reached and answers with what it has.

Every request first reserves its maximum cost, so the limit is never exceeded, and returns what it did not use.
A request that does not fit waits while running requests may still return tokens; if none is running, the search ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import replace

from flywheel.ledger import metered
from flywheel.models.engine import Completion, Engine, Sampling
from flywheel.models.prm import together
from flywheel.search.strategy import Kept, Searcher


class OutOfTokens(Exception):
    """The tokens left do not cover the next request."""


class Allowance:
    """A token budget shared by all requests of a search; `left` tokens are neither spent nor reserved."""

    def __init__(self, limit: int):
        self.left, self.under_way, self.closed = limit, 0, False
        self.waiting: list[asyncio.Future] = []

    @asynccontextmanager
    async def hold(self, most: int) -> AsyncIterator[None]:
        """Reserve `most` tokens for the request that runs inside. Raises OutOfTokens."""
        while not self.closed and most > self.left and self.under_way:
            self.waiting.append(asyncio.get_running_loop().create_future())
            await self.waiting[-1]
        if self.closed or most > self.left:
            self.closed = True  # refuse smaller requests too: only finished solutions count after the cut
            raise OutOfTokens
        self.left -= most
        self.under_way += 1
        with metered() as spent:
            try:
                yield
            finally:
                self.left += most - spent.tokens
                self.under_way -= 1
                waiting, self.waiting = self.waiting, []
                for future in waiting:
                    if not future.done():
                        future.set_result(None)


class Limited:
    """An engine (see `flywheel.models.engine.Engine`) whose requests reserve tokens from an allowance."""

    def __init__(self, engine: Engine, allowance: Allowance):
        self.engine, self.allowance = engine, allowance

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, purpose: str, n: int = 1
    ) -> list[Completion]:
        async def one() -> Completion:
            async with self.allowance.hold(len(prompt) + sampling.max_tokens):
                [done] = await self.engine.generate(prompt, sampling, purpose=purpose)
            return done

        return await together(one() for _ in range(n))

    async def score(
        self, prompt: Sequence[int], reads: Sequence[int], labels: tuple[int, int], *, purpose: str
    ) -> list[float]:
        async with self.allowance.hold(self.engine.score_tokens(reads)):
            return await self.engine.score(prompt, reads, labels, purpose=purpose)


def limited(searcher: Searcher, limit: int) -> Searcher:
    """`searcher` with its models sharing an allowance of `limit` tokens; `kept` collects partial results."""
    allowance = Allowance(limit)

    def paying(engine: Engine | None) -> Engine | None:
        return engine and Limited(engine, allowance)

    prm, head = copy(searcher.prm), copy(searcher.head)
    for model in filter(None, (prm, head)):
        model.engine = paying(model.engine)
    policy, reviser = paying(searcher.policy), paying(searcher.reviser)
    return replace(searcher, policy=policy, reviser=reviser, prm=prm, head=head, kept=Kept())
