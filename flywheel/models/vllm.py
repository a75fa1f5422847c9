"""vLLM in this process: no worker process, no server; the driver calls `LLMEngine.step()`.

On a CPU every model (base with its adapter merged in) has an engine of its own: runtime
LoRA is eight times slower there; and a model that only judges is served as a classifier of
every token, so that one pass reads all steps of a solution (less than half the time of a
request a step). On a GPU one engine serves a base with all its adapters.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read at import and at every engine's start
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings on a CPU are a page for each engine
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
# Set by torchrun: engines would take its store for theirs and wait for a host that never comes.
os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)

logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # it logs before it has set itself up

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    from vllm import EngineArgs, LLMEngine, PoolingParams, SamplingParams, ir
    from vllm.inputs.engine import tokens_input
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.torch_utils import set_random_seed

from flywheel.errors import EngineDied
from flywheel.ledger import Ledger
from flywheel.models.driver import Drawn, Driver, Reading, Served
from flywheel.models.engine import Backend, Sampling
from flywheel.models.weights import (
    adapter_config,
    check_length,
    load_judge,
    load_merged,
    load_tokenizer,
    parameters,
    usable_threads,
)
from flywheel.recipe import EngineSpec
from flywheel.records import Finish, ModelRef

CPU_BLOCK = 32  # tokens to a KV block: short prompts hit the prefix cache, and 18% faster than vLLM's 128
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as max_lora_rank


def open_backend(spec: EngineSpec, models: Mapping[str, ModelRef], ledger: Ledger, seed: int, scratch: Path) -> Backend:
    """See `flywheel.models.weights.open_backend`."""
    on_cpu = current_platform.is_cpu()
    if on_cpu and torch.get_num_threads() != usable_threads():
        torch.set_num_threads(usable_threads())  # vLLM forbids it once an engine has started
    if on_cpu:
        torch.compiler.set_stance(
            "force_eager"
        )  # one count in vLLM's sampler would be compiled: 0.7 s and a C++ compiler
    for base in {ref.base for ref in models.values()}:
        check_length(base, spec.max_model_len)
    merged = on_cpu if spec.adapters == "auto" else spec.adapters == "merged"
    one_of = lambda ref: (ref.base, ref.adapter, ref.labels) if merged else ref.base
    groups: dict[Any, list[ModelRef]] = {}
    for ref in models.values():
        groups.setdefault(one_of(ref), []).append(ref)
    devices = {}
    try:
        for key, refs in groups.items():
            devices[key] = (
                _start_merged(spec, refs[0], seed, scratch, len(groups))
                if merged
                else _start_lora(spec, refs, seed, len(groups))
            )
    except BaseException:
        for device in devices.values():
            device.close()
        raise
    engines = {}
    for role, ref in models.items():
        device = devices[one_of(ref)]
        engines[role] = Served(
            role, ref.name, parameters(ref), spec.max_model_len, device, ledger, adapter=device.loras.get(ref.adapter)
        )
    return Driver(engines, list(devices.values()), seed)


def cpu_dtype(spec: EngineSpec) -> str:
    """bfloat16 on a CPU that computes in it (there 1.4 times as fast at 0.8M parameters), else float32 (3 times)."""
    if spec.dtype != "auto":
        return spec.dtype
    flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def _options(spec: EngineSpec, shares: int) -> dict:
    if not current_platform.is_cpu():
        return {"dtype": spec.dtype, "gpu_memory_utilization": spec.gpu_memory / shares}
    return {
        "dtype": cpu_dtype(spec),
        "block_size": CPU_BLOCK,
        "kv_cache_memory_bytes": spec.kv_cache_mb << 20,
        "ir_op_priority": cpu_norms(),
    }


def _start_merged(spec: EngineSpec, ref: ModelRef, seed: int, scratch: Path, shares: int) -> VllmDevice:
    options = _options(spec, shares)
    dtype = "bfloat16" if options["dtype"] == "auto" else options["dtype"]
    if ref.labels is not None:
        options["runner"] = "pooling"
    elif ref.adapter is None:
        return _start(spec, ref.base, ref.name, seed, options, {})
    Path(scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="merged-", dir=scratch) as folder:  # read once, at the start
        (load_merged(ref, dtype) if ref.labels is None else load_judge(ref, dtype)).save_pretrained(folder)
        load_tokenizer(ref.base).save_pretrained(folder)
        device = _start(spec, folder, ref.name, seed, options, {})
    return device if ref.labels is None else VllmJudge(device.llm, ref.name, ref.labels)


@functools.cache
def cpu_norms() -> dict[str, list[str]]:
    """vLLM's own CPU kernels for RMS norms, which it builds and does not use without a compiler; what it then prefers.

    A fifth of a small model's time: 35 against 226 microseconds for 256 tokens of 128 dimensions.
    """
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "fused_add_rms_norm"):
        return {}

    def fits(x, *rest, variance_size=None) -> bool:
        tensors = [t for t in (x, *rest) if isinstance(t, torch.Tensor)]
        return (
            variance_size is None
            and len(tensors) == len(rest)
            and all(t.dtype == x.dtype and t.is_contiguous() for t in tensors)
        )

    @ir.ops.rms_norm.register_impl(
        "cpu",
        supports_args=lambda x, weight, epsilon, variance_size=None: fits(
            x, weight, epsilon, variance_size=variance_size
        ),
    )
    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> torch.Tensor:
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, weight, epsilon)
        return out

    @ir.ops.fused_add_rms_norm.register_impl(
        "cpu",
        supports_args=lambda x, x_residual, weight, epsilon, variance_size=None: fits(
            x, x_residual, weight, epsilon, variance_size=variance_size
        ),
        inplace=True,
    )
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


def _start_lora(spec: EngineSpec, refs: list[ModelRef], seed: int, shares: int) -> VllmDevice:
    adapters = list(dict.fromkeys(ref.adapter for ref in refs if ref.adapter is not None))
    options = _options(spec, shares)
    if adapters:
        rank = max(adapter_config(adapter)["r"] for adapter in adapters)
        fitting = next((allowed for allowed in LORA_RANKS if allowed >= rank), None)
        if fitting is None:
            raise ValueError(f"model.lora_rank: {rank} is more than vLLM serves ({LORA_RANKS[-1]})")
        # On a CPU vLLM gives requests without an adapter the last slot's (index -1): one slot more, all zeros, is theirs.
        slots = len(adapters) + current_platform.is_cpu()
        options |= {"enable_lora": True, "max_loras": slots, "max_lora_rank": fitting}
    # A name, an id and a path are never used twice in a process: vLLM would serve the old weights.
    loras = {path: LoRARequest(f"{i}:{path}", i, path) for i, path in enumerate(adapters, start=1)}
    return _start(spec, refs[0].base, refs[0].name, seed, options, loras)


def _start(
    spec: EngineSpec, model: str, name: str, seed: int, options: dict, loras: dict[str, LoRARequest]
) -> VllmDevice:
    arguments = EngineArgs(
        model=model,
        seed=seed % 2**31,
        max_model_len=spec.max_model_len,
        max_num_seqs=spec.max_running,
        load_format="safetensors",
        enable_prefix_caching=True,
        enforce_eager=current_platform.is_cpu(),  # compiling costs 30 s there and gains nothing
        use_tqdm_on_load=False,
        disable_log_stats=True,
        **options,
    )
    try:
        with warnings.catch_warnings(), _held_back_stderr():
            warnings.simplefilter("ignore", FutureWarning)
            engine = LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
    except Exception as error:
        raise EngineDied(f"vLLM did not start for {name}: {_reason(error)}") from error
    return VllmDevice(engine, name, loras)


@contextmanager
def _held_back_stderr() -> Iterator[None]:
    """Drop what native code notes on stderr while an engine starts (NUMA nodes), but show it if the start fails."""
    sys.stderr.flush()
    shown = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            held.seek(0)
            os.write(shown, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(shown, 2)
            os.close(shown)


class VllmDevice:
    """One LLMEngine; see `flywheel.models.driver.Device`."""

    one_pass = False

    def __init__(self, engine: LLMEngine, name: str, loras: dict[str, LoRARequest]):
        self.llm, self.name, self.loras = engine, name, loras
        self._waiting: dict[str, tuple[asyncio.Future[Drawn], Sampling | Reading]] = {}
        self._count = 0

    def submit(
        self, prompt: Sequence[int], ask: Sampling | Reading, adapter: LoRARequest | None
    ) -> asyncio.Future[Drawn]:
        self._count += 1
        id, future = str(self._count), asyncio.get_running_loop().create_future()
        self.llm.add_request(id, tokens_input(list(prompt)), self._params(ask), lora_request=adapter)
        self._waiting[id] = (future, ask)
        future.add_done_callback(functools.partial(self._drop, id))
        return future

    def _drop(self, id: str, future: asyncio.Future[Drawn]) -> None:
        if future.cancelled() and self._waiting.pop(id, None) is not None:
            self.llm.abort_request([id])

    def seed(self, seed: int) -> None:
        set_random_seed(seed)

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def step(self) -> None:
        try:
            outputs = self.llm.step()
        except Exception as error:
            raise EngineDied(f"vLLM died while it served {self.name}: {_reason(error)}") from error
        for output in outputs:
            if output.request_id in self._waiting:
                future, ask = self._waiting.pop(output.request_id)
                if not future.done():
                    future.set_result(self._drawn(output, ask))

    def _params(self, ask: Sampling | Reading) -> SamplingParams | PoolingParams:
        return _sampling(ask)

    def _drawn(self, output, ask: Sampling | Reading) -> Drawn:
        done, cached = output.outputs[0], output.num_cached_tokens or 0
        tokens = tuple(done.token_ids)
        match done.finish_reason:
            case "stop":
                # The reason is None for the tokenizer's EOS, else the id that stopped: one of
                # ours, or another end token of the model's generation config.
                ours = isinstance(ask, Sampling) and done.stop_reason in ask.stop
                drawn = Drawn(tokens, Finish.STOP, not ours, cached)
            case "length":
                drawn = Drawn(tokens, Finish.LENGTH, False, cached)
            case reason:
                raise EngineDied(f"vLLM ended a sequence of {self.name} with {reason!r}")
        if isinstance(ask, Sampling):
            return drawn
        good, bad = (done.logprobs[0][label].logprob for label in ask.labels)
        return Drawn(drawn.tokens, drawn.finish, drawn.eos, cached, (1 / (1 + math.exp(min(bad - good, 700.0))),))

    def close(self) -> None:
        # It collects all garbage, twice: a second of this heap, for nothing where the process ends with it.
        with mock.patch("gc.collect", return_value=0):
            self.llm.engine_core.shutdown()


class VllmJudge(VllmDevice):
    """An engine of `load_judge`'s model: it makes no token, and one pass answers all reads of a text.

    A lone read may use the prefix cache, as beam search's do; vLLM keeps it from a request that wants every token's.
    """

    one_pass = True

    def __init__(self, engine: LLMEngine, name: str, labels: tuple[int, int]):
        super().__init__(engine, name, {})
        self._labels = labels

    def _params(self, ask: Sampling | Reading) -> PoolingParams:
        if isinstance(ask, Sampling) or ask.labels != self._labels:
            raise ValueError(f"{self.name} was opened to judge by the labels {self._labels}, and is asked for {ask}")
        return PoolingParams(task="classify" if len(ask.reads) == 1 else "token_classify")

    def _drawn(self, output, ask: Reading) -> Drawn:
        good = output.outputs.data.view(-1, 2)[:, 0].tolist()
        values = good if len(ask.reads) == 1 else [good[read - 1] for read in ask.reads]
        return Drawn((), Finish.LENGTH, False, output.num_cached_tokens or 0, tuple(values))


@functools.lru_cache(maxsize=1024)
def _sampling(ask: Sampling | Reading) -> SamplingParams:
    # skip_clone: else vLLM deep-copies them for every request, which costs as much as two tokens
    if isinstance(ask, Sampling):
        chosen = dict(
            max_tokens=ask.max_tokens, temperature=ask.temperature, top_p=ask.top_p, stop_token_ids=sorted(ask.stop)
        )
    else:
        chosen = dict(max_tokens=1, temperature=0.0, logprob_token_ids=list(ask.labels))
    return SamplingParams(**chosen, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.300}" if lines else type(error).__name__
