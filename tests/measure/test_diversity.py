"""Diversity of samples, by hand."""

from __future__ import annotations

import math

import pytest

from flywheel.measure.diversity import diversity
from flywheel.records import Finish, Solution, Step


def solution(question: str, number: int, text: str, answer: str | None) -> Solution:
    steps = (Step(text, (number,)),)
    return Solution(f"{question}/{number}", question, steps, Finish.STOP, answer, "sample", "policy_0", question)


def test_distinct_right_texts_and_the_entropy_of_answers():
    texts = [("1 + 1 = 2", "2"), ("1  + 1 = 2\n", "2"), ("so 2", "2"), ("3", "3")]
    found = diversity([(solution("a", i, *made), made[1] == "2") for i, made in enumerate(texts)], str.strip)
    assert found["distinct_right"] == 2  # they differ in more than white space
    assert found["answer_entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    nothing = diversity([(solution("b", i, "no", None), False) for i in range(4)], str)
    assert nothing == {"distinct_right": 0, "answer_entropy": 0.0}
