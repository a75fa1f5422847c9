"""A real round in micro size in which one engine serves the base with its adapters, as on a GPU."""

from __future__ import annotations

import pytest

from flywheel.ledger import total
from flywheel.runs.files import read_rows
from flywheel.stages import ORDER
from tests.stages.test_round import iterate, manifest


@pytest.mark.slow
def test_a_round_runs_with_adapters_served_at_run_time(tmp_path):
    done = iterate(tmp_path, "--set", "engine.adapters=runtime")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "micro"
    assert all(manifest(run, 1, stage)["figures"] for stage in ORDER)
    search = manifest(run, 1, "search")["figures"]["search"]
    assert all(0 <= search[method] <= 1 for method in ("majority@8", "best_of_n_weighted@8", "beam@4"))
    rows = [row for path in (run / "round_1/search").rglob("ledger*.parquet") for row in read_rows(path)]
    spent = {role: sums for (role,), sums in total(rows, "role")}
    assert spent["prm"].scored > spent["prm"].generated > 0  # one token a step: a merged PRM would make none
