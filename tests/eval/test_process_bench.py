"""ProcessBench's files, and F1 of the first wrong step with its interval."""

from __future__ import annotations

import argparse
import json

import pytest

from eval.shared import published_values, with_published
from eval.studies.process_bench import figures, measure, samples
from flywheel.errors import UserError
from flywheel.recipe import load
from flywheel.records import Question, Step
from flywheel.runs.run import Run
from tests import micro

ROWS = [
    {"id": "gsm8k-0", "problem": "1 + 1?", "steps": ["1 + 1 = 2.", "So 2."], "label": -1, "final_answer_correct": True},
    {"id": "gsm8k-1", "problem": "1 + 2?", "steps": ["1 + 2 = 4.", "So 4."], "label": 0},
]


def test_a_list_and_lines_are_read_alike(tmp_path):
    (tmp_path / "gsm8k.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = samples(tmp_path / "gsm8k.json")
    assert found == samples(tmp_path / "gsm8k.jsonl")
    assert [(s.question.text, s.steps, s.wrong) for s in found] == [
        ("1 + 1?", ("1 + 1 = 2.", "So 2."), None),
        ("1 + 2?", ("1 + 2 = 4.", "So 4."), 0),
    ]


@pytest.mark.parametrize(
    "change", [{"label": 2}, {"label": -2}, {"label": "0"}, {"steps": []}, {"steps": "a"}, {"problem": 3}]
)
def test_a_bad_row_is_named_with_its_file(change, tmp_path):
    path = tmp_path / "math.json"
    path.write_text(json.dumps([*ROWS, {**ROWS[0], **change}]))
    with pytest.raises(UserError, match=r"math\.json: row 3: wanted problem .*, steps .*, label"):
        samples(path)


def test_files_of_another_kind_are_named(tmp_path):
    path = tmp_path / "math.json"
    for text, said in (
        ("[{", "neither a JSON list nor"),
        (json.dumps(ROWS[:1]), "F1 needs solutions with an error and"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=f"math.json: {said}"):
            samples(path)
    with pytest.raises(UserError, match=r"none of ProcessBench's files in it \(gsm8k.json, "):
        measure(argparse.Namespace(data=tmp_path / "none"))


def test_f1_by_hand_lies_in_its_interval():
    judged, wrong = [(0.9, 0.8), (0.9, 0.2), (0.3, 0.9), (0.7, 0.6)] * 5, [None, 1, 1, None] * 5
    found = figures(judged, wrong, 0.5)
    assert (found["on_wrong"], found["on_right"]) == (0.5, 1.0) and found["f1"] == pytest.approx(2 / 3)
    low, high = found["f1_ci"]
    assert 0.2 < low < 2 / 3 < high <= 1


def test_the_round_s_prm_the_base_and_a_published_one_are_scored(tmp_path):
    """On the laboratory's seed model; the published PRM is one with a value head."""
    recipe = load("recipes/chain.yaml", ["engine.max_model_len=40", "sample.max_tokens=8", "engine.kv_cache_mb=16"])
    run, base = Run(tmp_path / "run", recipe), recipe.model.base
    micro.adapter(base, tmp_path / "run" / "round_1" / "train_prm" / "adapter")
    rows = [
        {"problem": "5 +3 *2", "steps": [f"5 +3 ={8 + i % 2}", "8 *2 =16", "Answer 16"], "label": (-1, 0)[i % 2]}
        for i in range(6)
    ]
    rows.append({"problem": "5" + " +3" * 60, "steps": ["Answer 1"], "label": 0})  # longer than the model
    (tmp_path / "math.json").write_text(json.dumps(rows))
    rival = f"skywork={micro.with_value_head(base, tmp_path / 'rival')}"
    args = argparse.Namespace(runs=[run], round=1, data=tmp_path, threshold=0.5, published=rival)
    found = measure(args)
    steps = [Step("5 +3 =8\n", ()), Step("Answer 8", ())]
    [values] = published_values(with_published(run, args.published), [(Question("q", "5 +3"), steps)])
    assert len(values) == 2 and all(0 < value < 1 for value in values)
    subset = found["subsets"]["math"]
    assert (subset["solutions"], subset["too_long"]) == (6, 1) and found["mean_f1"].keys() == {"prm_1", "base", "rival"}
    for name, f1 in found["mean_f1"].items():
        low, high = subset[name]["f1_ci"]
        assert 0 <= low <= f1 == subset[name]["f1"] <= high <= 1


def test_a_published_prm_that_is_not_there_is_one_line(tmp_path):
    run = Run(tmp_path, load("recipes/chain.yaml"))
    assert with_published(run, None) is run
    for said, complaint in (("qwen=/no/such", "prm.published: /no/such: no such"), ("qwn=x", "prm.published.format")):
        with pytest.raises(UserError, match=complaint):
            with_published(run, said)
