"""Workarounds that vLLM needs on a CPU to be correct and fast, each with its reason and measured gain.

Measured with vLLM 0.32.0 and two cores with AVX-512 unless said otherwise. With another version the
workarounds that only save time (or output) are skipped with one log line; those that affect results
stay. vLLM is imported only inside functions.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from flywheel.recipe import EngineSpec
from flywheel.runs.isolate import threads_for

VERSION = "0.32.0"  # the vLLM version with which the workarounds were measured
BLOCK_SIZE = 32  # tokens per KV block: short prompts hit the prefix cache, and 18% faster than vLLM's 128

log = logging.getLogger(__name__)


@functools.cache
def version_is_known() -> bool:
    """Whether the installed vLLM is `VERSION`."""
    import vllm

    known = vllm.__version__.partition("+")[0] == VERSION
    if not known:
        log.warning(
            "vLLM %s is not %s: its CPU engines run without flywheel's optimisations", vllm.__version__, VERSION
        )
    return known


def prepare_process(spec: EngineSpec) -> None:
    """Call before the first engine starts: vLLM does not allow changing the number of threads afterwards.

    More threads than free cores are costly: beside other work on two cores, an engine with two threads drew 32 samples
    per CPU-second and one with one thread 170, because tiny operations wait for each other.
    """
    threads = threads_for(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), spec.threads)
    if spec.tensor_parallel > 1:  # for its workers' processes: by default vLLM wants a NUMA node for each
        os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS=str(threads))
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as below, but for them
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if version_is_known():
        # Otherwise vLLM's sampler compiles a small function at its first use: 0.7 s, and it needs a C++ compiler.
        torch.compiler.set_stance("force_eager")
    leave_transformers_classes()


def leave_transformers_classes() -> None:
    """Keep vLLM from changing transformers' own classes, which this process builds again to merge the next adapter.

    It does so for the architectures that it runs by transformers' code (GPT-NeoX, Phi-2), to have them compiled, which
    engines on a CPU are not (`enforce_eager`). A changed class can be built only while an engine starts.
    """
    from vllm.model_executor.models.transformers.base import Base

    Base._decorate_for_torch_compile = lambda self: None


def dtype(spec: EngineSpec) -> str:
    """`engine.dtype`; auto is bfloat16 on a CPU with bfloat16 instructions, else float32.

    A model of 0.8M parameters on a CPU with AMX: 12,000 sampled tokens per CPU-second in bfloat16, 8,400 in
    float32; PRM values differ by at most 0.005. Without such instructions float32 is 3 times as fast.
    """
    if spec.dtype != "auto":
        return spec.dtype
    return "bfloat16" if has_bfloat16() else "float32"


def has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions."""
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def emulated(spec: EngineSpec) -> str | None:
    """A warning if this CPU computes in `engine.dtype` only by emulation; vLLM has no native float16 on any CPU."""
    if spec.dtype == "float16" or (spec.dtype == "bfloat16" and not has_bfloat16()):
        return f"engine.dtype: this CPU emulates {spec.dtype}, several times slower than float32, which auto would take"
    return None


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """The arguments of `EngineArgs` that are specific to a CPU."""
    return {
        "dtype": dtype(spec),
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": spec.kv_cache_mb << 20,
        # its kernels are registered in this process, and several devices have their models in others
        "ir_op_priority": rms_norm_kernels() if spec.tensor_parallel == 1 else {},
        "enforce_eager": True,  # compiling takes 35 s at the start and makes the model slower
    }


def lora_slots(adapters: int) -> int:
    """`max_loras` for an engine with `adapters` adapters: one more, whose slot stays all zeros.

    In a batch that mixes requests with and without an adapter, vLLM's CPU kernels look up those without
    at index -1, so they would get the last slot's adapter (GPU kernels skip such requests).
    """
    return adapters + 1


