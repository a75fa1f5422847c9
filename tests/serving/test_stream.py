"""What is told of a completion while it is made."""

from __future__ import annotations

import asyncio

import pytest
from characters import characters

from flywheel.models.engine import Completion, Sampling
from flywheel.models.steps import Reader
from flywheel.recipe import PromptSpec
from flywheel.records import Finish
from flywheel.serving.stream import Told

TOKENIZER = characters()
READER = Reader(
    TOKENIZER, PromptSpec(solve="", check="", again="", answer="Answer: (.+)", stop=["#", "Question:", "\n\nQ\nEnd"])
)


class Typist:
    """An engine that says `text`, asking after each token whether to end."""

    def __init__(self, text: str):
        self.text = text

    async def generate(self, prompt, sampling, *, purpose, n=1) -> list[Completion]:
        tokens = TOKENIZER.encode(self.text)
        end = next((i for i in range(1, len(tokens)) if sampling.done(tokens[:i])), len(tokens))
        return [Completion(tuple(tokens[:end]), Finish.STOP, False)]


@pytest.mark.parametrize(
    "prompt, text, told",
    [
        ("Try: ", "1 + 1 = 2\n2 + 2 = 4\nAnswer: 4 + 0\n", ["1 + 1 = 2\n", "2 + 2 = 4\n"]),
        ("Try: ", "1 + 1 = 2\n\n\nAnswer: 2 + 0\n", ["1 + 1 = 2\n"]),  # the blank lines come with the next step
        ("Try: ", "1 + 1 = 2\n#", []),  # a stop text: the line break before it is no part of the solution
        ("Try: ", "1 + 1 = 2\nQuestion: 3", []),
        ("Try: ", "1 + 1 = 2\nQuery of 2 digits", ["1 + 1 = 2\n"]),
        ("Try: ", "1 + 1 = 2\n\nQ\nEnd of it", []),  # a stop text of several lines
        ("Try: ", "\u00e9t\u00e9\n2 + 2 = 4 + 0\n", ["\u00e9t\u00e9\n"]),
        ("Try: ", "\n1 + 1 = 2\n2 + 2 = 4 + 0\n", ["\n1 + 1 = 2\n"]),
        ("Try: ", "<think>\n1 + 1\n</think>\n\n1 + 1 = 2\nAnswer: 2 + 0\n", ["1 + 1 = 2\n"]),
        ("Try: ", "\n<think>\n1 + 1\n2 + 2\n</think>\n1 + 1 = 2\nAnswer: 2 + 0\n", ["1 + 1 = 2\n"]),
        ("Try: ", "<think>\n1 + 1\n2 + 2 + 4 + 6\n", []),
        ("Try: <think>\n", "1 + 1\n</think>\n\n1 + 1 = 2\nAnswer: 2 + 0\n", ["1 + 1 = 2\n"]),
        ("Try: <think>\n</think>\n", "1 + 1 = 2\nAnswer: 2 + 0\n", ["1 + 1 = 2\n"]),
    ],
)
def test_a_step_is_told_when_the_next_has_begun_and_nothing_of_a_thought(prompt, text, told):
    heard: list[str] = []
    engine = Told(Typist(text), READER, heard.append)
    sampling = Sampling(99, 0.0, stop=READER.stop, done=READER.done)
    asked = engine.generate(TOKENIZER.encode(prompt), sampling, purpose="greedy")
    [done] = asyncio.run(asked)
    assert heard == told
    said = READER.solution(done.tokens, done.finish, id="", question_id="", purpose="", model="").text
    assert "<think>" in said or said.startswith("".join(told))
