"""A server that speaks vLLM's HTTP with a model that anybody can work out: token k of an answer is `token(...)`."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter

from aiohttp import web

EOS, LENGTH = 1, 12  # an answer's tokens before EOS


def token(model: str, prompt: list[int], seed: int | None, k: int) -> int:
    """Any of 10 to 59, from all that a server is told."""
    return 10 + (sum(prompt) + 7 * k + sum(map(ord, model)) + (seed or 0)) % 50


def logprobs(model: str, prompt: list[int]) -> dict[int, float]:
    return {label: -0.1 * ((sum(prompt) + label + len(model)) % 17) for label in range(60)}


class FakeVllm:
    """Serves `base` in a thread of its own. `faults`: one is taken for each request for a completion, until all are.

    `asked`: bodies of all such requests; `billed`: tokens of all usages that were sent whole.
    """

    def __init__(self, base: str = "base", max_model_len: int = 128, lora: str = "enabled", old: bool = False):
        self.base, self.max_model_len, self.lora, self.old = base, max_model_len, lora, old
        self.faults: list[str] = []
        self.asked: list[dict] = []
        self.adapters: dict[str, str] = {}
        self.ever_loaded: list[str] = []
        self.billed: Counter[str] = Counter()
        self.frozen, self.key, self.seconds, self.port = False, None, 0.0, 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, or start again at the same port, with nothing loaded."""
        self.adapters = {}
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def kill(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)

    async def _start(self) -> None:
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.post("/v1/completions", self._completions),
            ]
        )
        if self.lora != "none":
            app.add_routes(
                [web.post("/v1/load_lora_adapter", self._load), web.post("/v1/unload_lora_adapter", self._unload)]
            )
        self._runner = web.AppRunner(app, shutdown_timeout=0, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _thaw(self) -> None:
        while self.frozen:
            await asyncio.sleep(0.01)

    async def _health(self, request: web.Request) -> web.Response:
        await self._thaw()
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        await self._thaw()
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        cards = [{"id": self.base, "root": self.base, "parent": None, "max_model_len": self.max_model_len}]
        cards += [{"id": name, "root": path, "parent": self.base} for name, path in self.adapters.items()]
        return web.json_response({"data": cards})

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.lora == "disabled":
            return error(500, "LoRA is not enabled. Use --enable-lora to enable LoRA.")
        if body["lora_path"] == "/flywheel/preflight":
            return error(404, "No adapter found for '/flywheel/preflight'")
        if body["lora_name"] in self.adapters:
            return error(400, "has already been loaded")
        self.adapters[body["lora_name"]] = body["lora_path"]
        self.ever_loaded.append(body["lora_name"])
        return web.Response(text="Success")

    async def _unload(self, request: web.Request) -> web.Response:
        self.adapters.pop((await request.json())["lora_name"], None)
        return web.Response(text="Success")

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        await self._thaw()
        await asyncio.sleep(self.seconds)
        fault = self.faults.pop(0) if self.faults else None
        if fault == "reset":
            request.transport.abort()
        if fault and fault.isdigit():
            return error(int(fault), "not now")
        if body["model"] not in (self.base, *self.adapters):
            return error(404, f"The model `{body['model']}` does not exist.")
        tokens, finish, stop = self._made(body)
        choice = {"token_ids": tokens, "finish_reason": finish, "stop_reason": stop, "logprobs": None}
        usage = self._usage(body, len(tokens)) | ({"prompt_tokens": 1000} if fault == "bill" else {})
        if body.get("stream"):
            return await self._stream(request, body, choice, usage, fault)
        if "logprob_token_ids" in body:
            found = logprobs(body["model"], body["prompt"])
            shown = [tokens[0], *([] if self.old else body["logprob_token_ids"])]
            choice["logprobs"] = {"top_logprobs": [{f"token_id:{i}": found[i] for i in shown}]}
        self.billed.update(prompt=usage["prompt_tokens"], generated=usage["completion_tokens"])
        return web.json_response({"choices": [choice], "usage": usage})

    def _usage(self, body: dict, made: int) -> dict:
        cached = {"prompt_tokens_details": {"cached_tokens": len(body["prompt"]) // 2}}
        return {"prompt_tokens": len(body["prompt"]), "completion_tokens": made, **cached}

    def _made(self, body: dict) -> tuple[list[int], str, int | None]:
        tokens = []
        for k in range(min(body["max_tokens"], LENGTH)):
            tokens.append(token(body["model"], body["prompt"], body.get("seed"), k))
            if tokens[-1] in body.get("stop_token_ids", ()):
                return tokens, "stop", tokens[-1]
        return (tokens, "length", None) if len(tokens) == body["max_tokens"] else ([*tokens, EOS], "stop", None)

    async def _stream(self, request: web.Request, body: dict, choice: dict, usage: dict, fault: str | None):
        response = web.StreamResponse()
        await response.prepare(request)
        tokens, part = choice["token_ids"], body["stream_interval"]
        for start in range(0, len(tokens), part):
            last = start + part >= len(tokens)
            new = {
                "token_ids": tokens[start : start + part],
                "finish_reason": choice["finish_reason"] if last else None,
            }
            so_far = {**usage, "completion_tokens": min(start + part, len(tokens)), "prompt_tokens_details": None}
            data = {"choices": [{**choice, **new}], "usage": so_far}
            await response.write(b"data: " + json.dumps(data).encode() + b"\n\n")
            if fault == "cut":
                request.transport.close()
                return response
            if fault == "error":
                await response.write(b'data: {"error": {"message": "engine dead"}}\n\ndata: [DONE]\n\n')
                return response
            await asyncio.sleep(0.01)
        await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
        self.billed.update(prompt=usage["prompt_tokens"], generated=usage["completion_tokens"])
        return response


def error(status: int, text: str) -> web.Response:
    return web.json_response({"error": {"message": text, "code": status}}, status=status)
