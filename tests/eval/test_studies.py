"""Every study answers --help; what the kept results name exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from eval.__main__ import main, questions

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
    assert len(questions()) == 14


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
