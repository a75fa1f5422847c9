"""vLLM in this process: no server, and worker processes only for an engine over several devices.

The backend's loop calls `LLMEngine.step()`.

Adapters are served in one of two ways (`engine.adapters`). merged, the default on a CPU: each model has
its own engine, with the adapter merged into the base, because runtime LoRA is three to eight times
slower there. A PRM is then served as a classifier, so that one pass gives the values of all steps, in
less than half the time of one request per step; some architectures forbid it (`judge_fault`). runtime,
the default on a GPU: one engine serves a base with all its adapters.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flywheel.errors import EngineDied, UserError
from flywheel.ledger import Ledger
from flywheel.models import vllm_cpu
from flywheel.models.driver import Backend, Labels, Output, Scoring, served
from flywheel.models.engine import Sampling
from flywheel.models.weights import (
    MAX_LORA_RANK,
    adapter_config,
    check_length,
    judge_fault,
    load_merged,
    load_tokenizer,
    parameters,
    save_judge,
)
from flywheel.recipe import EngineSpec
from flywheel.records import Finish, ModelRef, PrmHead
from flywheel.runs.malloc import give_memory_back

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read at import and at every engine's start
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # each engine on a CPU prints a page of warnings
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
# torchrun sets it: engines would use torchrun's store as theirs and wait for a host that never joins.
os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)

logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # vLLM logs before it reads the variable

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    from vllm import EngineArgs, LLMEngine, PoolingParams, SamplingParams
    from vllm.config import PoolerConfig
    from vllm.inputs.engine import tokens_input
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind
    from vllm.usage.usage_lib import UsageContext

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, MAX_LORA_RANK)  # values that vLLM accepts as max_lora_rank


def open_backend(spec: EngineSpec, models: Mapping[str, ModelRef], ledger: Ledger, seed: int, scratch: Path) -> Backend:
    """See `flywheel.models.backend.open_backend`."""
    on_cpu = current_platform.is_cpu()
    if on_cpu:
        vllm_cpu.prepare_process(spec)
    for base in {ref.base for ref in models.values()}:
        check_length(base, spec.max_model_len)
    merged = on_cpu if spec.adapters == "auto" else spec.adapters == "merged"

    if merged:  # a PRM that cannot be a classifier is served as any model, and answers one request for each step
        models = {k: replace(ref, labels=None) if judge_fault(ref.base) else ref for k, ref in models.items()}

    def engine_of(ref: ModelRef) -> Hashable:
        return (ref.base, ref.adapter, ref.labels) if merged or ref.prm_head else ref.base

    groups: dict[Hashable, list[ModelRef]] = {}
    for ref in models.values():
        groups.setdefault(engine_of(ref), []).append(ref)
    sizes = {role: parameters(ref) for role, ref in models.items()}  # before an engine starts: see `_shape`
    run_seed = vllm_cpu.RunSeed(len(groups))
    devices: dict[Hashable, VllmDevice] = {}
    with ExitStack() as opened, give_memory_back():
        for key, refs in groups.items():
            arguments = engine_arguments(spec, refs[0].base, seed, len(groups))
            if merged or refs[0].prm_head:
                devices[key] = _open_merged(arguments, refs[0], run_seed, scratch)
            else:
                devices[key] = _open_runtime(arguments, refs, run_seed)
            opened.callback(devices[key].close)
        engines = {}
        for role, ref in models.items():
            device = devices[engine_of(ref)]
            adapter = device.adapters.get(ref.adapter)
            engines[role] = served(role, ref, sizes[role], spec, device, ledger, adapter, seed)
        opened.pop_all()
    return Backend(engines, list(devices.values()), seed, run_seed.start_run)


def engine_arguments(spec: EngineSpec, model: str, seed: int = 0, engines: int = 1) -> dict[str, Any]:
    """vLLM's `EngineArgs` for one of `engines` in each of a rank's `engine.workers` processes, which share a GPU."""
    if current_platform.is_cpu():
        platform = vllm_cpu.engine_arguments(spec)
    else:
        share = spec.gpu_memory / engines / max(1, spec.workers)
        platform = {"dtype": spec.dtype, "gpu_memory_utilization": share}
    return {
        "model": model,
        "seed": seed % 2**31,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.max_running,
        "tensor_parallel_size": spec.tensor_parallel,
        "load_format": "safetensors",
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
        **platform,
    }


def _open_merged(arguments: dict[str, Any], ref: ModelRef, run_seed: vllm_cpu.RunSeed, scratch: Path) -> VllmDevice:
    if ref.adapter is None and ref.labels is None:
        return VllmDevice(_start(arguments, ref.name), ref.name, run_seed)
    if ref.prm_head is PrmHead.CLASSES:  # vLLM has this class
        arguments = arguments | {"runner": "pooling", "pooler_config": PoolerConfig(tok_pooling_type="ALL")}
        return VllmJudge(_start(arguments, ref.name), ref.name, run_seed, ref.labels, own_classes=True)
    dtype = "bfloat16" if arguments["dtype"] == "auto" else arguments["dtype"]  # "auto" occurs only on a GPU
    Path(scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="merged-", dir=scratch) as folder:  # read only when the engine starts
        load_tokenizer(ref.base).save_pretrained(folder)
        if ref.labels is None:
            load_merged(ref, dtype).save_pretrained(folder)
            return VllmDevice(_start(arguments | {"model": folder}, ref.name), ref.name, run_seed)
        save_judge(ref, dtype, folder)
        engine = _start(arguments | {"model": folder, "runner": "pooling"}, ref.name)
        return VllmJudge(engine, ref.name, run_seed, ref.labels)


def _open_runtime(arguments: dict[str, Any], refs: Sequence[ModelRef], run_seed: vllm_cpu.RunSeed) -> VllmDevice:
    paths = list(dict.fromkeys(ref.adapter for ref in refs if ref.adapter is not None))
    if paths:
        rank = max(adapter_config(path)["r"] for path in paths)
        if rank > MAX_LORA_RANK:
            raise UserError(f"model.lora_rank: {rank} is more than vLLM serves ({MAX_LORA_RANK})")
        slots = vllm_cpu.lora_slots(len(paths)) if current_platform.is_cpu() else len(paths)
        fitting = next(allowed for allowed in LORA_RANKS if allowed >= rank)
        arguments = arguments | {"enable_lora": True, "max_loras": slots, "max_lora_rank": fitting}
    # vLLM caches adapters by id, so an id must mean the same path as long as the engine lives.
    adapters = {path: LoRARequest(f"{i}:{path}", i, path) for i, path in enumerate(paths, start=1)}
    return VllmDevice(_start(arguments, refs[0].name), refs[0].name, run_seed, adapters)


def _start(arguments: dict[str, Any], name: str) -> LLMEngine:
    quiet = vllm_cpu.hold_back_stderr if current_platform.is_cpu() else nullcontext
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore", FutureWarning)
            return LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)
    except Exception as error:
        raise EngineDied(f"vLLM did not start for {name}: {_reason(error)}") from error


class VllmDevice:
    """One LLMEngine; implements `flywheel.models.driver.Device`.

    `adapters`: those served at run time, by path. With vLLM's V2 runner (GPUs) one request answers several reads of a
    text; the V1 runner of its CPU build takes one request for each.
    """

    one_pass = False

    def __init__(
        self,
        engine: LLMEngine,
        name: str,
        run_seed: vllm_cpu.RunSeed,
        adapters: Mapping[str, LoRARequest] | None = None,
    ):
        self.llm, self.name, self.run_seed, self.adapters = engine, name, run_seed, adapters or {}
        self.one_pass = self.one_pass or engine.vllm_config.use_v2_model_runner
        several = engine.vllm_config.parallel_config.tensor_parallel_size > 1
        if several:  # its workers sample, in processes of their own
            run_seed.elsewhere.append(lambda seed: engine.collective_rpc(vllm_cpu.seed_worker, args=(seed,)))
        self._waiting: dict[str, tuple[asyncio.Future[Output], Sampling | Scoring]] = {}
        self._made: dict[str, list[int]] = {}  # the tokens so far, of requests with `Sampling.done`
        self._count = self._finished = 0  # requests; tokens of finished ones
        self._seeds: dict[str, int] = {}
        self._takes_seeds = engine.vllm_config.use_v2_model_runner
        if current_platform.is_cpu() and not self.one_pass and not several:
            vllm_cpu.draw_by_seed(engine, self._seeds)

    @property
    def tokens(self) -> int:
        running = self.llm.output_processor.request_states.values()
        return self._finished + sum(state.detokenizer.num_output_tokens() for state in running if state.detokenizer)

    def submit(
        self, prompt: Sequence[int], request: Sampling | Scoring, adapter: LoRARequest | None
    ) -> asyncio.Future[Output]:
        self.run_seed.add(prompt)
        self._count += 1
        id, future = str(self._count), asyncio.get_running_loop().create_future()
        self.llm.add_request(id, tokens_input(list(prompt)), self._vllm_params(request), lora_request=adapter)
        self._waiting[id] = (future, request)
        if isinstance(request, Sampling) and request.seed is not None:
            self._seeds[id] = request.seed
        if isinstance(request, Sampling) and request.done:
            self._made[id] = []
        future.add_done_callback(functools.partial(self._drop, id))
        return future

    def _drop(self, id: str, future: asyncio.Future[Output]) -> None:
        self._seeds.pop(id, None)
        if future.cancelled() and self._waiting.pop(id, None) is not None:
            self._made.pop(id, None)
            self.llm.abort_request([id])

    @property
    def sequences(self) -> int:
        return len(self._waiting)

    def step(self) -> bool:
        self.run_seed.apply()
        try:
            results = self.llm.step()
        except Exception as error:
            raise EngineDied(f"vLLM died while it served {self.name}: {_reason(error)}") from error
        over = []
        for result in results:
            id = result.request_id
            if id not in self._waiting:
                continue
            future, request = self._waiting[id]
            made = self._made.get(id)
            if made is not None:
                made += result.outputs[0].token_ids
            if result.finished:
                output = self._output(result, request, made)
                if made is not None and output.finish is Finish.LENGTH and request.done(made):
                    output = replace(output, finish=Finish.STOP)  # its last token completes it
            elif request.done(made):
                over.append(id)
                output = Output(tuple(made), Finish.STOP, False, result.num_cached_tokens or 0)
            else:
                continue
            self._finished += len(output.tokens) or len(result.prompt_token_ids)
            del self._waiting[id]
            self._made.pop(id, None)
            if not future.done():
                future.set_result(output)
        if over:
            self.llm.abort_request(over)
        return True

    def _vllm_params(self, request: Sampling | Scoring) -> SamplingParams | PoolingParams:
        known = self._takes_seeds or isinstance(request, Scoring)
        return _sampling_params(request if known else replace(request, seed=None))

    def _output(self, result, request: Sampling | Scoring, made: Sequence[int] | None = None) -> Output:
        """`made`: all tokens of the sequence, where `result` holds only the last of them."""
        sequence, cached = result.outputs[0], result.num_cached_tokens or 0
        tokens, values = tuple(sequence.token_ids if made is None else made), ()
        if isinstance(request, Scoring):
            values = self._values(result, request)
            tokens = () if self.one_pass else tokens
        match sequence.finish_reason:
            case "stop":
                # The stop reason is None for the tokenizer's EOS, else the id of the stop token: one
                # of the request's, or another end token of the model's generation config.
                stopped = isinstance(request, Sampling) and sequence.stop_reason in request.stop
                return Output(tokens, Finish.STOP, not stopped, cached, values)
            case "length":
                return Output(tokens, Finish.LENGTH, False, cached, values)
            case reason:
                raise EngineDied(f"vLLM ended a sequence of {self.name} with {reason!r}")

    def _values(self, result, request: Scoring) -> tuple[float, ...]:
        """The rows of `_sampling_params` at the reads, then what the token behind the text would be."""
        pairs, first = [], request.reads[0]
        if len(request.reads) > 1:
            if (rows := result.prompt_token_id_logprobs) is None:  # preempted while it was read
                raise EngineDied(f"vLLM returned no label log-probabilities of a text for {self.name}")
            pairs = [rows[read - first] for read in request.reads[:-1]]
        pairs.append([result.outputs[0].logprobs[0][label].logprob for label in request.labels])
        return tuple(1 / (1 + math.exp(min(float(bad - good), 700.0))) for good, bad in pairs)  # exp overflows from 709

    def close(self) -> None:
        with vllm_cpu.skip_garbage_collection() if current_platform.is_cpu() else nullcontext():
            self.llm.engine_core.shutdown()


class VllmJudge(VllmDevice):
    """An engine for the model of `save_judge`: it generates no tokens, and one pass answers all reads of a text.

    A single read can use the prefix cache, as in beam search; vLLM does not allow that for a
    request for the values of all tokens.

    own_classes: the model is a published classifier of all tokens instead, whose second class is the good one.
    """

    one_pass = True

    def __init__(
        self, engine: LLMEngine, name: str, run_seed: vllm_cpu.RunSeed, labels: Labels, own_classes: bool = False
    ):
        super().__init__(engine, name, run_seed)
        self._labels, self._good, self._last = labels, int(own_classes), not own_classes

    def _vllm_params(self, request: Sampling | Scoring) -> PoolingParams:
        if isinstance(request, Sampling) or request.labels != self._labels:
            raise ValueError(
                f"{self.name} was opened to judge by the labels {self._labels}, and is asked for {request}"
            )
        return PoolingParams(task="classify" if self._last and len(request.reads) == 1 else "token_classify")

    def _output(self, result, request: Scoring, made: None = None) -> Output:
        good = result.outputs.data.view(-1, 2)[:, self._good].tolist()  # one row per token, or only the last token's
        values = tuple(good[read - request.reads[-1] - 1] for read in request.reads)
        return Output((), Finish.LENGTH, False, result.num_cached_tokens or 0, values)


@functools.lru_cache(maxsize=1024)
def _sampling_params(request: Sampling | Scoring) -> SamplingParams:
    kind = RequestOutputKind.FINAL_ONLY
    if isinstance(request, Sampling):
        if request.done:
            kind = RequestOutputKind.DELTA
        chosen = {**request.named(), "seed": request.seed}
    else:
        first, last = request.reads[0], request.reads[-1]
        chosen = {"max_tokens": 1, "temperature": 0.0, "logprob_token_ids": list(request.labels)}
        if last > first:
            # a row for each prefix from the first read on, but the whole text's, which the token behind has
            rows = np.full((last - first, 2), request.labels)
            chosen |= {"prompt_logprob_start": first - 1, "prompt_logprob_token_ids": rows}
    # skip_clone: otherwise vLLM deep-copies them for every request, which costs as much as two tokens
    return SamplingParams(**chosen, detokenize=False, output_kind=kind, skip_clone=True)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.300}" if lines else type(error).__name__
