"""A change of recipe keeps what it does not touch: --fork, as a person uses it."""

from __future__ import annotations

import os
import shutil

import pytest
from toy import Project, finish


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Project:
    return finish(tmp_path_factory)


def lines(output: str) -> dict[str, str]:
    """stage -> what was said of it."""
    forked = [line.strip().partition(": ") for line in output.splitlines() if line.startswith("  round_")]
    return {stage: said for stage, _, said in forked}


def test_a_fork_takes_over_what_the_change_does_not_touch_and_makes_the_rest(finished):
    before = len(finished.logged("sample:"))
    dry = finished.run("--fork", "toy", "--name", "longer", "--round", "2", "--set", "distill.epochs=9", "--dry-run")
    assert dry.returncode == 0 and not (finished.runs / "longer").exists()
    done = finished.run("--fork", "toy", "--name", "longer", "--round", "2", "--set", "distill.epochs=9")
    assert done.returncode == 0, done.stderr
    said = lines(done.stdout)
    assert lines(dry.stdout) == said
    assert [s for s in said if said[s] == "taken over"] == ["round_0/evaluate", "round_1/sample", "round_1/label"]
    assert said["round_1/distill"] == "made anew (distill.epochs was 3.0, is 9.0)"
    assert said["round_1/gate"].startswith("made anew (")
    assert said["round_2/sample"] == "made anew (it reads round_1/gate, which is made anew)"
    old, new = finished.run_dir, finished.runs / "longer"
    shard = "round_1/sample/shards/00000/Solution.parquet"
    assert os.stat(old / shard).st_ino == os.stat(new / shard).st_ino  # linked, not copied
    assert len(finished.logged("sample:")) == before + 10  # round 2's alone
    again = finished.run("--fork", "toy", "--name", "longer", "--round", "2", "--set", "distill.epochs=9")
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert set(lines(again.stdout).values()) == {"already here"}


def test_a_fork_of_damaged_work_is_refused(finished):
    table = finished.stage(1, "label") / "shards" / "00000" / "Trial.parquet"
    kept = table.read_bytes()
    try:
        table.write_bytes(kept[:-1] + b"x")
        done = finished.run("--fork", "toy", "--name", "damaged", "--round", "1")
        assert done.returncode == 1 and "label/shards/00000/Trial.parquet" in done.stderr
        assert not (finished.runs / "damaged" / "round_1" / "label").exists()
    finally:
        table.write_bytes(kept)


def test_a_fork_wants_a_run_and_a_name(finished):
    assert "--name" in finished.run("--fork", "toy").stderr
    assert "no run of that name" in finished.run("--fork", "nowhere", "--name", "x").stderr


def test_a_fork_into_a_run_of_another_recipe_is_refused_before_anything_is_taken_over(finished):
    assert finished.run("--name", "other", "--round", "0").returncode == 0
    done = finished.run("--fork", "toy", "--name", "other", "--round", "1", "--set", "distill.epochs=9")
    assert done.returncode == 1 and "distill.epochs" in done.stderr
    assert not (finished.runs / "other" / "round_1").exists()


def test_a_dry_fork_of_a_half_made_one_says_what_is_left(finished):
    assert finished.run("--fork", "toy", "--name", "half", "--round", "0").returncode == 0
    for left in ("round_1/distill", "round_1/gate", "round_1/evaluate", "round_2"):  # as a kill leaves it
        shutil.rmtree(finished.runs / "half" / left)
    dry = finished.run("--fork", "toy", "--name", "half", "--round", "2", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    said = lines(dry.stdout)
    assert said["round_1/label"] == "already here" and said["round_1/distill"] == said["round_2/gate"] == "taken over"


def test_a_run_of_another_version_is_named(finished):
    path = finished.stage(2, "gate") / "manifest.json"
    kept = path.read_text()
    try:
        path.write_text(kept.replace('"format": 2', '"format": 1'))
        done = finished.run("--round", "2")
        assert done.returncode == 1 and "of format 1, made by another version" in done.stderr
    finally:
        path.write_text(kept)
