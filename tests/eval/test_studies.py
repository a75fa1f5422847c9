"""Every study answers --help; what the kept results name exists."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from stage_files import store

from eval.__main__ import main, questions
from eval.studies import compare, coverage
from flywheel.errors import UserError
from flywheel.recipe import load
from flywheel.records import Finish, Solution, Step
from flywheel.runs.run import Run

EVAL = Path(__file__).parents[2] / "eval"
RUNS = yaml.safe_load((EVAL / "runs.yaml").read_text())


@pytest.mark.parametrize("study", questions())
def test_every_study_says_what_it_asks_and_takes(study, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([study, "--help"])
    printed = capsys.readouterr().out
    assert f"usage: python -m eval {study}" in printed and questions()[study] in printed


def test_help_lists_the_studies(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {study} " in printed and question in printed for study, question in questions().items())
    assert len(questions()) == 20


def test_what_a_person_can_mend_is_one_line(tmp_path, capsys):
    assert main(["no_such_study"]) == 2
    assert main(["seeds", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 2
        and "known: ablate, " in lines[0]
        and lines[1] == f"eval seeds: {tmp_path}: not a run " + ("(no recipe.yaml in it)")
    )


def test_every_kept_result_names_runs_that_are_described():
    kept = {path.name: path.read_text() for path in (EVAL / "results").glob("*.json")}
    assert RUNS["results"].keys() == kept.keys()
    for name, text in kept.items():
        data = json.loads(text)
        commands = {data["command"]} if isinstance(data, dict) else {row["command"] for row in data if "command" in row}
        named = {run for command in commands for run in re.findall(r"runs/(\w+)", command)}
        assert set(RUNS["results"][name]) <= RUNS["runs"].keys(), name
        if name not in ("claims.json", "figures.json"):  # claims hold the rows of other studies too
            assert named == set(RUNS["results"][name]), name
        assert named <= RUNS["runs"].keys(), name


def test_a_choice_is_shown_by_calibration_questions_alone(monkeypatch):
    from eval.studies import choose

    monkeypatch.setattr(choose, "pass_rates", lambda run, *at: run.rates if at == ("gate", 1) else {})

    def run(name: str, rights: dict[str, list[int]]) -> SimpleNamespace:
        figures = {
            ("calibrate", 1): {"two_fold": [{"budget": 4, "accuracy": 0.5, "tokens": 10.0}]},
            ("train_prm", 1): {"auc_within_question": 0.7, "trained": True},
        }
        return SimpleNamespace(
            root=name,
            rates={question: sum(group) / len(group) for question, group in rights.items()},
            figures=lambda *at: figures[at],
            manifest=lambda stage, round: {} if round < 3 else None,
        )

    one, two = run("one", {"a": [1, 0], "b": [0, 0]}), run("two", {"a": [1, 1], "b": [1, 0]})
    found = choose.measure(argparse.Namespace(runs=[one, two], round=1))["runs"]
    assert found["one"]["pass@1"][0] == 0.25 and found["two"]["pass@1"][0] == 0.75
    assert found["one"]["less_first"] == (0.0, 0.0, 0.0) and found["two"]["less_first"][0] == 0.5
    assert found["two"]["serve"][0]["budget"] == 4 and found["two"]["prm"] == {"auc_within_question": 0.7}
    with pytest.raises(UserError, match="three: other calibration questions than one"):
        choose.measure(argparse.Namespace(runs=[one, run("three", {"a": [1]})], round=1))
    with pytest.raises(UserError, match="one: the gate of round 2 judged no new policy"):
        choose.measure(argparse.Namespace(runs=[one], round=2))
    with pytest.raises(UserError, match="one: the gate of round 3 is not finished"):
        choose.measure(argparse.Namespace(runs=[one], round=3))


def test_samples_are_spent_where_the_vote_or_the_verifier_is_not_sure():
    """Easy questions: always right, scored high. Hard ones: right in every third sample, and scored high only then."""
    import random

    from eval.draws import Drawn
    from eval.studies import allocate

    def pool(question: str, hard: bool) -> list[Drawn]:
        right = [not hard or i % 3 == 2 for i in range(24)]
        return [Drawn(question, "7" if r else str(i), 0.9 if r else 0.1, r, 5, 5, 0, "") for i, r in enumerate(right)]

    pools = {f"{kind}{i}": pool(f"{kind}{i}", kind == "hard") for i in range(8) for kind in ("easy", "hard")}
    counts = allocate.eliminate(pools, 3, 0.5)
    assert {q: n for q, n in counts.items() if q.startswith("easy")} == {f"easy{i}": 1 for i in range(8)}
    assert {n for q, n in counts.items() if q.startswith("hard")} == {3}
    assert sum(allocate.eliminate(pools, 3, 1.0).values()) == 3 * len(pools)  # nothing is ever done: all is spent
    assert allocate.eliminate(pools, 3, 1.0) == dict.fromkeys(pools, 3)
    few = allocate.adaptive(pools, 4, 0.9)
    assert max(few[q] for q in pools if q.startswith("easy")) < min(few[q] for q in pools if q.startswith("hard"))
    found = allocate.compare(pools, 2, 4, random.Random(0))
    assert found["best_of_n"]["samples"].tolist() == [2.0] * 16
    assert found["elimination"]["samples"].sum() <= 2 * 16 + 1e-9
    assert found["elimination"]["right"].mean() > found["best_of_n"]["right"].mean() + 0.03


def test_gains_by_level_are_of_the_level_s_own_questions(tmp_path):
    """Two runs; greedy answers are left out where a run has none."""
    from eval.studies import levels
    from flywheel.records import Grade, Problem, Question, Split, Verdict

    ids = [f"q{i}" for i in range(4)]

    class Played(Run):
        def problems(self, *splits):
            return [Problem(Question(q, "text", ("easy", "hard")[i % 2]), "a", Split.TEST) for i, q in enumerate(ids)]

    def run(name, right):
        for round, rates in enumerate(right):
            verdicts = {
                (q, k): Verdict.CORRECT if k < 2 * rate else Verdict.INCORRECT
                for q, rate in zip(ids, rates)
                for k in (0, 1)
            }
            store(
                tmp_path / name,
                round,
                "evaluate",
                ids,
                [Grade(f"{q}/{k}", q, v, "evaluate") for (q, k), v in verdicts.items()],
            )
        return Played(tmp_path / name, load("recipes/chain.yaml"))

    runs = [run("a", [[0.5, 0, 0.5, 0], [1, 0, 1, 0]]), run("b", [[0.5, 0, 0.5, 0], [1, 1, 1, 0]])]
    found = {row["level"]: row for row in levels.measure(argparse.Namespace(runs=runs))["levels"]}
    assert [row[0] for row in found["easy"]["pass@1"]] == [0.5, 1.0] and found["easy"]["questions"] == 2
    assert found["hard"]["pass@1_gain"][0][0] == pytest.approx(0.25) and "greedy@1" not in found["hard"]


def test_seeds_of_one_recipe_are_compared_as_one(monkeypatch):
    """Two seeds of the loop and two of another: the loop's second round costs more than the other's only one."""
    rates = {("a", 1): 0.5, ("b", 1): 0.7, ("a", 2): 0.9, ("b", 2): 0.9, ("c", 1): 0.4, ("d", 1): 0.4}

    def run(name: str, rounds: int):
        rows = [{"round": r, "stage": stage, "flops": 10.0} for r in range(1, rounds) for stage in ("sample", "search")]
        figures = {"policy": {"pass@4": 0.9, "pass@4_ci": [0, 1], "name": "policy_1"}}
        return SimpleNamespace(
            root=name, rounds=range(rounds), ledger_rows=rows, figures=lambda stage, r: figures, name=name
        )

    monkeypatch.setattr(
        compare,
        "test_rates",
        lambda run, r, purpose="evaluate": {q: rates.get((run.name, r), 0.1) for q in ("q1", "q2")},
    )
    runs = [run("a", 3), run("b", 3), run("c", 2), run("d", 2)]
    found = compare.measure(argparse.Namespace(runs=runs, seeds=2, without=[]))
    assert [row["pass@1"][0] for row in found["runs"]["a b"]] == pytest.approx([0.1, 0.6, 0.9])
    assert found["runs"]["c d"][1]["flops"] == 10.0 and found["runs"]["c d"][1]["pass@4"] == 0.9
    [ahead] = found["first_less_others"].values()
    assert ahead["last_rounds"]["rounds"] == [2, 1] and ahead["last_rounds"]["pass@1"][0] == pytest.approx(0.5)
    [within] = ahead["within_the_other_s_flops"]
    assert within["rounds"] == [1, 1] and within["pass@1_each_run"] == pytest.approx([0.1, 0.3])
    assert within["pass@1"] == pytest.approx([0.2, 0.1, 0.3])  # the questions are alike, but the seeds are not
    equal = ahead["at_equal_flops"]
    assert equal["rounds"] == [1, 1] and equal["flops"] == [10, 10] and equal["pass@1"] == within["pass@1"]
    between = compare.at(compare.course(runs[:2]), 17.5)
    assert between.round == 1.75 and between.singles == pytest.approx(np.array([[0.8, 0.8], [0.85, 0.85]]))
    with pytest.raises(UserError, match="two groups of --seeds 3"):
        compare.measure(argparse.Namespace(runs=runs, seeds=3, without=[]))


def test_a_harvest_plan_is_compared_with_samples_for_no_more_tokens(monkeypatch):
    """Two draws of one text cover a question. 8 tokens buy one sample a question, or two of each that lacks them."""

    def draws(name: str, rights: str) -> list:
        return [
            (Solution(f"{name}{i}", name[0], (Step("7", (7,)),), Finish.STOP, "7", "x", "m", f"{name}{i}"), r == "+")
            for i, r in enumerate(rights)
        ]

    made = {
        ("loop", "sample"): {"a": draws("a", "++"), "b": draws("b", "+-"), "c": draws("c", "--")},
        ("loop", "harvest"): {"b": draws("bh", "-"), "c": draws("ch", "++")},
        ("restem", "harvest"): {"a": draws("au", "++++"), "b": draws("bu", "--++"), "c": draws("cu", "----")},
    }
    made["restem", "sample"] = made["loop", "sample"]
    spec = SimpleNamespace(vote="trace", min_votes=2)
    runs = [
        SimpleNamespace(
            root=name, name=name, recipe=SimpleNamespace(harvest=spec), manifest=lambda *_, t=t: {"tokens": t}
        )
        for name, t in (("loop", 8), ("restem", 24))
    ]
    monkeypatch.setattr(coverage, "ids", lambda run, split: ["a", "b", "c"])
    monkeypatch.setattr(coverage, "drawn", lambda run, stage: made[run.name, stage])
    ways, spent = coverage.one_run(*runs)
    assert spent == {"plan_tokens": 8, "uniform_each": 1, "until_at_most": 2, "all_tokens": 24}
    assert ways == {"samples": [1, 0, 0], "plan": [1, 0, 1], "uniform": [1, 0, 0], "until": [1, 0, 0], "all": [1, 1, 0]}
    made["restem", "sample"] = {}
    with pytest.raises(UserError, match="restem: its first samples are not those of loop"):
        coverage.one_run(*runs)


def test_temperatures_are_held_against_the_recipe_s_own(monkeypatch):
    """The share covered grows with the temperature, and with the round at the highest alone."""
    import numpy as np

    from eval.studies import temperature

    def drawn(run, model, samples, temperatures):
        out = np.zeros((len(temperatures), 4, 3))
        for i, t in enumerate(temperatures):
            out[i, : int(2 * t) + (model if t > 1 else 0), 1] = 1.0
        return out

    monkeypatch.setattr(temperature, "drawn", drawn)
    recipe = SimpleNamespace(sample=SimpleNamespace(temperature=1.0))
    runs = [SimpleNamespace(recipe=recipe, rounds=[1], model=lambda role, r: r, root=name) for name in "ab"]
    found = temperature.measure(argparse.Namespace(runs=runs, samples=8, temperatures=[0.5, 1.5]))["rows"]
    rows = {(row["round"], row["temperature"]): row for row in found}
    assert rows.keys() == {(r, t) for r in (0, 1) for t in (0.5, 1.0, 1.5)}
    assert [rows[0, t]["covered"][0] for t in (0.5, 1.0, 1.5)] == [0.25, 0.5, 0.75]
    assert rows[0, 1.0]["less_usual"] == (0.0, 0.0, 0.0)
    assert rows[1, 1.5]["less_usual"][0] == 0.5 and rows[1, 0.5]["each_run"].tolist() == [0.25, 0.25]
