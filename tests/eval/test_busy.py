"""The devices of a stage are full, on simulated clocks."""

from __future__ import annotations

import pytest

from eval.bench.busy import busy


@pytest.mark.parametrize(
    "kind, devices", [("sample", 8), ("search", 8), pytest.param("sample", 64, marks=pytest.mark.slow)]
)
def test_a_stream_keeps_its_devices_full_where_chunks_let_them_run_dry(kind, devices):
    size = {"slots": 4, "samples": 4, "questions": 160}
    stream = busy(devices, 2, kind, True, **size)
    chunks = busy(devices, 2, kind, False, **size)
    assert stream["flow"] >= 0.99 and stream["stage"] >= 0.95 and max(chunks.values()) < 0.8
