"""An OpenAI-compatible server over a run's models: every answer is searched, and `usage` holds the whole bill.

One event loop serves HTTP and steps the engines (`Backend.serve`), so all requests share their batches and none waits
for another to end. A client that goes away has its search cancelled.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from flywheel.errors import TooLong, UserError
from flywheel.ledger import metered
from flywheel.records import Question
from flywheel.search.greedy import Greedy
from flywheel.search.strategies import named
from flywheel.search.strategy import Strategy
from flywheel.serving.solver import Ask, Solved, Solver
from flywheel.serving.stream import Tell, telling

MAX_BODY = 1 << 20  # bytes
T = TypeVar("T")


class Refused(Exception):
    """A request that gets an error: args are (HTTP status, message)."""


class Gone(Exception):
    """The client closed its connection."""


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: str
    content: str


class Asked(BaseModel):
    """A request's body. What is not listed here is refused; `user`, `metadata` and `stream_options` are ignored."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[Message] | None = None  # chat
    prompt: str | None = None  # completions
    n: Literal[1] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    max_tokens: Annotated[int, Field(gt=0)] | None = None  # of one solution
    max_completion_tokens: Annotated[int, Field(gt=0)] | None = None  # the newer name of the same
    stream: bool = False
    user: Any = None
    metadata: Any = None
    stream_options: Any = None
    strategy: str = "auto"
    budget: Annotated[int, Field(gt=0)] | None = None  # generations
    max_total_tokens: Annotated[int, Field(gt=0)] | None = None


@dataclass
class Service:
    """What the endpoints share. `name`: the model's id; `queue`: requests under way at most; `key`: of the API.

    `most`: generations of one request at most.
    """

    solver: Solver
    name: str
    budget: int
    queue: int
    key: str | None = None
    most: int = 1024
    under_way: int = 0

    def __post_init__(self):
        self.registry = CollectorRegistry()

        def metric(kind, name: str, text: str, *labels: str):
            return kind(f"flywheel_{name}", text, labels, registry=self.registry)

        self.requests = metric(Counter, "requests", "Requests by HTTP status", "status")
        self.tokens = metric(Counter, "tokens", "Tokens charged", "kind")
        self.strategies = metric(Counter, "strategies", "Answers by strategy", "strategy")
        self.seconds = metric(Histogram, "seconds", "Seconds to an answer")
        self.running = metric(Gauge, "under_way", "Requests under way")

    def question(self, asked: Asked) -> Question:
        if asked.model != self.name:
            raise Refused(404, f"model: {asked.model!r} is not served; {self.name} is")
        if asked.messages is not None:
            roles = [message.role for message in asked.messages]
            if roles != ["user"]:
                raise Refused(400, f"messages: one message of the user, the question, is wanted; got {roles}")
            text = asked.messages[0].content
        else:
            text = asked.prompt or ""
        if not text.strip():
            raise Refused(400, "the question is empty")
        return Question(uuid.uuid4().hex, text)

    def ask(self, asked: Asked) -> Ask:
        try:
            strategy = None if asked.strategy == "auto" else named(asked.strategy)
        except UserError as error:
            raise Refused(400, str(error)) from None
        if asked.temperature is not None:
            strategy = at_temperature(strategy, asked.temperature)
        most = max(strategy.generations if strategy else 0, asked.budget or 0)
        if most > self.most:
            raise Refused(400, f"budget: {most} generations are more than {self.most}")
        if strategy and not self.solver.searcher.can(strategy):
            raise Refused(400, f"strategy: {strategy.name} needs a {strategy.maker}, and this round has none")
        return Ask(strategy, asked.budget or self.budget, asked.max_total_tokens)

    async def solve(self, asked: Asked, tell: Tell | None = None) -> Solved:
        """`tell`: gets each step of the answer as soon as it is made, if that is the greedy one."""
        question, ask, solver = self.question(asked), self.ask(asked), self.solver
        if most := asked.max_tokens or asked.max_completion_tokens:
            sample = solver.searcher.sample
            sample = sample.model_copy(update={"max_tokens": min(most, sample.max_tokens)})
            solver = replace(solver, searcher=replace(solver.searcher, sample=sample))
        if tell and isinstance(solver.known(ask)[0], Greedy):
            solver = replace(solver, searcher=telling(solver.searcher, tell))
        if self.under_way >= self.queue:
            raise Refused(429, f"{self.queue} requests are under way; try again later")
        self.under_way += 1
        self.running.set(self.under_way)
        with metered() as spent:
            try:
                found = await solver.solve(question, ask)
            except (TooLong, UserError) as error:
                raise Refused(400, str(error)) from None
            finally:  # of a client that went away, too
                self.under_way -= 1
                self.running.set(self.under_way)
                for kind in ("prompt", "generated", "scored"):
                    self.tokens.labels(kind).inc(getattr(spent, kind))
        self.strategies.labels(found.strategy).inc()
        self.seconds.observe(found.seconds)
        return found


def at_temperature(strategy: Strategy | None, temperature: float) -> Strategy:
    """The strategy at a temperature; 0 is the greedy answer. Raises Refused where it has none to set."""
    if temperature == 0:
        if strategy and not isinstance(strategy, Greedy):
            raise Refused(400, f"temperature: 0 is the greedy answer, not {strategy.name}")
        return strategy or Greedy()
    if strategy is None:
        raise Refused(400, "temperature: the plan chooses it; name a strategy to set it, or 0 for the greedy answer")
    if not hasattr(strategy, "temperature"):
        raise Refused(400, f"temperature: {strategy.name} has none to set")
    return replace(strategy, temperature=temperature)


