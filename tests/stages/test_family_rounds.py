"""A micro round of every family, from one recipe in which only the model changes (and `chat`, without a template)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flywheel.recipe import parse
from flywheel.stages import ORDER
from flywheel.stages.kit import preflight
from tests import families
from tests.stages.test_round import ROOT, SMALL, manifest

RECIPE = {
    "name": "family",
    "problems": {"path": "questions.jsonl"},
    "model": {"base": "base", "lora_rank": 8},
    "engine": {"max_model_len": 768, "kv_cache_mb": 32, "dtype": "float32"},
    "prompts": {
        "chat": True,
        "solve": "What is {question}?",
        "check": "Check: is {question} right?",
        "answer": r"Answer (\d)",
    },
    "prm": {"labels": ["3", "5"], "learning_rate": 1e-3},
    "calibrate": {
        "strategies": [{"kind": "best_of_n"}, {"kind": "beam", "width": 2}, {"kind": "revise"}],
        "budgets": [4],
    },
    "harvest": {"budget": 4},
    "evaluate": {"budget": 4},
}


QUESTIONS = [(f"{i} and {j}", str((i + j) % 2)) for i in range(10) for j in range(10)]
SPLITS = ["train"] * 50 + ["calibrate"] * 20 + ["validation"] * 10 + ["test"] * 20


def recipe_of(name: str, folder: Path) -> dict:
    """The recipe of a family, with its questions and its base in `folder`."""
    rows = [{"question": q, "answer": a, "split": split} for (q, a), split in zip(QUESTIONS, SPLITS)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = json.loads(json.dumps(RECIPE))
    recipe["problems"]["path"], recipe["model"]["base"] = str(folder / "questions.jsonl"), str(folder / "base")
    if families.FAMILIES[name].template is None:
        recipe["prompts"] |= {"chat": False, "again": "\nWhat is right?\n"}
    return recipe


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_passes_what_is_checked_before_a_run(name, tmp_path):
    families.model(name, tmp_path / "base")
    preflight(parse(recipe_of(name, tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_family_runs_a_whole_round(name, tmp_path):
    recipe = recipe_of(name, tmp_path)
    (tmp_path / "family.yaml").write_text(yaml.safe_dump(recipe))
    families.taught(name, tmp_path / "base", parse(recipe).prompts, QUESTIONS)
    command = [sys.executable, "-m", "flywheel.iterate", "--recipe", str(tmp_path / "family.yaml"), "--round", "1"]
    done = subprocess.run(
        [*command, "--runs", str(tmp_path), "--set", *SMALL], cwd=ROOT, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "family"
    assert all(manifest(run, 1, stage)["figures"] for stage in ORDER)
    assert manifest(run, 1, "train_prm")["figures"]["examples"] > 0
    assert manifest(run, 1, "train_reviser")["figures"]["trained"]
