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
    samples = {
        "a": [solution("a", i, *made) for i, made in enumerate(texts)],
        "b": [solution("b", i, "no", None) for i in range(4)],
    }
    correct = {s.id: s.answer == "2" for group in samples.values() for s in group}
    found = diversity(samples, correct)
    assert found["distinct_right"] == 1.0  # two in a, which differ in more than white space, none in b
    three_and_one = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found["answer_entropy"] == pytest.approx(three_and_one / 2)
