"""The `vllm serve` endpoints of one base: which of them live, what they have loaded, where the next request goes.

An endpoint that faults is left out: its requests go to others, and it is looked at again every `EVERY` seconds. Back,
it gets the adapters anew, since a server that was restarted has forgotten them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from flywheel.errors import EngineDied, UserError, first_line
from flywheel.models.weights import adapter_config
from flywheel.runs.hub import name_of

EVERY = 2.0  # seconds between two looks at an endpoint
ANSWER = 30.0  # seconds for the answer to such a look
LOADED = 300.0  # seconds for loading an adapter, from a slow file system too
SILENT = 600.0  # seconds without a byte after which a request counts as lost
PATIENCE = 600.0  # seconds without any living endpoint until the stage fails: a large model takes minutes to start
ATTEMPTS = 8  # for one request; with `_pause` between them about a minute
KEY = "VLLM_API_KEY"  # environment variable, of vLLM's server too
ADAPTERS = "--enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"

T = TypeVar("T")
log = logging.getLogger(__name__)


class Fault(Exception):
    """An endpoint did not do what it was asked; another may."""


class Missing(Fault):
    """An endpoint does not know the model: it was restarted, or another process unloaded the adapter."""


class Refused(Fault):
    """An endpoint lives, but is not started as the run needs it."""


FAULTS = (Fault, aiohttp.ClientError, OSError)  # TimeoutError is an OSError


@dataclass(eq=False)
class Server:
    """One endpoint. `base`: its own name for the base, once it was admitted. `places`: those not on offer."""

    url: str
    places: list[int]
    base: str = ""
    lives: bool = False
    fault: Exception | None = None
    session: aiohttp.ClientSession | None = None  # belongs to one event loop
    again: asyncio.Event = field(default_factory=asyncio.Event)  # set to be looked at at once

    async def get(self, path: str) -> Any:
        """The JSON at `path`. Raises FAULTS."""
        async with self.session.get(self.url + path, timeout=aiohttp.ClientTimeout(ANSWER)) as response:
            return await read(response)

    async def post(self, path: str, body: dict[str, Any], seconds: float) -> tuple[int, str]:
        """(status, text) of the answer. Raises FAULTS."""
        async with self.session.post(self.url + path, json=body, timeout=aiohttp.ClientTimeout(seconds)) as response:
            return response.status, await response.text()


class Endpoints:
    """The endpoints that serve `base`; a request takes one of the `max_running` places of one that lives.

    adapters: paths by the name under which they are served. Every endpoint must read the same paths.
    """

    def __init__(
        self, urls: Sequence[str], base: str, adapters: Mapping[str, str], max_running: int, max_model_len: int
    ):
        self.base, self.adapters, self.max_model_len = base, adapters, max_model_len
        self._urls, self._max_running = urls, max_running
        self.servers: list[Server] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    async def ask(self, send: Callable[[Server], Awaitable[T]]) -> T:
        """What `send` returns for an endpoint that lives; it is tried again elsewhere if it raises one of FAULTS.

        Raises EngineDied if `ATTEMPTS` failed, or no endpoint lived for `PATIENCE` seconds.
        """
        if self._loop is not asyncio.get_running_loop():
            self._start()
        for attempt in range(ATTEMPTS):
            server, place = await self._take()
            try:
                return await send(server)
            except FAULTS as error:
                self._leave_out(server, error)
                last = f"{server.url}: {first_line(error)}"
            finally:
                self._give(server, place)
            await asyncio.sleep(_pause(attempt))
        raise EngineDied(f"engine.servers: {ATTEMPTS} attempts at one request failed, the last at {last}")

    def _start(self) -> None:
        """In a new event loop all endpoints are unknown. The watchers end with the loop, and close the connections."""
        self._loop, self._lived, self._over = asyncio.get_running_loop(), time.monotonic(), ""
        # the lowest places first, so that all endpoints are equally full
        self._offered: asyncio.PriorityQueue[tuple[int, int]] = asyncio.PriorityQueue()
        faults = {server.url: server.fault for server in self.servers}
        self.servers = [Server(url, list(range(self._max_running)), fault=faults.get(url)) for url in self._urls]
        self._watchers = [asyncio.ensure_future(self._watch(server)) for server in self.servers]

    async def _take(self) -> tuple[Server, int]:
        while True:
            place, number = await self._offered.get()
            if number < 0:
                self._offered.put_nowait((place, number))  # for the next that waits
                raise UserError(self._over)
            server = self.servers[number]
            if server.lives:
                return server, place
            server.places.append(place)

    def _give(self, server: Server, place: int) -> None:
        if server.lives:
            self._offered.put_nowait((place, self.servers.index(server)))
        else:
            server.places.append(place)

    async def _watch(self, server: Server) -> None:
        try:
            while True:
                server.session = server.session or session()
                server.again.clear()
                try:
                    await (self._look(server) if server.lives else self.admit(server))
                except Exception as error:  # of an answer that makes no sense too: unwatched, a server is never used
                    self._leave_out(server, error)
                    await server.session.close()  # what still waits for its answer is asked elsewhere
                    server.session = None
                self._judge()
                with suppress(TimeoutError):
                    async with asyncio.timeout(EVERY):
                        await server.again.wait()
        finally:
            if server.session is not None:
                await server.session.close()

    async def _look(self, server: Server) -> None:
        async with server.session.get(f"{server.url}/health", timeout=aiohttp.ClientTimeout(ANSWER)) as response:
            if response.status != 200:
                raise Fault(f"its health is {response.status}")

    async def admit(self, server: Server) -> None:
        """Check what `server` serves, load the adapters, and offer its places. Raises FAULTS."""
        answer = await server.get("/v1/models")
        try:
            models = {card["id"]: card for card in answer["data"]}
        except (KeyError, TypeError):
            raise Refused("is no server of vLLM") from None
        server.base = next((name for name, card in models.items() if is_base(card, self.base)), "")
        if not server.base:
            raise Refused(
                f"serves {', '.join(models)}, not {self.base}; if it does, add --served-model-name {self.base}"
            )
        if (longest := models[server.base].get("max_model_len") or 0) < self.max_model_len:
            raise Refused(
                f"takes {longest} tokens, engine.max_model_len is {self.max_model_len}:"
                f" start it with --max-model-len {self.max_model_len}"
            )
        for name, path in self.adapters.items():
            if name not in models:
                await load(server, name, path)
        if server.fault and not isinstance(server.fault, Missing):
            log.warning("engine.servers: %s is used again", server.url)
        server.lives, server.fault = True, None
        while server.places:
            self._give(server, server.places.pop())

    def _leave_out(self, server: Server, error: Exception) -> None:
        if isinstance(error, Missing):
            server.again.set()
        elif server.lives or server.fault is None:
            log.warning("engine.servers: %s is left out: %s", server.url, first_line(error))
        server.lives, server.fault = False, error

    def _judge(self) -> None:
        """End the requests that wait if no endpoint can be hoped for."""
        if any(server.lives for server in self.servers):
            self._lived = time.monotonic()
        elif not self._over and (
            time.monotonic() - self._lived > PATIENCE
            or all(isinstance(server.fault, Refused) for server in self.servers)
        ):
            faults = "; ".join(f"{s.url}: {first_line(s.fault)}" for s in self.servers if s.fault)
            self._over = f"engine.servers: none can be used: {faults}"
            self._offered.put_nowait((-1, -1))

    async def unload(self) -> None:
        """Unload the adapters from the servers that lived at last."""
        await asyncio.gather(*(self._unload(server) for server in self.servers if server.lives))

    async def _unload(self, server: Server) -> None:
        async with session() as server.session:
            try:
                for name in self.adapters:
                    await server.post("/v1/unload_lora_adapter", {"lora_name": name}, ANSWER)
            except FAULTS as error:
                log.warning("engine.servers: %s keeps adapters of the run: %s", server.url, first_line(error))


def session() -> aiohttp.ClientSession:
    """Connections of the running event loop to one endpoint, as many as there are requests."""
    key = os.environ.get(KEY)
    return aiohttp.ClientSession(
        # vLLM closes a connection that was idle for 5 s, and a request may cross that
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=ANSWER, sock_read=SILENT),
        headers={"Authorization": f"Bearer {key}"} if key else None,
        read_bufsize=1 << 20,  # of a line: the first of a stream holds the prompt
    )


async def read(response: aiohttp.ClientResponse) -> Any:
    """The JSON of an answer. Raises Missing, Refused, Fault, and EngineDied for a request that no server would take."""
    text = await response.text()
    if response.status == 200:
        return parse(text)
    said = f"{response.status}: {message(text)}"
    match response.status:
        case 404:
            raise Missing(said)
        case 401 | 403:
            raise Refused(f"{said}; set {KEY} to the server's --api-key")
        case 400 | 413 | 422:
            raise EngineDied(f"engine.servers: {response.url} refuses a request: {said}")
    raise Fault(said)


def parse(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise Fault(f"no JSON: {text[:100]!r}") from None


def message(text: str) -> str:
    """The first line of what a server says in an error."""
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return (text.strip().splitlines() or [""])[0][:300]


def is_base(card: Mapping[str, Any], base: str) -> bool:
    """Whether an entry of /v1/models is the model `base`: by its path, or by its name on the Hub."""
    names = {card["id"], card.get("root")} - {None}
    return bool(names & {base, str(Path(base).resolve()), name_of(base)}) and not card.get("parent")


async def load(server: Server, name: str, path: str) -> None:
    """Load an adapter; no fault if another process did. Raises FAULTS."""
    status, text = await server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, LOADED)
    if status == 200 or "already been loaded" in text:
        return
    if "error" not in text:  # vLLM has no such address then
        raise Refused(f"takes no adapters: start it with {ADAPTERS}")
    raise Refused(f"does not load {path}: {message(text)}; it must see this path, and --max-lora-rank allow its rank")


async def check_adapters(server: Server) -> None:
    """Raises Refused if `server` loads no adapters. It is asked for one that does not exist."""
    try:
        await load(server, "flywheel-preflight", "/flywheel/preflight")
    except Refused as error:
        if ADAPTERS in str(error) or "not enabled" in str(error):
            raise Refused(f"takes no adapters: start it with {ADAPTERS}") from None


def adapter_name(name: str, path: str) -> str:
    """A name for an adapter by its content: two never share a name, nor what a server has cached under it."""
    adapter_config(path)
    digest = hashlib.sha256()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        with open(Path(path) / file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"{name}-{digest.hexdigest()[:12]}"


def _pause(attempt: int) -> float:
    """Seconds to wait after the attempt: doubled each time, at most 30, and never the same for two requests."""
    return min(30.0, 0.5 * 2**attempt) * random.uniform(0.5, 1.5)
