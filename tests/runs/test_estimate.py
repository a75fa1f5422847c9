"""What a dry run says: tokens by stage against what the default recipe really spent, and where speeds come from."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from flywheel.recipe import load
from flywheel.runs import estimate
from flywheel.runs.estimate import Rates, by_config, guessed, keep, measured, overview, parameters, planned
from flywheel.runs.stage import schedule
from flywheel.stages import stages

ROOT = Path(__file__).parents[2]
SEED_MODEL = ROOT / "data" / "chain" / "seed_model"
RATES = Rates(
    open=1,
    generate=9000,
    read=50_000,
    start=1,
    train=10_000,
    prompt=13,
    check=13,
    solution=37,
    steps=8,
    train_memory=1.5e9,
    serve_memory=2e9,
)
COUNTS = {"train": 320, "calibrate": 64, "validation": 40, "test": 200}


def spent() -> dict[str, tuple[int, int]]:
    """Stage -> (tokens, seconds) of three rounds of the default recipe, from the table in docs/recipes.md."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| `?(\w+)`? \| ([\d,]+) \| (\d+) \|$", text, re.M)
    return {stage: (int(tokens.replace(",", "")), int(seconds)) for stage, tokens, seconds in rows}


def test_the_tokens_told_are_those_that_the_default_recipe_spent(tmp_path):
    recipe, true = load(ROOT / "recipes" / "chain.yaml"), spent()
    told: dict[str, int] = {}
    for scheduled in schedule(stages, 3):
        name = scheduled.stage.name
        told[name] = told.get(name, 0) + planned(recipe, RATES, COUNTS, name, scheduled.round).tokens
    assert set(told) == set(true) - {"all"}
    for stage in set(told) - {"harvest"}:  # a plan may choose any strategy
        assert 1 / 1.6 < told[stage] / true[stage][0] < 1.6, (stage, told[stage], true[stage])
    assert 1 / 1.5 < sum(told.values()) / true["all"][0] < 1.5


@pytest.mark.parametrize(
    ("round", "stage", "short"),
    [(0, "evaluate", False), (1, "sample", False), (1, "distill", True), (1, "evaluate", True), (2, "search", True)],
)
def test_later_policies_write_solutions_as_long_as_the_base_s_right_ones(round, stage, short):
    recipe, half = load(ROOT / "recipes" / "chain.yaml"), replace(RATES, solution=18.5, steps=4)
    told = planned(recipe, replace(RATES, right=18.5), COUNTS, stage, round)
    assert told == planned(recipe, half if short else RATES, COUNTS, stage, round)


@pytest.mark.parametrize(
    ("round", "stage", "times"), [(0, "evaluate", 10), (1, "sample", 10), (1, "gate", 1), (2, "sample", 1)]
)
def test_worked_examples_count_in_what_the_base_samples_alone(round, stage, times):
    recipe, shown = load(ROOT / "recipes" / "chain.yaml"), replace(RATES, bare=10 * RATES.prompt)
    plain, longer = (planned(recipe, rates, COUNTS, stage, round).prompt for rates in (RATES, shown))
    assert plain and longer == pytest.approx(times * plain)


def test_a_dry_run_says_where_its_speed_comes_from(tmp_path):
    recipe, plan = load(ROOT / "recipes" / "chain.yaml"), schedule(stages, 1)
    told = overview(recipe, tmp_path, plan, COUNTS, RATES, 1, 2).splitlines()
    assert told[-2].endswith("(by this machine's speed with the base)")
    assert told[-1] == "memory: up to 1.5GB to train, 2.0GB to search in each of 2 processes"
    large = overview(recipe, tmp_path, plan, COUNTS, replace(RATES, serve_memory=2e15), 1, 2).splitlines()[-1]
    assert re.match(r"memory: 4000.0TB are needed together and [\d.]+GB there: lower engine.workers, ", large)
    assert overview(recipe, tmp_path, plan, COUNTS, guessed(recipe), 1, 2).endswith("(rough: nothing is measured yet)")
    unknown = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": "nobody/no-such-model"})})
    told = overview(unknown, tmp_path, plan, COUNTS, guessed(unknown), 1, 2)
    assert "no-such-model is not known before its download" in told and re.search(
        r"to do: about [\d.]+M tokens, \?", told
    )


def test_rates_are_kept_for_what_they_depend_on(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measured({"threads": 1}) is None
    keep({"threads": 1}, RATES)
    assert measured({"threads": 1}) == RATES and measured({"threads": 2}) is None
    assert [path.parent.name for path in tmp_path.rglob("*.json")] == ["flywheel"]


def test_a_model_s_size_is_read_from_its_weights_or_config(tmp_path, monkeypatch):
    count = parameters(str(SEED_MODEL))
    config = json.loads((SEED_MODEL / "config.json").read_text())
    assert by_config(config) == pytest.approx(count, rel=0.05) and by_config({}) is None
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda base, name: str(tmp_path / name))
    assert parameters("somebody/a-model") == by_config(config)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda base, name: None)
    assert parameters("somebody/a-model") is None
    recipe = load(ROOT / "recipes" / "chain.yaml", ["model.base=somebody/a-model"])
    assert math.isnan(guessed(recipe).generate)
    assert estimate.clock(guessed(recipe).generate) == "?"