def app(service: Service) -> FastAPI:
    api = FastAPI(title="flywheel", docs_url=None, redoc_url=None, openapi_url=None)

    @api.exception_handler(Refused)
    async def refuse(request: Request, error: Refused) -> JSONResponse:
        status, message = error.args
        service.requests.labels(str(status)).inc()
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "code": status}}, status)

    @api.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        service.requests.labels("499").inc()
        return Response(status_code=499)

    @api.get("/health")
    async def health() -> dict:
        return {"status": "ok", "under_way": service.under_way}

    @api.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type="text/plain; version=0.0.4")

    @api.get("/v1/models")
    async def models(request: Request) -> dict:
        check_key(service, request)
        return {"object": "list", "data": [{"id": service.name, "object": "model", "owned_by": "flywheel"}]}

    async def answer(request: Request, chat: bool) -> Response:
        check_key(service, request)
        asked = await read(request, "messages" if chat else "prompt")
        if asked.stream:
            made: asyncio.Queue[str | Solved | Exception] = asyncio.Queue()
            work = asyncio.ensure_future(solve_into(made, asked))
            try:
                first = await unless_gone(request, made.get())
            except BaseException:  # Gone, or this request's own end
                work.cancel()
                raise
            if isinstance(first, Exception):
                raise first
            service.requests.labels("200").inc()
            return StreamingResponse(events(service.name, work, first, made, chat), media_type="text/event-stream")
        found = await unless_gone(request, service.solve(asked))
        service.requests.labels("200").inc()
        return JSONResponse(completion(service.name, found, chat))

    async def solve_into(made: asyncio.Queue[str | Solved | Exception], asked: Asked) -> None:
        """Put the steps of a greedy answer as they are made, then what was found or the error."""
        try:
            made.put_nowait(await service.solve(asked, made.put_nowait))
        except Exception as error:
            made.put_nowait(error)

    @api.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, True)

    @api.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await answer(request, False)

    return api


def check_key(service: Service, request: Request) -> None:
    given = request.headers.get("authorization", "")
    if service.key and not hmac.compare_digest(given.encode(), f"Bearer {service.key}".encode()):
        raise Refused(401, "the API key is missing or wrong; send the header Authorization: Bearer KEY")


async def read(request: Request, wanted: str) -> Asked:
    """The request's body, which must have the key `wanted`. Raises Refused."""
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise Refused(413, f"the body has more than {MAX_BODY:,} bytes")
    except ClientDisconnect:
        raise Gone from None
    try:
        asked = Asked.model_validate_json(body)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise Refused(400, f"{where}: {fault['msg']}" if where else fault["msg"]) from None
    if getattr(asked, wanted) is None:
        raise Refused(400, f"{wanted}: missing")
    if asked.prompt is not None and asked.messages is not None:
        raise Refused(400, "prompt and messages: only one of them is wanted")
    return asked


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client closes the connection; then raises Gone."""

    async def closed() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(closed())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for each in (task, leaving):
            each.cancel()


def completion(name: str, found: Solved, chat: bool) -> dict:
    text = found.best.solution.text if found.best else ""
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {
        **head_of(name, "chat.completion" if chat else "text_completion"),
        "choices": [{"index": 0, **said, "finish_reason": reason(found), "logprobs": None}],
        **bill(found),
    }


def head_of(name: str, kind: str) -> dict:
    return {"id": uuid.uuid4().hex, "object": kind, "created": int(time.time()), "model": name}


def reason(found: Solved) -> str:
    return "length" if found.cut_off else "stop"


def bill(found: Solved) -> dict:
    return {
        "usage": {
            "prompt_tokens": found.prompt,
            "completion_tokens": found.generated,
            "scored_tokens": found.scored,
            "total_tokens": found.tokens,
            "prompt_tokens_details": {"cached_tokens": found.cached},
        },
        "flywheel": {
            key: getattr(found, key)
            for key in ("answer", "share", "certainty", "strategy", "guide", "bin", "seconds", "cut_off")
        },
    }


async def events(
    name: str, work: asyncio.Task, first: str | Solved, made: asyncio.Queue[str | Solved | Exception], chat: bool
) -> AsyncIterator[str]:
    """Server-sent events of a completion: the steps of a greedy answer as `made` gets them, else the whole answer."""
    head = head_of(name, "chat.completion.chunk" if chat else "text_completion")

    def event(text: str, finish: str | None = None, **more: object) -> str:
        said = {"delta": {"role": "assistant", "content": text} if text else {}} if chat else {"text": text}
        return f"data: {json.dumps({**head, 'choices': [{'index': 0, **said, 'finish_reason': finish}], **more})}\n\n"

    sent, item = "", first
    try:
        while isinstance(item, str):
            sent += item
            yield event(item)
            item = await made.get()
        if isinstance(item, Exception):
            raise item
        text = item.best.solution.text if item.best else ""
        if rest := text[len(sent) :]:
            yield event(rest)
        yield event("", reason(item), **bill(item))
        yield "data: [DONE]\n\n"
    finally:  # of a client that went away, too
        work.cancel()
