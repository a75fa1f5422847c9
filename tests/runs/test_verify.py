"""`python -m flywheel.verify`: what it finds, what it would redo, and that doing so mends the run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from toy import HERE, Project, finish

from flywheel.verify import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Project:
    return finish(tmp_path_factory)


@pytest.fixture
def copy(finished, tmp_path, monkeypatch) -> Project:
    shutil.copytree(finished.root, tmp_path / "copy")
    copied = object.__new__(Project)
    copied.root, copied.runs, copied.log = tmp_path / "copy", tmp_path / "copy" / "runs", tmp_path / "copy" / "log"
    recipe = copied.run_dir / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(finished.root), str(copied.root)))
    return copied


def verified(project: Project, capsys) -> tuple[int, str, list[str]]:
    code = main([str(project.run_dir)], stages="toy_stages:stages")
    out, err = capsys.readouterr()
    return code, out, err.partition("rm -r ")[2].split()


def test_a_whole_run_is_said_to_be_whole_and_is_not_touched(copy, capsys):
    before = {p: p.stat().st_mtime_ns for p in copy.run_dir.rglob("*")}
    code, out, redo = verified(copy, capsys)
    assert code == 0 and redo == [] and out.endswith("whole: nothing to redo\n")
    assert "round_1/sample" in out and "round_2/evaluate" in out
    assert before == {p: p.stat().st_mtime_ns for p in copy.run_dir.rglob("*")}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARMS = {
    "a flipped byte": (flip, "sha256"),
    "a cut file": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes"),
    "a lost file": (lambda path: path.unlink(), "missing"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_damage_in_a_finished_stage_names_the_file_and_all_that_was_made_from_it(copy, finished, capsys, harm):
    act, word = HARMS[harm]
    path = copy.shards(2, "sample")[1] / "Solution.parquet"
    act(path)
    code, out, redo = verified(copy, capsys)
    line = next(line for line in out.splitlines() if line.startswith("round_2/sample"))
    assert code == 1 and word in line and str(path) in line
    assert str(copy.stage(2, "sample")) in redo and str(copy.stage(2, "evaluate")) in redo
    assert not any("round_1" in item for item in redo)
    for item in redo:
        shutil.rmtree(item)
    assert copy.run("--round", "2").returncode == 0
    assert verified(copy, capsys)[0] == 0 and copy.tables() == finished.tables()


def test_damage_in_an_unfinished_stage_costs_its_chunk_alone(copy, finished, capsys):
    last = copy.stage(2, "evaluate")
    (last / "manifest.json").unlink()
    shutil.rmtree(copy.shards(2, "evaluate")[0])
    bad = copy.shards(2, "evaluate")[0]
    flip(next(bad.glob("*.parquet")))
    code, out, redo = verified(copy, capsys)
    assert code == 1 and redo == [str(bad)] and "round_2/evaluate" in out and "1 whole chunks of 3" in out
    refused = copy.run("--round", "2")
    assert refused.returncode == 1 and f"delete {bad} to make this chunk again" in refused.stderr
    shutil.rmtree(bad)
    assert copy.run("--round", "2").returncode == 0 and copy.tables() == finished.tables()


def test_shards_of_unknown_origin_are_not_continued(copy, capsys):
    for name in ("manifest.json", "fingerprint.json"):
        (copy.stage(2, "evaluate") / name).unlink()
    code, out, redo = verified(copy, capsys)
    assert (
        code == 1 and redo == [str(copy.stage(2, "evaluate"))] and "neither manifest.json nor fingerprint.json" in out
    )
    assert copy.run("--round", "2").returncode == 1


def test_a_manifest_of_another_recipe_is_found(copy, capsys):
    path = copy.stage(1, "label") / "manifest.json"
    data = json.loads(path.read_text())
    data["fingerprint"]["seed"] = 99
    path.write_text(json.dumps(data))
    code, out, redo = verified(copy, capsys)
    assert code == 1 and "was made with seed = 99" in out and str(copy.stage(1, "label")) in redo


def test_what_is_no_run_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "flywheel.verify", str(tmp_path)], cwd=HERE.parent, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith(f"flywheel: {tmp_path}: not a run") and done.stdout == ""
