"""The server as clients meet it: OpenAI's own client and plain HTTP, over a scripted device."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import uvicorn
from say import SAMPLES, TOKENIZER, VALUES, Bench, Say

from flywheel.models.driver import Output
from flywheel.models.engine import Sampling
from flywheel.records import Finish
from flywheel.serving.server import MAX_BODY, Service, app
from flywheel.serving.solver import Solver

NAME = "chain-1"


@contextmanager
def serving(bench: Bench, queue: int = 256, key: str | None = None, plan=None) -> Iterator[tuple[str, Service]]:
    """(base URL, service) of a server in a thread."""
    service = Service(Solver(bench.searcher, plan, (0.5,), 2), NAME, 4, queue, key)
    server = uvicorn.Server(uvicorn.Config(app(service), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=bench.driver.serve, args=(server.serve(),))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", service
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def ask(url: str, question: str = "5 +3 *2", **extra):
    message = [{"role": "user", "content": question}]
    return client(url).chat.completions.create(model=NAME, messages=message, **extra)


def charged(bench: Bench) -> int:
    return sum(row["prompt"] + row["generated"] + row["scored"] for row in bench.ledger.rows())


def test_a_chat_completion_holds_the_selected_solution_and_the_whole_bill():
    bench = Bench(SAMPLES, VALUES)
    with serving(bench) as (url, _):
        done = ask(url, extra_body={"strategy": "best_of_n:3"})
        assert done.choices[0].message.content == SAMPLES[0] and done.choices[0].finish_reason == "stop"
        assert done.flywheel["answer"] == "16" and done.flywheel["strategy"] == "best_of_n:3:weighted"
        kinds = [done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.scored_tokens]
        assert min(kinds) > 0 and sum(kinds) == done.usage.total_tokens == charged(bench)
        assert [model.id for model in client(url).models.list()] == [NAME]
        text = client(url).completions.create(model=NAME, prompt="5 +3 *2", temperature=0)
        assert text.choices[0].text.strip() == SAMPLES[3].strip() and text.flywheel["strategy"] == "greedy:policy"


def test_a_streamed_answer_is_the_same_text_and_ends_with_the_bill():
    bench = Bench(SAMPLES[:1], VALUES)
    with serving(bench) as (url, _):
        parts = list(ask(url, stream=True, extra_body={"strategy": "best_of_n:2"}))
        assert "".join(part.choices[0].delta.content or "" for part in parts) == SAMPLES[0]
        assert parts[-1].choices[0].finish_reason == "stop" and parts[-1].usage.total_tokens == charged(bench)


class OneByOne(Say):
    """Makes a completion one token a step, and waits before the token that `client` has yet to ask for."""

    heard = threading.Event()

    def submit(self, prompt, ask, adapter):
        future = super().submit(prompt, ask, adapter)
        whole = self.waiting.pop()[1]
        self.made = [(future, ask, whole, 0)]
        return future

    @property
    def sequences(self) -> int:
        return sum(not future.done() for future, *_ in getattr(self, "made", []))

    def step(self) -> bool:
        [(future, ask, whole, count)] = self.made
        if count == 10:
            assert self.heard.wait(10), "the first step was not sent while the answer was made"
        self.made = [(future, ask, whole, count + 1)]
        if count + 1 == len(whole.tokens):
            future.set_result(whole)
        else:
            ask.done(whole.tokens[: count + 1])
        return True


def test_a_greedy_answer_is_streamed_step_by_step_while_it_is_made():
    bench = Bench([SAMPLES[3]], device=OneByOne)
    OneByOne.heard.clear()
    with serving(bench) as (url, _):
        parts = ask(url, stream=True, temperature=0)
        first = next(iter(parts)).choices[0].delta.content
        assert first == SAMPLES[3].splitlines(keepends=True)[0]
        OneByOne.heard.set()
        rest = list(parts)
    assert first + "".join(part.choices[0].delta.content or "" for part in rest) == SAMPLES[3].strip()
    assert rest[-1].usage.total_tokens == charged(bench) and rest[-1].choices[0].finish_reason == "stop"


class Echo(Say):
    """Answers with the first number of the question, after a step."""

    def submit(self, prompt, ask, adapter):
        number = TOKENIZER.decode(list(prompt)).split()[1]
        if isinstance(ask, Sampling):
            drawn = self.drawn(f"Answer {number}", ask)
        else:
            drawn = Output((), Finish.LENGTH, False, values=(0.5,) * len(ask.reads))
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((future, drawn))
        return future


def test_two_hundred_requests_at_once_get_their_own_answers_and_the_bills_add_up():
    bench = Bench(device=Echo)
    names = ("auto", "greedy", "best_of_n:4", "beam:4:width=2", "adaptive:4", "revise:4")
    asked = [(str(i % 40), names[i % len(names)]) for i in range(200)]

    def one(item: tuple[str, str]) -> tuple[str, str, int]:
        done = ask(url, f"{item[0]} +3", extra_body={"strategy": item[1]})
        return item[0], done.flywheel["answer"], done.usage.total_tokens

    with serving(bench) as (url, service), ThreadPoolExecutor(50) as pool:
        found = list(pool.map(one, asked))
        metrics = httpx.get(f"{url}/metrics").text
    assert len(found) == 200 and [(number, answer) for number, answer, _ in found if number != answer] == []
    assert sum(tokens for *_, tokens in found) == charged(bench) > 0
    assert 'flywheel_requests_total{status="200"} 200.0' in metrics and service.under_way == 0


@pytest.mark.parametrize(
    "body, status, said",
    [
        (b"{", 400, "Invalid JSON"),
        ({}, 400, "model: Field required"),
        ({"model": "gpt", "messages": [{"role": "user", "content": "1"}]}, 404, "chain-1 is"),
        ({"model": NAME}, 400, "messages: missing"),
        ({"model": NAME, "messages": []}, 400, "one message of the user"),
        ({"model": NAME, "messages": [{"role": "user", "content": " "}]}, 400, "the question is empty"),
        ({"budget": 0}, 400, "budget: Input should be greater than 0"),
        ({"budget": 5000}, 400, "5000 generations are more than 1024"),
        ({"strategy": "best_of_n:99999"}, 400, "99999 generations are more than 1024"),
        ({"strategy": "revise:2000:chains=100"}, 400, "2000 generations are more than 1024"),
        ({"strategy": "beam:2000:lookahead=1"}, 400, "2000 generations are more than 1024"),
        ({"prompt": "5 +3"}, 400, "only one of them is wanted"),
        ({"messages": [{"role": "user", "content": "5", "tool_calls": []}]}, 400, "Extra inputs"),
        ({"n": 2}, 400, "n: Input should be 1"),
        ({"top_p": 0.5}, 400, "top_p: Extra inputs are not permitted"),
        ({"strategy": "beem:4"}, 400, "did you mean beam?"),
        ({"temperature": 0.5}, 400, "the plan chooses it"),
        ({"temperature": 0, "strategy": "best_of_n:4"}, 400, "0 is the greedy answer"),
        ({"messages": [{"role": "user", "content": "1 " * 500}]}, 400, "do not fit engine.max_model_len"),
        ({"messages": [{"role": "user", "content": "two and two"}]}, 400, "tokenizer cannot write"),
        (b" " * (MAX_BODY + 1), 413, "more than 1,048,576 bytes"),
    ],
)
def test_a_bad_request_gets_one_clear_error_and_the_server_lives(body, status, said):
    whole = {"model": NAME, "messages": [{"role": "user", "content": "5 +3 *2"}]}
    if isinstance(body, dict) and body and not body.keys() & {"model"}:
        body = {**whole, **body}
    with serving(Bench(SAMPLES, VALUES)) as (url, _):
        content = body if isinstance(body, bytes) else json.dumps(body)
        got = httpx.post(f"{url}/v1/chat/completions", content=content)
        assert got.status_code == status and said in got.json()["error"]["message"], got.text
        assert ask(url).flywheel["answer"] == "16" and httpx.get(f"{url}/health").json()["under_way"] == 0


def test_a_key_is_asked_for_where_there_is_one():
    with serving(Bench(SAMPLES, VALUES), key="secret") as (url, _):
        with pytest.raises(openai.AuthenticationError):
            client(url, "wrong").models.list()
        assert [model.id for model in client(url, "secret").models.list()] == [NAME]


class Slow:
    """A device whose sequences end only when `go` is set."""

    def __init__(self, device, go: threading.Event):
        self.device, self.go, self.cancelled = device, go, 0
        self.one_pass, self.tokens = True, 0

    def submit(self, *request):
        return self.device.submit(*request)

    @property
    def sequences(self) -> int:
        return self.device.sequences

    def step(self) -> bool:
        if not self.go.is_set():
            time.sleep(0.005)
            kept = [item for item in self.device.waiting if not item[0].cancelled()]
            self.cancelled += len(self.device.waiting) - len(kept)
            self.device.waiting = kept
        else:
            self.device.step()
        return True

    def close(self) -> None:
        self.device.close()


@contextmanager
def slow(**options) -> Iterator[tuple[str, Service, Slow, threading.Event]]:
    from dataclasses import replace

    go, bench = threading.Event(), Bench(SAMPLES, VALUES)
    device = Slow(bench.devices["policy"], go)
    bench.searcher = replace(bench.searcher, policy=replace(bench.searcher.policy, device=device))
    bench.driver._devices[0] = device
    with serving(bench, **options) as (url, service):
        try:
            yield url, service, device, go
        finally:
            go.set()


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_that_goes_away_has_its_search_cancelled():
    with slow() as (url, service, device, _):
        with pytest.raises(httpx.ReadTimeout):
            body = {"model": NAME, "messages": [{"role": "user", "content": "5 +3 *2"}], "strategy": "best_of_n:4"}
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.5)
        wait_for(lambda: service.under_way == 0)
        wait_for(lambda: device.cancelled == 4)


def test_a_full_queue_is_429_and_health_answers_while_a_search_runs():
    with slow(queue=1) as (url, service, _, go), ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, url)
        wait_for(lambda: service.under_way == 1)
        with pytest.raises(openai.RateLimitError, match="1 requests are under way"):
            ask(url)
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "under_way": 1}
        go.set()
        assert first.result(timeout=20).flywheel["answer"] == "16"
