"""The try-out of a base before a run, on the scripted engine: what it prints, and which key it names."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from flywheel.errors import UserError
from flywheel.recipe import load
from flywheel.stages import tryout
from flywheel.stages.rehearsal import sample
from flywheel.stages.tryout import QUESTIONS, SAMPLES
from tests import micro


@pytest.fixture
def opened(tmp_path):
    """A function: a recipe whose base plays `lines` at every question; the right answer is 3."""
    micro.tokenizer().save_pretrained(tmp_path)
    rows = [{"id": f"t{i:02d}", "question": f"1 + {i}", "answer": "3", "split": "train"} for i in range(1, 31)]
    rows += [
        {"question": f"2 + {i}", "answer": "3", "split": s} for i, s in enumerate(("calibrate", "test", "validation"))
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(*lines: str, **changes: object):
        script = {"questions": {"Q": [{"text": line} for line in lines]}}
        (tmp_path / "scripted.json").write_text(json.dumps(script))
        sets = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
        return load(
            "recipes/chain.yaml",
            [
                f"model.base={tmp_path}",
                f"problems={{path: {tmp_path / 'mine.jsonl'}}}",
                "engine={kind: 'tests.scripted:open_backend', max_model_len: 200}",
                *sets,
            ],
        )

    return recipe


def test_a_try_out_shows_what_was_read_and_its_shares(opened, capsys, monkeypatch):
    monkeypatch.setattr(tryout, "SOON", 0.0)
    sample(opened("1 + 2 = 3 \n Answer 3", "1 + 2 = 4 \n Answer 4", "7 \n"), force=False)
    out = capsys.readouterr().out
    assert f"try-out: {QUESTIONS} training questions x {SAMPLES} samples" in out
    assert re.search(r"\d tokens a solution", out)
    assert "  step 1: 1 + 2 = 3 \\n" in out and "  step 2: Answer 3\n" in out
    assert "answer: 3 (correct; the right one is 3)" in out and "answer: none (unparsable;" in out
    shares = {word: int(share) for word, share in re.findall(r"(\w+) (\d+)%", out.splitlines()[-1])}
    assert set(shares) == {"correct", "incorrect", "unparsable"} and 99 <= sum(shares.values()) <= 101


def test_a_fast_base_is_asked_more_questions(opened, capsys):
    sample(opened("1 + 2 = 3 \n Answer 3"), force=False)
    assert f"try-out: 30 training questions x {SAMPLES} samples" in capsys.readouterr().out


def test_a_base_that_is_seldom_right_is_asked_more_questions_before_it_is_stopped(opened, capsys, monkeypatch):
    monkeypatch.setattr(tryout, "SOON", 0.0)
    recipe = opened("1 + 2 = 4 \n Answer 4")
    script = Path(recipe.model.base) / "scripted.json"
    lines = json.loads(script.read_text())["questions"]
    asked = random.Random(recipe.seed).sample([f"t{i:02d}" for i in range(1, 31)], 30)
    later = next(name for name in asked[QUESTIONS:] if name >= "t10")  # its text is no part of another's
    script.write_text(json.dumps({"questions": lines | {f"1 + {later[1:]}": [{"text": "1 + 2 = 3 \n Answer 3"}]}}))
    sample(recipe, force=False)
    assert f"try-out: 30 training questions x {SAMPLES} samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, changes, named",
    [
        ("1 + 2 = 3 \n ok", {}, "see prompts.answer"),
        ("1 + 2 = 3 \n Answer 3", {"sample__max_tokens": 4}, "see prompts.stop .* then sample.max_tokens"),
        ("1 + 2 = 3 \n ok", {}, "an answer could be read in none of 120 solutions"),
        ("1 + 2 = 4 \n Answer 4", {}, "none of 120 answers is right"),
        ("1 + 2 = 3 \n Answer 3", {"problems__checker": "tests.stages.test_tryout:broken"}, "see problems.checker"),
    ],
)
def test_a_base_that_answers_nothing_or_nothing_right_is_stopped_with_the_key_to_look_at(opened, line, changes, named):
    recipe = opened(line, **changes)
    with pytest.raises(UserError, match=named) as error:
        sample(recipe, force=False)
    assert "\n" not in str(error.value) and "--force" in str(error.value)
    sample(recipe, force=True)


def broken(gold: str, answer: str) -> bool:
    raise ValueError("broken")
