"""A real round in micro size on two CPU ranks: under DeepSpeed ZeRO-3, with an engine over both, short of memory."""

from __future__ import annotations

import pytest

from flywheel.stages import ORDER
from tests.stages.test_round import ROOT, iterate, manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def launched(config: str) -> tuple[str, ...]:
    path = str(ROOT / "accelerate_configs" / f"{config}.yaml")
    return ("-m", "accelerate.commands.launch", "--config_file", path, "-m")


@pytest.mark.parametrize(
    "config, sets",
    [("zero3_cpu_2", ()), ("cpu_2", ("--set", "engine.tensor_parallel=2", "--set", "engine.adapters=runtime"))],
)
def test_two_ranks_run_a_round(tmp_path, config, sets):
    done = iterate(tmp_path, *sets, launcher=launched(config))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "micro"
    assert all(manifest(run, 1, stage)["figures"] for stage in ORDER)
    prm = manifest(run, 1, "train_prm")["figures"]
    assert prm["auc_questions"] > 0 and prm["calibration"] and prm["calibration_base"]  # judged by both ranks
    assert manifest(run, 1, "distill")["figures"]["trained"]


def test_a_training_that_runs_out_of_memory_on_one_rank_goes_on_with_half_the_micro_batch(tmp_path):
    done = iterate(tmp_path, launcher=launched("cpu_2"), module="tests.small_rank")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    assert "reviser: out of memory at a micro batch of 4; going on with 2, the batch stays 8" in said
    assert manifest(tmp_path / "micro", 1, "train_reviser")["figures"]["trained"]
