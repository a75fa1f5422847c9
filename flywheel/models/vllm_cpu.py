"""What vLLM needs on a CPU to be right and fast: each workaround with its reason and its measured gain.

Measured with vLLM 0.32.0 and two cores with AVX-512 unless said otherwise. With another version
what only saves time (or noise) is skipped, and the log says so once; what results rest on stays.
Nothing here imports vLLM before a function is called.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from flywheel.recipe import EngineSpec

VERSION = "0.32.0"  # of vLLM, that the workarounds were measured with
BLOCK_SIZE = 32  # tokens to a KV block: short prompts hit the prefix cache, and 18% faster than vLLM's 128

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


def prepare_process() -> None:
    """To be called before the first engine starts: vLLM forbids another number of threads afterwards."""
    if torch.get_num_threads() != usable_threads():
        torch.set_num_threads(usable_threads())
    if version_is_known():
        # vLLM's sampler compiles one small function at its first use: 0.7 s, and a C++ compiler is wanted.
        torch.compiler.set_stance("force_eager")


def usable_threads() -> int:
    """This process's share of the cores that it may run on: all of them over the ranks on this machine.

    More threads than cores are costly: beside other work, an engine of two threads on two cores drew
    32 samples a CPU-second and an engine of one thread 170, because tiny operations wait for each other.
    """
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def dtype(spec: EngineSpec) -> str:
    """`engine.dtype`; auto is bfloat16 on a CPU that computes in it, else float32.

    A model of 0.8M parameters, on a CPU with AMX: 12,000 sampled tokens a CPU-second in bfloat16, 8,400 in
    float32; values differ by 0.005 at most. On a CPU without such instructions float32 is 3 times as fast.
    """
    if spec.dtype != "auto":
        return spec.dtype
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.exists() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """The arguments of `EngineArgs` that differ from a GPU's."""
    return {
        "dtype": dtype(spec),
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": spec.kv_cache_mb << 20,
        "ir_op_priority": rms_norm_kernels(),
        "enforce_eager": True,  # compiling takes 35 s at the start, and the model is then slower
    }


def lora_slots(adapters: int) -> int:
    """`max_loras` for an engine of so many adapters: one more, which stays all zeros.

    In a batch that also holds requests with an adapter, vLLM's CPU kernels look up a request without
    one at index -1, so it would get the last slot's adapter (GPU kernels skip such requests).
    """
    return adapters + 1


@functools.cache
def rms_norm_kernels() -> dict[str, list[str]]:
    """Register vLLM's C++ kernels for RMS norms, and return the `ir_op_priority` that prefers them.

    vLLM builds them and uses them only where it compiles models. 35 against 226 microseconds for 256 tokens
    of 128 dimensions, which is a fifth of a small model's time.
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
    """While an engine starts: drop the native code's notes on stderr (NUMA nodes), but show them if the start fails."""
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
    """While an engine closes: vLLM collects all garbage twice, in vain where no device memory waits for it.

    2.9 s for a stage's three engines, 0.13 s without.
    """
    if not version_is_known():
        yield
        return
    with mock.patch("gc.collect", return_value=0):
        yield


class RunSeed:
    """Seeds each run of a backend by what the run asks for before its first step, not by what the process did before.

    So a chunk that is computed again after a kill, or by another rank, draws what it would have drawn;
    the same chunk once more in the same process draws anew. vLLM draws from the process's own random
    numbers; a seed for each request would do too, at 5% more CPU time (256 sequences at once), and on
    a GPU it keeps vLLM from its fused sampler. Used on a GPU as well, with every version.

    seed: of the stage; engines: how many the backend opened, which enters the seed.
    """

    def __init__(self, seed: int, engines: int):
        self._seed, self._engines = seed, engines
        self._asked: Any = None  # a running hash of the prompts, until the first step
        self._runs: Counter[bytes] = Counter()  # by that hash

    def start_run(self) -> None:
        self._asked = hashlib.sha256(str(self._seed).encode())

    def add(self, prompt: Sequence[int]) -> None:
        """Note a request; without effect after the run's first step."""
        if self._asked is not None:
            self._asked.update(repr(tuple(prompt)).encode())

    def apply(self) -> None:
        """Seed the process; to be called before every step, and only a run's first has an effect."""
        if self._asked is None:
            return
        from vllm.utils.torch_utils import set_random_seed

        asked, self._asked = self._asked.digest(), None
        digest = hashlib.sha256(asked + str(self._runs[asked]).encode()).digest()
        self._runs[asked] += 1
        set_random_seed((int.from_bytes(digest[:4], "big") + self._engines - 1) % 2**31)
