"""The probe of a dry run: lengths on the scripted engine, where they are known, and a few real steps of a training."""

from __future__ import annotations

import pytest

from flywheel.recipe import load
from flywheel.stages import probe
from tests import micro
from tests.stages.test_tryout import opened  # noqa: F401


def test_lengths_are_those_of_the_questions_and_solutions(opened):  # noqa: F811
    found = probe.sampling(opened("1 + 2 = 3 \n Answer 3"))
    assert found["solution"] == 8 and found["steps"] == pytest.approx(2)
    assert found["prompt"] == found["check"] == len(micro.tokenizer().encode("Q 1 + 2 ?\nTry "))
    assert min(found["generate"], found["read"], found["open"]) > 0


def test_a_whole_solution_s_length_is_told_from_short_completions(opened, monkeypatch):  # noqa: F811
    """As on an engine that is too slow for whole solutions: after 4 tokens half of them have ended."""
    monkeypatch.setattr(probe, "SECONDS", 0.0)
    found = probe.sampling(opened("1 + 2 = 3 \n Answer 3", "3 \n"))
    assert 4 < found["solution"] < 12


def test_a_training_is_timed_on_the_very_model():
    sets = ["distill.micro_batch_size=4", "distill.batch_size=4", "model.lora_rank=4"]
    found = probe.training(load("recipes/chain.yaml", sets), length=30)
    assert found["train"] > 0 and found["start"] >= 0
