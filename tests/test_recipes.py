"""Every shipped recipe loads, and none names a place on somebody's machine."""

import json
from pathlib import Path

import pytest
import yaml

from flywheel.errors import UserError
from flywheel.iterate import find_recipe, parser
from flywheel.problems import sources
from flywheel.problems.grading import load_function
from flywheel.recipe import RecipeError, load
from flywheel.runs.estimate import guessed, overview
from flywheel.runs.stage import schedule
from flywheel.search.revise import Revise
from flywheel.search.strategies import strategies
from flywheel.stages import stages
from flywheel.stages.kit import preflight
from tests import families

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_loads(path):
    recipe = load(path)
    assert recipe.name == path.stem
    assert not Path(recipe.problems.path).is_absolute() and not Path(recipe.model.base).is_absolute()
    assert "{question}" in recipe.prompts.solve and "{question}" in recipe.prompts.check
    load_function(recipe.problems.checker)
    if recipe.problems.step_checker:
        load_function(recipe.problems.step_checker, "problems.step_checker")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_chain_of_revisions_fits_the_model(path):
    recipe = load(path)
    for _, strategy in strategies(recipe.calibrate):
        if isinstance(strategy, Revise) and recipe.prompts.chat:  # attempts of full length; the laboratory's are short
            assert (strategy.context + 1) * recipe.sample.max_tokens + 256 <= recipe.engine.max_model_len


def test_a_recipe_for_gpus_says_that_it_was_not_run():
    for path in (ROOT / "recipes" / "qwen25_05b_gsm8k.yaml", *(ROOT / "recipes" / "gpu").glob("*.yaml")):
        assert "Not run" in path.read_text().split("\nname:")[0], path


def test_a_recipe_that_extends_another_says_only_what_differs(tmp_path):
    parent = ROOT / "recipes" / "chain.yaml"
    (tmp_path / "mine.yaml").write_text(f"extends: {parent}\nname: mine\nlabel: {{rollouts: 3}}\n")
    mine, theirs = load(tmp_path / "mine.yaml"), load(parent)
    assert (mine.name, mine.label.rollouts, mine.label.questions) == ("mine", 3, theirs.label.questions)
    assert mine.model_copy(update={"name": "chain", "label": theirs.label}) == theirs
    for text, complaint in (
        ("extends: none.yaml", "mine.yaml: extends: .*none.yaml: no such recipe"),
        ("extends: mine.yaml", "mine.yaml: extends: the path of another recipe wanted"),
        ("extends: [a]", "mine.yaml: extends: the path of another recipe wanted"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(RecipeError, match=complaint):
            load(tmp_path / "mine.yaml")


def test_a_recipe_is_a_file_or_the_name_of_one_that_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chain").mkdir()  # a folder of that name is no recipe
    assert find_recipe("chain").read_text() == (ROOT / "recipes" / "chain.yaml").read_text()
    (tmp_path / "chain_lab").write_text("name: mine")
    assert find_recipe("chain_lab").read_text() == "name: mine"
    with pytest.raises(UserError, match="chian: no such recipe file; recipes that ship: chain, chain_lab, "):
        find_recipe("chian")


@pytest.mark.parametrize(
    "override, complaint",
    [
        ('label.rollouts="8"', "label.rollouts: Input should be a valid integer"),
        ("label.rollouts=true", "label.rollouts: Input should be a valid integer"),
        ("engine.kind=vlm", "engine.kind: "),
        ("prm.labels=[ok]", "prm.labels"),
        ("prm.aggregate=last", "prm.aggregate: last does not sum up a PRM of prm.target progress"),
        ("label.prefer=[0.9, 0.1]", "label.prefer: a rising pair wanted"),
        ("calibrate.strategies=[]", "calibrate.strategies"),
        ("calibrate.strategies=[{kind: revise}]", "calibrate.strategies: best_of_n is missing;"),
        (
            "calibrate.strategies=[{kind: best_of_n}, {kind: revise, max_budget: 2}]",
            "calibrate.strategies: revise with max_budget 2 is never tried",
        ),
        ("reviser.context=3", "calibrate.strategies: revise shows more attempts than reviser.context 3"),
        (
            "calibrate.strategies=[{kind: best_of_n, max_budget: 4}]",
            "calibrate.strategies: best_of_n is missing at budget 16;",
        ),
        ("label.rollout=8", "label.rollout: unknown key; did you mean label.rollouts?"),
    ],
)
def test_a_wrong_key_or_type_is_one_line_that_names_the_key(override, complaint):
    with pytest.raises(RecipeError) as error:
        load(ROOT / "recipes" / "chain.yaml", [override])
    assert complaint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("number", ["1e-3", "0.001", "1.0e-3"])
def test_numbers_are_written_as_in_python(number):
    assert load(ROOT / "recipes" / "chain.yaml", [f"distill.learning_rate={number}"]).distill.learning_rate == 0.001


def test_set_takes_several_keys_and_may_be_repeated():
    assert parser().parse_args(["--set", "a=1", "b=2", "--round", "2", "--set", "c=3"]).set == ["a=1", "b=2", "c=3"]


def test_an_optional_section_that_a_stored_recipe_lacks_can_be_set(tmp_path):
    stored = tmp_path / "recipe.yaml"
    stored.write_text(yaml.safe_dump(load("recipes/chain.yaml", ["head=null"]).model_dump(mode="json")))
    sets = ["head.epochs=6", "prm.published.model=some/model", "prm.published.format=qwen"]
    recipe = load(stored, sets)
    assert recipe.head.epochs == 6 and recipe.prm.published.model == "some/model"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "gpu").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_for_gpus_passes_the_checks_before_a_run_and_is_estimated(path, tmp_path):
    """On a small random model of the family, and questions in the published data set's columns."""
    owner = load(path).model.base.partition("/")[0]
    family = {"Qwen": "qwen2.5", "meta-llama": "llama3"}.get(owner, "smollm2")
    families.model(family, tmp_path / "base", max_position_embeddings=8192)
    (tmp_path / "data").mkdir()
    for split, count in (("train", 200), ("test", 8)):
        rows = [
            {
                "question": f"{split} {i} + 1?",
                "problem": f"{split} {i} + 1?",
                "answer": f"So it is {i + 1}.\n#### {i + 1}",
                "solution": f"It is $\\boxed{{{i + 1}}}$.",
                "unique_id": f"{split}{i}",
                "level": 1 + i % 5,
                **{"Body": f"{split} has {i}.", "Question": "One more?", "Answer": i + 1.0, "ID": f"{split}-{i}"},
                "Type": "Addition",
            }
            for i in range(count)
        ]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    limits = "problems.limits={train: 20, calibrate: 10, validation: 10, test: 0}"
    recipe = load(path, [f"model.base={tmp_path / 'base'}", f"problems.path={tmp_path / 'data'}", limits])
    assert preflight(recipe) == []
    counts = {str(split): len(group) for split, group in sources.load(recipe.problems).items()}
    assert (counts["train"], counts["test"]) == (20, 8) and min(counts.values()) > 0  # the others are drawn by hash
    told = overview(recipe, tmp_path / "run", schedule(stages, 3), counts, guessed(recipe), 8, 1)
    assert "round 3" in told and "to do: about" in told
