"""Models on `vllm serve` endpoints that somebody else started (`engine.kind: server`).

Prompts and completions are token ids, over `/v1/completions`. An adapter is loaded by vLLM's own endpoint, under a name
made of its content. A PRM is one of them, and each value one request for one token with the log-probabilities of just
the two labels (`logprob_token_ids`), so the text before every step is charged, though mostly served from the prefix
cache. docs/gpus_and_nodes.md says how the servers are to be started.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from flywheel.errors import EngineDied, UserError, first_line
from flywheel.ledger import Ledger
from flywheel.models.driver import Backend, Output, Scoring, served
from flywheel.models.endpoints import (
    FAULTS,
    Endpoints,
    Fault,
    Server,
    adapter_name,
    check_adapters,
    message,
    parse,
    read,
    session,
)
from flywheel.models.engine import Sampling
from flywheel.models.weights import parameters
from flywheel.recipe import EngineSpec
from flywheel.records import Finish, ModelRef

# Tokens in a part of a streamed answer. Fewer cost both sides time, more are made in vain after `Sampling.done`.
PART = 8


def open_backend(spec: EngineSpec, models: Mapping[str, ModelRef], ledger: Ledger, seed: int, scratch: Path) -> Backend:
    """See `flywheel.models.backend.open_backend`. The servers are asked for the first time when a request is."""
    for ref in models.values():
        if ref.prm_head:
            raise UserError(f"{ref.name}: a PRM that is no language model is served by engine.kind vllm alone")
    names = {ref.adapter: adapter_name(ref.name, ref.adapter) for ref in models.values() if ref.adapter}
    devices = {}
    for base in {ref.base for ref in models.values()}:
        own = {ref.adapter for ref in models.values() if ref.adapter and ref.base == base}
        adapters = {names[path]: str(Path(path).absolute()) for path in own}
        endpoints = Endpoints(spec.servers, base, adapters, spec.max_running, spec.max_model_len)
        devices[base] = RemoteDevice(endpoints)
    engines = {
        role: served(role, ref, parameters(ref), spec, devices[ref.base], ledger, names.get(ref.adapter), seed)
        for role, ref in models.items()
    }
    return Backend(engines, list(devices.values()))


class RemoteDevice:
    """The endpoints of one base; implements `flywheel.models.driver.Device`. An adapter is the name it is served by.

    Every draw has a seed of its own (`ServedModel`). So servers that were started alike do not draw alike, and a
    request that is sent again draws what it drew.
    """

    one_pass = False

    def __init__(self, endpoints: Endpoints):
        self.endpoints, self.tokens = endpoints, 0
        self._under_way: set[asyncio.Future] = set()

    def submit(self, prompt: Sequence[int], request: Sampling | Scoring, adapter: str | None) -> asyncio.Future[Output]:
        body = _body(prompt, request, adapter)
        if isinstance(request, Sampling) and request.temperature > 0:
            body["seed"] = request.seed
        asked = asyncio.ensure_future(self.endpoints.ask(functools.partial(self._send, body, request)))
        self._under_way.add(asked)
        asked.add_done_callback(self._under_way.discard)
        return asked

    @property
    def sequences(self) -> int:
        return len(self._under_way)

    def step(self) -> bool:
        return False  # the event loop itself waits for the servers

    def close(self) -> None:
        asyncio.run(self.endpoints.unload())

    async def _send(self, body: dict, request: Sampling | Scoring, server: Server) -> Output:
        """Raises FAULTS, and EngineDied if the answer is not what this vLLM gives."""
        body = {**body, "model": body["model"] or server.base}
        async with server.session.post(f"{server.url}/v1/completions", json=body) as response:
            try:
                if body.get("stream") and response.status == 200:
                    return await self._streamed(response, request, len(body["prompt"]))
                return self._whole(await read(response), request, len(body["prompt"]))
            except (KeyError, TypeError, IndexError) as error:
                raise EngineDied(f"engine.servers: {server.url} answers unlike vLLM 0.32: {error!r}") from error

    def _whole(self, answer: Mapping[str, Any], request: Sampling | Scoring, count: int) -> Output:
        choice, values = answer["choices"][0], ()
        if isinstance(request, Scoring):
            found = choice["logprobs"]["top_logprobs"][0]
            good, bad = (found[f"token_id:{label}"] for label in request.labels)
            values = (1 / (1 + math.exp(min(bad - good, 700.0))),)  # exp overflows beyond 709
        self.tokens += len(choice["token_ids"])
        return _ended(choice["token_ids"], choice, answer["usage"], request, count, values)

    async def _streamed(self, response: aiohttp.ClientResponse, request: Sampling, count: int) -> Output:
        """Read an answer as it is made; where `request.done`, close the connection, which ends it at the server."""
        made: list[int] = []
        last, usage = {"finish_reason": None}, {}
        async for line in response.content:
            data = line.removeprefix(b"data: ").strip()
            if not data or data == b"[DONE]":
                continue
            part = parse(data)
            if "error" in part:
                raise Fault(message(data.decode()))
            usage = part["usage"]
            for choice in part["choices"]:
                last, new = choice, choice["token_ids"]
                self.tokens += len(new)
                for k, token in enumerate(new, start=1):
                    made.append(token)
                    if (k < len(new) or choice["finish_reason"] != "stop") and request.done(made):
                        response.close()
                        return _output(made, Finish.STOP, False, usage, count, spare=len(new) - k)
        if not last["finish_reason"]:
            raise Fault("the answer broke off")
        return _ended(made, last, usage, request, count)


def _body(prompt: Sequence[int], request: Sampling | Scoring, model: str | None) -> dict[str, Any]:
    """All parameters that a server could else take from the model's generation config. model: None for the base."""
    body = {"model": model, "prompt": list(prompt), "return_token_ids": True}
    body |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    if isinstance(request, Scoring):
        body |= {"max_tokens": 1, "temperature": 0.0, "repetition_penalty": 1.0, "return_tokens_as_token_ids": True}
        return body | {"logprobs": 1, "logprob_token_ids": list(request.labels)}
    body |= request.named()
    if request.done is None:
        return body
    counted = {"include_usage": True, "continuous_usage_stats": True}
    return body | {"stream": True, "stream_options": counted, "stream_interval": PART}


