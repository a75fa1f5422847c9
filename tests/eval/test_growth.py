"""The growth benchmark's synthetic round is one that the stages read."""

from __future__ import annotations

from eval.bench.growth import MEASURED, measure, write_run


def test_every_stage_reads_the_synthetic_round(tmp_path):
    write_run(tmp_path / "run", 40, 4, 24)
    for stage in MEASURED:
        assert measure(tmp_path / "run", stage)["peak"] > 0
