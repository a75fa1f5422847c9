"""A greedy answer sent while it is made, step by step.

A step is sent when the next one has begun, since what ends a solution, and the blanks before that, are no part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from flywheel.models.engine import Completion, Engine, Sampling
from flywheel.models.steps import Reader
from flywheel.problems.extract import ANSWERED, THOUGHT
from flywheel.search.strategy import Searcher

Tell = Callable[[str], None]


class Told:
    """An engine (see `flywheel.models.engine.Engine`) that tells the text of each step of a completion.

    Nothing is told of a thought: a solution begins after it.
    """

    def __init__(self, engine: Engine, reader: Reader, tell: Tell):
        self.engine, self.reader, self.tell = engine, reader, tell

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, purpose: str, n: int = 1
    ) -> list[Completion]:
        reader, told, looked = self.reader, 0, 0  # tokens told of; looked at, once a step, of a thought too

        def done(tokens: Sequence[int]) -> bool:
            nonlocal told, looked
            if (end := self._over(tokens)) > looked:
                looked = end
                said = self._before(prompt) + reader.text(tokens[:end])
                text = "".join(step.text for step in reader.steps(tokens[told:end]))  # of what follows a thought
                thinks = said.rfind(THOUGHT) > said.rfind(ANSWERED)
                if text.strip() and not thinks:
                    self.tell(text)
                    told = end
            return bool(sampling.done and sampling.done(tokens))

        return await self.engine.generate(prompt, replace(sampling, done=done), purpose=purpose, n=n)

    def _over(self, tokens: Sequence[int]) -> int:
        """The tokens of all steps that are over: something follows that is neither blank nor, perhaps, a stop text."""
        reader = self.reader
        last = len(tokens) - max(1, reader.window)
        ends = (end for end in range(last, 0, -1) if tokens[end - 1] in reader.ends)
        if reader.stopped(tokens) or (end := next(ends, 0)) == 0:
            return 0
        return end if any(token not in reader.blank for token in tokens[end:]) else 0

    def _before(self, prompt: Sequence[int]) -> str:
        """The end of the prompt, which may open a thought."""
        return self.reader.text(prompt[-8:])


def telling(searcher: Searcher, tell: Tell) -> Searcher:
    """`searcher` whose policy and reviser tell the steps of what they generate; for a search of one completion."""
    policy, reviser = (engine and Told(engine, searcher.reader, tell) for engine in (searcher.policy, searcher.reviser))
    return replace(searcher, policy=policy, reviser=reviser)
