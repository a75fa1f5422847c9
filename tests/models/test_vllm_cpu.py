"""The workarounds for vLLM on a CPU: the kernels compute the same, and another version of vLLM goes without."""

from __future__ import annotations

import gc
import logging
import os
from types import SimpleNamespace

import pytest
import torch

from flywheel.models import vllm, vllm_cpu
from flywheel.recipe import EngineSpec

pytestmark = pytest.mark.skipif(not vllm.current_platform.is_cpu(), reason="for a CPU")


def test_the_kernels_compute_what_vllm_s_own_code_does():
    from vllm import ir

    assert set(vllm_cpu.rms_norm_kernels()) == {"rms_norm", "fused_add_rms_norm"}
    x, residual, weight = torch.randn(5, 64), torch.randn(5, 64), torch.randn(64)
    ours, native = (ir.ops.rms_norm.impls[name].impl_fn(x, weight, 1e-6) for name in ("cpu", "native"))
    assert torch.allclose(ours, native, atol=1e-5)
    ours, native = (
        ir.ops.fused_add_rms_norm.impls[name].impl_fn(x.clone(), residual.clone(), weight, 1e-6)
        for name in ("cpu", "native")
    )
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(ours, native, strict=True))


def test_what_an_engine_s_start_says_is_shown_only_if_it_fails(capfd):
    with vllm_cpu.hold_back_stderr():
        os.write(2, b"a note of native code\n")
    assert capfd.readouterr().err == ""
    with pytest.raises(KeyError), vllm_cpu.hold_back_stderr():
        os.write(2, b"a note of native code\n")
        raise KeyError
    assert capfd.readouterr().err == "a note of native code\n"


@pytest.mark.parametrize(
    "dtype, native, warned", [("bfloat16", False, True), ("bfloat16", True, False), ("float16", True, True),
                              ("float32", False, False), ("auto", False, False)],
)  # fmt: skip
def test_a_dtype_that_the_cpu_emulates_is_warned_of(dtype, native, warned, monkeypatch):
    monkeypatch.setattr(vllm_cpu, "has_bfloat16", lambda: native)
    line = vllm_cpu.emulated(EngineSpec(dtype=dtype))
    assert (line is not None) == warned and (not warned or f"emulates {dtype}" in line)


@pytest.fixture
def another_version(monkeypatch):
    import vllm as library

    monkeypatch.setattr(library, "__version__", "0.99.0+cpu")
    vllm_cpu.version_is_known.cache_clear()
    yield
    vllm_cpu.version_is_known.cache_clear()


def test_garbage_is_not_collected_while_an_engine_closes():
    collect = gc.collect
    with vllm_cpu.skip_garbage_collection():
        assert gc.collect is not collect
    assert gc.collect is collect


def test_another_version_of_vllm_goes_without_and_says_so_once(another_version, caplog, capfd):
    collect = gc.collect
    with caplog.at_level(logging.WARNING, vllm_cpu.__name__):
        assert vllm_cpu.rms_norm_kernels.__wrapped__() == {}
        with vllm_cpu.hold_back_stderr():
            os.write(2, b"a note of native code\n")
        with vllm_cpu.skip_garbage_collection():
            assert gc.collect is collect
    [record] = caplog.records
    assert "0.99.0+cpu is not 0.32.0" in record.getMessage()
    assert "a note of native code" in capfd.readouterr().err


def test_all_engines_of_a_gpu_share_its_memory(monkeypatch):
    monkeypatch.setattr(vllm, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    for workers, engines, share in ((0, 1, 0.8), (1, 2, 0.4), (2, 2, 0.2)):
        spec = EngineSpec(gpu_memory=0.8, workers=workers)
        assert vllm.engine_arguments(spec, "base", engines=engines)["gpu_memory_utilization"] == pytest.approx(share)
