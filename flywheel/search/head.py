"""A question's difficulty read off the question alone: an adapter names its bin, for the prompt and one token.

Snell et al., section 8, leave such a model to future work: their own estimate of difficulty takes 2,048 samples.
"""

from __future__ import annotations

from flywheel.models.engine import Engine, Sampling
from flywheel.models.prompts import Prompts
from flywheel.models.steps import one_token
from flywheel.records import Question


class Head:
    """The difficulty head: `engine` serves the adapter, `bins` is the number of bins that it was trained to tell."""

    def __init__(self, engine: Engine, prompts: Prompts, bins: int):
        self.engine, self.prompts = engine, prompts
        self.words = bin_words(prompts.tokenizer, bins)

    async def bin(self, question: Question) -> int:
        """The most probable bin, 1 the easiest; the middle one if the model's next token names none.

        Raises TooLong if the question does not fit the model.
        """
        [said] = await self.engine.generate(self.prompts.solve(question), Sampling(1, 0.0), purpose="head")
        word = next(iter(said.tokens), None)
        return self.words.index(word) + 1 if word in self.words else (len(self.words) + 1) // 2


def bin_words(tokenizer, bins: int) -> list[int]:
    """The token ids of the bins' names, 1 to `bins`. Raises ValueError if one is not a single token."""
    try:
        return [one_token(tokenizer, str(b), "head") for b in range(1, bins + 1)]
    except ValueError as error:
        raise ValueError(f"{error.args[0].partition(';')[0]}; lower calibrate.bins, or leave out head") from None
