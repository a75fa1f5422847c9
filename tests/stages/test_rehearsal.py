"""The rehearsal of a run: lengths on the scripted engine, where they are known; real steps of the real trainings."""

from __future__ import annotations

import pytest

from flywheel.recipe import load
from flywheel.stages import rehearsal
from tests import micro
from tests.stages.test_tryout import opened  # noqa: F401


def test_lengths_are_those_of_the_questions_and_solutions(opened):  # noqa: F811
    found = rehearsal.sample(opened("1 + 2 = 3 \n Answer 3"), force=False)
    assert found["solution"] == found["right"] == 8 and found["steps"] == pytest.approx(2)
    assert found["prompt"] == found["check"] == len(micro.tokenizer().encode("Q 1 + 2 ?\nTry "))
    assert min(found["generate"], found["read"], found["open"]) > 0


def test_policy_and_prm_are_trained_and_their_adapters_written(tmp_path):
    sets = ["distill.micro_batch_size=4", "distill.batch_size=4", "model.lora_rank=4"]
    found = rehearsal.train(load("recipes/chain.yaml", sets), tmp_path, length=30)
    assert found["train"] > 0 and found["start"] >= 0 and found["train_memory"] > 100 << 20
    for role in ("policy", "prm"):
        assert (tmp_path / role / "adapter" / "adapter_model.safetensors").is_file()
