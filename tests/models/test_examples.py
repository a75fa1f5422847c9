"""Worked examples: shown to the bare base alone, as text or as chat turns, by level."""

from __future__ import annotations

import pytest

from data.shrunken import TEMPLATE
from flywheel.models.prompts import Prompts
from flywheel.recipe import PromptSpec
from flywheel.records import Question
from tests.models.test_steps import characters

EXAMPLES = [
    {"question": "1 + 1", "solution": "Answer: 2"},
    {"question": "2 * 3", "solution": "2 * 3 = 6\nAnswer: 6", "level": "product"},
]


def prompts(**changes) -> Prompts:
    tokenizer = characters()
    tokenizer.chat_template = TEMPLATE
    spec = {"solve": "Q: {question}\n", "check": "", "again": "", "examples": EXAMPLES}
    return Prompts(PromptSpec(**{**spec, **changes}), tokenizer)


def text(made: Prompts, ids: list[int]) -> str:
    return made.tokenizer.decode(ids)


def test_only_the_bare_base_is_shown_worked_examples():
    made, question = prompts(), Question("q", "5 + 4")
    assert text(made, made.solve(question, bare=True)) == "Q: 1 + 1\nAnswer: 2\n\nQ: 5 + 4\n"
    assert text(made, made.solve(question)) == text(made, made.revise(question, [])) == "Q: 5 + 4\n"


@pytest.mark.parametrize(("level", "shown"), [("product", "2 * 3"), ("sum", "1 + 1"), ("", "1 + 1")])
def test_a_question_is_shown_the_examples_of_its_level_else_those_without(level, shown):
    made = prompts()
    head = text(made, made.solve(Question("q", "7 * 8", level), bare=True))
    assert head.count("Q: ") == 2 and head.startswith(f"Q: {shown}\n")


def test_in_a_chat_each_example_is_a_turn_of_the_user_and_one_of_the_assistant():
    made = prompts(chat=True)
    head = text(made, made.solve(Question("q", "5 + 4"), bare=True))
    assert head.count("<|im_start|>user") == 2 and head.count("<|im_start|>assistant") == 2
    assert "<|im_start|>assistant\nAnswer: 2<|im_end|>" in head and head.endswith("<|im_start|>assistant\n")
