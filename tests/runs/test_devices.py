"""Engines over several devices: which ranks open one, what they see, and launches that do not fit."""

from __future__ import annotations

import pytest
from toy import Project

from flywheel.errors import UserError
from flywheel.recipe import load
from flywheel.runs.processes import TINY, check_devices, environment, training_threads, workers
from flywheel.runs.ranks import Ranks, free_port

PAIRS = ("--set", "engine={kind: 'toy_stages:none', chunk: 2, tensor_parallel: 2}")


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path / "project")


@pytest.mark.slow
def test_every_second_rank_samples_and_all_ranks_train(project):
    group = {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        project.start("--round", "1", *PAIRS, RANK=r, LOCAL_RANK=r, TOY_RANK=r, TOY_SLEEP=0.3, **group)
        for r in range(4)
    ]
    told = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, told
    assert {rank for _, rank, _ in project.logged("sample:1")} == {"0", "2"}
    assert {rank for _, rank, _ in project.logged("distill:1")} == {"0", "1", "2", "3"}


def test_an_engine_sees_the_devices_of_its_rank_and_the_next(monkeypatch):
    ranks = Ranks(rank=2, world=4, local_rank=2, local_world=4, distributed=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert environment(ranks, False, 0, 2)["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert "CUDA_VISIBLE_DEVICES" not in environment(ranks, True, 1234, 2)  # a training has its own way to share
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert environment(ranks, False, 0, 2)["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment(Ranks(), False, 0, 4)["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"  # solve and serve: no launcher
    assert environment(Ranks(), True, 0)["CUDA_VISIBLE_DEVICES"] == "0"  # or transformers would train on all
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden
    assert "CUDA_VISIBLE_DEVICES" not in environment(Ranks(), False, 0)


def test_a_launch_whose_ranks_do_not_fit_is_one_line_before_the_run(project):
    done = project.run("--round", "1", *PAIRS)
    assert done.returncode == 1 and not project.run_dir.exists()
    assert done.stderr.startswith("flywheel: engine.tensor_parallel: 2 devices an engine, but this launch has 1 proc")
    recipe = load(project.root / "toy.yaml", [PAIRS[1]])
    check_devices(Ranks(0, 4, 0, 2), recipe)
    with pytest.raises(UserError, match="3 processes on this host, 6 in all; set num_processes to a multiple of 2"):
        check_devices(Ranks(0, 6, 0, 3), recipe)


def test_devices_hold_one_engine_together(project):
    assert workers(load(project.root / "toy.yaml", [PAIRS[1]]), 8) == 1
    with pytest.raises(UserError, match=r"engine\.workers: 1 with engine\.tensor_parallel"):
        load(project.root / "toy.yaml", ["engine.workers=2", "engine.tensor_parallel=2"])


def test_a_rank_that_runs_out_of_memory_has_the_training_started_again_on_all(project):
    """Without a person; rank 0 hangs in the first attempt, as in a collective that rank 1 left."""
    group = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        project.start("--round", "1", RANK=r, LOCAL_RANK=r, TOY_RANK=r, TOY_FAULT="distill:4:again", **group)
        for r in range(2)
    ]
    (said, _), _ = told = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    assert said.count("round_1/distill: toy: out of memory") == 1
    assert sorted(rank for _, rank, _ in project.logged("distill:1")) == ["0", "0", "1", "1"]


def test_a_tiny_model_trains_on_one_thread_unless_the_recipe_says_more(project, monkeypatch):
    monkeypatch.setenv("FLYWHEEL_THREADS", "3")
    recipe = load(project.root / "toy.yaml", [])
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": str(project.root / "base")})})
    assert training_threads(Ranks(), recipe) == 1
    more = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"threads": 3})})
    assert training_threads(Ranks(), more) == 3
    with open(project.root / "base/model.safetensors", "ab") as weights:
        weights.truncate(TINY)
    assert training_threads(Ranks(), recipe) == 3