def _ended(
    tokens: Sequence[int],
    choice: Mapping[str, Any],
    usage: Mapping[str, Any],
    request: Sampling | Scoring,
    count: int,
    values: tuple[float, ...] = (),
) -> Output:
    """A sequence that its server ended. count: tokens of the prompt."""
    match choice["finish_reason"]:
        case "stop":  # the reason is None for EOS: see `flywheel.models.vllm.VllmDevice`
            stopped = isinstance(request, Sampling) and choice["stop_reason"] in request.stop
            return _output(tokens, Finish.STOP, not stopped, usage, count, values)
        case "length":
            return _output(tokens, Finish.LENGTH, False, usage, count, values)
    raise Fault(f"it ended a sequence with {choice['finish_reason']!r}")


def _output(
    tokens: Sequence[int],
    finish: Finish,
    eos: bool,
    usage: Mapping[str, Any],
    count: int,
    values: tuple[float, ...] = (),
    spare: int = 0,
) -> Output:
    """Raises EngineDied unless the server bills exactly what was asked and answered."""
    billed, right = (usage["prompt_tokens"], usage["completion_tokens"]), (count, len(tokens) + spare)
    if billed != right:
        raise EngineDied(f"engine.servers: a server bills {billed} prompt and generated tokens where {right} are seen")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Output(tuple(tokens), finish, eos, cached, values, spare)


def preflight(spec: EngineSpec, bases: Sequence[str]) -> None:
    """Ask every server for what a run needs. Raises UserError; of several faulty servers, all but the count is printed.

    Each must serve one of `bases`, and each of them must be served.
    """
    found = asyncio.run(_look_at_all(spec, bases))
    faults = [f"{url}: {'; '.join(dict.fromkeys(by.values()))}" for url, by in found.items() if all(by.values())]
    for base in bases:
        if all(by[base] for by in found.values()) and len(faults) < len(found):
            faults.append(f"none of them serves {base}")
    if len(faults) > 1:
        print(*(f"engine.servers: {fault}" for fault in faults), sep="\n", flush=True)
    if faults:
        raise UserError(f"engine.servers: {faults[0] if len(faults) == 1 else f'{len(faults)} faults, see above'}")


async def _look_at_all(spec: EngineSpec, bases: Sequence[str]) -> dict[str, dict[str, str | None]]:
    """By URL and base what is wrong, or None."""
    found = await asyncio.gather(*(_fault(spec, url, base) for url in spec.servers for base in bases))
    return {url: dict(zip(bases, found[i * len(bases) :])) for i, url in enumerate(spec.servers)}


async def _fault(spec: EngineSpec, url: str, base: str) -> str | None:
    server, asked = Server(url, places=[]), Scoring((0, 1), (1,))
    device = RemoteDevice(Endpoints([url], base, {}, 1, spec.max_model_len))
    async with session() as server.session:
        try:
            await device.endpoints.admit(server)
            await check_adapters(server)
            await device._send(_body([0], asked, None), asked, server)
        except (*FAULTS, EngineDied) as error:
            return first_line(error).removeprefix(f"engine.servers: {url} ")