@functools.cache
def rms_norm_kernels() -> dict[str, list[str]]:
    """Register vLLM's C++ kernels for RMS norms, and return the `ir_op_priority` that prefers them.

    vLLM uses them only in compiled models. For 256 tokens of 128 dimensions they take 35 instead of 226
    microseconds, which saves a fifth of a small model's time.
    """
    from vllm import ir
    from vllm.platforms import current_platform

    if not version_is_known():
        return {}
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "fused_add_rms_norm"):
        return {}

    def fits(*tensors: torch.Tensor | None, variance_size: int | None) -> bool:
        return variance_size is None and all(
            t is not None and t.dtype == tensors[0].dtype and t.is_contiguous() for t in tensors
        )

    def norm_fits(x, weight, epsilon, variance_size=None) -> bool:
        return fits(x, weight, variance_size=variance_size)

    def add_norm_fits(x, x_residual, weight, epsilon, variance_size=None) -> bool:
        return fits(x, x_residual, weight, variance_size=variance_size)

    @ir.ops.rms_norm.register_impl("cpu", supports_args=norm_fits)
    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> torch.Tensor:
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, weight, epsilon)
        return out

    @ir.ops.fused_add_rms_norm.register_impl("cpu", supports_args=add_norm_fits, inplace=True)
    def fused_add_rms_norm(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual

    return {name: ["cpu", "native"] for name in ("rms_norm", "fused_add_rms_norm")}


@contextmanager
def hold_back_stderr() -> Iterator[None]:
    """Drop native code's messages on stderr (NUMA nodes) while an engine starts; show them if the start fails."""
    if not version_is_known():
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)


@contextmanager
def skip_garbage_collection() -> Iterator[None]:
    """Skip garbage collection while an engine closes: vLLM runs it twice, to free device memory only.

    A stage's three engines close in 0.13 s instead of 2.9 s.
    """
    if not version_is_known():
        yield
        return
    with mock.patch("gc.collect", return_value=0):
        yield


def draw_by_seed(llm: Any, seeds: Mapping[str, int]) -> None:
    """Have an engine draw each token by its sequence's seed (by request) and position, whatever else is in the batch.

    vLLM's own seeds end a CPU engine when a prompt is split (a CPU's generator has no offset), and its generators cost
    5% of the time with 256 sequences. Its kernel takes a seed a row; these are made of all rows at once.
    """
    if not version_is_known():
        return
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    runner = llm.engine_core.engine_core.model_executor.driver_worker.worker.model_runner

    def forward(logits: torch.Tensor, generators: dict, k: torch.Tensor | None, p: torch.Tensor | None):
        ids, batch = runner.input_batch.req_ids, runner.input_batch
        # vLLM appends a random word to an id; sequences that are not sampled have no seed
        own = np.fromiter((seeds.get(id.rpartition("-")[0], 0) for id in ids), np.uint64, len(ids))
        mixed = own ^ (batch.num_tokens_no_spec[: len(ids)].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        rows = torch.from_numpy((mixed >> np.uint64(33)).astype(np.int64))
        return torch.ops._C.fused_gumbel_argmax(apply_top_k_top_p(logits, k, p).to(torch.float32), rows), None

    runner.sampler.topk_topp_sampler.forward = forward


class RunSeed:
    """Seeds each `Backend.run` by the requests made before its first step, not by what the process did before.

    For engines that take no seed of a sequence: vLLM samples from the process's global random state, and with seeds
    its older runner on a GPU leaves the fused sampler.

    engines: number of engines that the backend opened, part of the seed. elsewhere: what seeds the
    processes in which an engine's workers sample, all alike.
    """

    def __init__(self, engines: int):
        self._engines = engines
        self._asked: Any = None  # a running hash of the prompts, until the first step
        self._runs: Counter[bytes] = Counter()  # by that hash
        self.elsewhere: list[Callable[[int], object]] = []

    def start_run(self, seed: int) -> None:
        """seed: of the stage."""
        self._asked = hashlib.sha256(str(seed).encode())

    def add(self, prompt: Sequence[int]) -> None:
        """Add a request to the hash; no effect after the run's first step."""
        if self._asked is not None:
            self._asked.update(repr(tuple(prompt)).encode())

    def apply(self) -> None:
        """Seed the process. Call before every step; only the first call in a run has an effect."""
        if self._asked is None:
            return
        from vllm.utils.torch_utils import set_random_seed

        asked, self._asked = self._asked.digest(), None
        digest = hashlib.sha256(asked + str(self._runs[asked]).encode()).digest()
        self._runs[asked] += 1
        seed = (int.from_bytes(digest[:4], "big") + self._engines - 1) % 2**31
        set_random_seed(seed)
        for tell in self.elsewhere:
            tell(seed)


def seed_worker(worker: object, seed: int) -> None:
    """Seed the process of one of vLLM's workers; `LLMEngine.collective_rpc` calls it there."""
    from vllm.utils.torch_utils import set_random_seed

    set_random_seed(seed)
