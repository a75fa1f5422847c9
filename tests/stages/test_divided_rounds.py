"""A real round in micro size on two CPU ranks that share out the base: DeepSpeed ZeRO-3, or an engine over both."""

from __future__ import annotations

import pytest

from flywheel.stages import ORDER
from tests.stages.test_round import ROOT, iterate, manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    "config, sets",
    [("zero3_cpu_2", ()), ("cpu_2", ("--set", "engine.tensor_parallel=2", "--set", "engine.adapters=runtime"))],
)
def test_two_ranks_run_a_round(tmp_path, config, sets):
    path = str(ROOT / "accelerate_configs" / f"{config}.yaml")
    done = iterate(tmp_path, *sets, launcher=("-m", "accelerate.commands.launch", "--config_file", path, "-m"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "micro"
    assert all(manifest(run, 1, stage)["figures"] for stage in ORDER)
    prm = manifest(run, 1, "train_prm")["figures"]
    assert prm["auc_questions"] > 0 and prm["calibration"] and prm["calibration_base"]  # judged by both ranks
    assert manifest(run, 1, "distill")["figures"]["trained"]
