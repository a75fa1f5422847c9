"""Models on servers: what is asked and billed, and that nothing is lost when they fault, die, freeze and return."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from pathlib import Path

import pytest

from flywheel.errors import EngineDied, UserError
from flywheel.ledger import Ledger
from flywheel.models import endpoints, remote
from flywheel.models.driver import Backend, ServedModel
from flywheel.models.endpoints import Endpoints
from flywheel.models.engine import Sampling
from flywheel.recipe import EngineSpec, RecipeError, load
from flywheel.records import Finish
from flywheel.runs.manifest import recipe_leaves
from tests.fake_vllm import LENGTH, FakeVllm, logprobs, token

PROMPTS = [[3, 13 + i, 11, 20 + i] for i in range(40)]
LABELS = (9, 10)
CHAIN = Path(__file__).parents[2] / "recipes" / "chain.yaml"


@pytest.fixture
def start(monkeypatch):
    """Starts fake servers, which end with the test."""
    monkeypatch.setattr(endpoints, "EVERY", 0.05)
    monkeypatch.setattr(endpoints, "_pause", lambda attempt: 0.01)
    started = []

    def one(**options) -> FakeVllm:
        started.append(FakeVllm(**options))
        return started[-1]

    yield one
    for server in started:
        server.frozen = False
        server.kill()


def opened(*servers: FakeVllm, adapters: dict[str, str] | None = None, most: int = 4, seed: int = 0):
    """(backend, ledger) with a base, and one more role for each adapter."""
    places = Endpoints([server.url for server in servers], "base", adapters or {}, most, 128)
    device, ledger = remote.RemoteDevice(places), Ledger("test", 1)
    engines = {role: ServedModel(role, role, 100, 128, device, ledger, role, seed=seed) for role in adapters or {}}
    engines["policy"] = ServedModel("policy", "policy_0", 100, 128, device, ledger, seed=seed)
    return Backend(engines, [device]), ledger


def draw(backend, role="policy", prompts=PROMPTS, n=1, **options):
    sampling = Sampling(**{"max_tokens": 20, "temperature": 0.0, **options})
    engine = backend.engine(role)
    return backend.run(prompts, lambda prompt: engine.generate(prompt, sampling, purpose="sample", n=n))


def answer(prompt, model="base", seed=None) -> tuple[int, ...]:
    return tuple(token(model, prompt, seed, k) for k in range(LENGTH))


def after_three(tokens) -> bool:
    return len(tokens) == 3


# ---- answers and bills ---------------------------------------------------------------


def test_an_answer_ends_as_in_process(start):
    backend, _ = opened(start())
    for [done], prompt in zip(draw(backend), PROMPTS):
        assert (done.tokens, done.finish, done.eos) == (answer(prompt), Finish.STOP, True)
    for [done], prompt in zip(draw(backend, max_tokens=5), PROMPTS):
        assert (done.tokens, done.finish, done.eos) == (answer(prompt)[:5], Finish.LENGTH, False)
    for [done], prompt in zip(draw(backend, stop=frozenset(range(30, 40))), PROMPTS):
        end = next((k for k, one in enumerate(answer(prompt)) if one in range(30, 40)), None)
        assert (done.tokens, done.eos) == (answer(prompt)[: LENGTH if end is None else end + 1], end is None)
    for [done], prompt in zip(draw(backend, done=after_three), PROMPTS):
        assert (done.tokens, done.finish, done.eos) == (answer(prompt)[:3], Finish.STOP, False)
    for [done], prompt in zip(draw(backend, done=lambda tokens: False), PROMPTS):
        assert (done.tokens, done.finish, done.eos) == (answer(prompt), Finish.STOP, True)


def test_a_value_is_of_the_two_labels_alone(start):
    backend, ledger = opened(start())
    reads = [1, 3, 4]
    score = backend.engine("policy").score
    found = backend.run(PROMPTS, lambda prompt: score(prompt, reads, LABELS, purpose="verify"))
    for prompt, values in zip(PROMPTS, found):
        every = [logprobs("base", prompt[:read]) for read in reads]
        right = [math.exp(one[9]) / (math.exp(one[9]) + math.exp(one[10])) for one in every]
        assert values == pytest.approx(right)
    [row] = ledger.rows()
    assert (row["scored"], row["generated"]) == (len(PROMPTS) * sum(reads), len(PROMPTS) * len(reads))


def test_what_the_servers_bill_is_in_the_ledger(start):
    servers = start(), start()
    backend, ledger = opened(*servers)
    draw(backend, n=3, temperature=1.0)
    [row] = ledger.take()
    billed = servers[0].billed + servers[1].billed
    assert (row["prompt"], row["generated"]) == (billed["prompt"], billed["generated"]) == (3 * 160, 3 * 40 * 13)
    assert row["cached"] == row["prompt"] / 2
    draw(backend, done=after_three)
    [row] = ledger.take()
    assert row["generated"] == len(PROMPTS) * remote.PART  # the part that the end was in, with what came after the end


def test_a_bill_that_does_not_fit_ends_the_run(start):
    server = start()
    server.faults = ["bill"]
    backend, ledger = opened(server)
    with pytest.raises(EngineDied, match=r"bills \(1000, 13\) prompt and generated tokens where \(4, 13\) are seen"):
        draw(backend, prompts=PROMPTS[:1])
    assert ledger.tokens() == 0


def test_every_draw_has_its_own_seed_and_keeps_it_in_another_process(start):
    server = start()
    seeds = []
    for seed in (1, 1, 2):
        server.asked.clear()
        backend, _ = opened(server, seed=seed)
        drawn = draw(backend, n=8, prompts=PROMPTS[:5], temperature=1.0)
        draw(backend, n=8, prompts=PROMPTS[:5], temperature=1.0)
        assert len({done.tokens for group in drawn for done in group}) > 10
        seeds.append({body["seed"] for body in server.asked})
    assert len(seeds[0]) == 80 and seeds[0] == seeds[1] and not seeds[0] & seeds[2]


def test_servers_are_equally_full(start):
    servers = start(), start(), start()
    for server in servers:
        server.seconds = 0.05
    backend, _ = opened(*servers, most=5)
    engine = backend.engine("policy")

    async def ask(prompts):
        await asyncio.gather(*(engine.generate(prompt, Sampling(9), purpose="sample") for prompt in prompts))

    async def main():
        while not all(server.asked for server in servers):  # until all are known
            await ask(PROMPTS[:15])
        before = [len(server.asked) for server in servers]
        await ask(PROMPTS[:12])
        return [len(server.asked) - count for server, count in zip(servers, before)]

    assert backend.serve(main()) == [4, 4, 4]


# ---- faults --------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["reset", "503", "500", "429", "cut", "error"])
def test_what_one_server_drops_another_answers(start, fault):
    servers = start(), start()
    servers[0].faults = [fault] * 5
    backend, ledger = opened(*servers)
    done = lambda tokens: False  # noqa: E731  asks for a stream
    for [drawn], prompt in zip(draw(backend, done=done), PROMPTS):
        assert drawn.tokens == answer(prompt)
    assert not servers[0].faults
    [row] = ledger.rows()
    assert (row["prompt"], row["generated"]) == (160, 40 * 13)  # an answer is charged once
    assert sum(len(server.asked) for server in servers) == 45


def test_a_server_that_dies_is_left_out_and_used_again_when_it_returns(start, tmp_path):
    one, other = start(), start()
    one.seconds = other.seconds = 0.01
    backend, ledger = opened(one, other, adapters={"reviser": "/run/reviser"})

    def die_and_return():
        while len(one.asked) < 20:
            time.sleep(0.001)
        one.kill()
        time.sleep(0.3)
        one.asked.clear()
        one.start()

    thread = threading.Thread(target=die_and_return)
    thread.start()
    prompts = PROMPTS * 30
    found = draw(backend, "reviser", prompts=prompts)
    thread.join()
    assert [drawn.tokens for [drawn] in found] == [answer(prompt, "reviser") for prompt in prompts]
    assert len(one.asked) > 20 and one.ever_loaded == ["reviser"] * 2  # it had forgotten the adapter
    [row] = ledger.rows()
    assert row["generated"] == len(prompts) * 13


def test_requests_to_a_server_that_freezes_go_elsewhere(start, monkeypatch):
    monkeypatch.setattr(endpoints, "ANSWER", 0.2)
    one, other = start(), start()
    backend, _ = opened(one, other)
    draw(backend)

    async def freeze(prompt):
        one.frozen = True
        return await backend.engine("policy").generate(prompt, Sampling(20, 0.0), purpose="sample")

    begun = time.monotonic()
    found = backend.run(PROMPTS, freeze)
    assert [drawn.tokens for [drawn] in found] == [answer(prompt) for prompt in PROMPTS]
    assert time.monotonic() - begun < 5


def test_a_run_without_any_server_ends_with_one_line(start, monkeypatch):
    monkeypatch.setattr(endpoints, "PATIENCE", 0.3)
    one, other = start(), start()
    backend, ledger = opened(one, other)
    draw(backend)
    one.kill(), other.kill()
    with pytest.raises(UserError, match=f"none can be used: {one.url}: .*; {other.url}: ") as error:
        draw(backend)
    assert "\n" not in str(error.value)
    one.start(), other.start()
    assert len(draw(backend)) == len(PROMPTS)  # the next run asks again


def test_a_request_that_no_server_takes_is_not_sent_for_ever(start):
    one = start()
    one.faults = ["400"]
    backend, _ = opened(one)
    with pytest.raises(EngineDied, match="/v1/completions refuses a request: 400: not now"):
        draw(backend, prompts=PROMPTS[:1])
    one.faults = ["500"] * endpoints.ATTEMPTS
    with pytest.raises(EngineDied, match=f"{endpoints.ATTEMPTS} attempts .* the last at {one.url}: 500: not now"):
        draw(backend, prompts=PROMPTS[:1])


def test_an_error_in_a_strategy_closes_its_requests(start):
    server = start()
    server.seconds = 0.05
    backend, _ = opened(server)

    async def work(i):
        await backend.engine("policy").generate(PROMPTS[i], Sampling(20, 0.0), purpose="sample")
        raise KeyError("a fault of the strategy")

    with pytest.raises(KeyError, match="a fault of the strategy"):
        backend.run(range(40), work)
    time.sleep(0.1)
    assert len(server.asked) < 12 and len(draw(backend)) == 40


# ---- adapters ------------------------------------------------------------------------


def test_adapters_are_loaded_unloaded_and_loaded_again_if_another_process_unloads_them(start):
    server = start()
    backend, _ = opened(server, adapters={"prm": "/run/prm", "reviser": "/run/reviser"})

    async def main():
        for role in ("prm", "reviser", "prm"):
            engine = backend.engine(role)
            asked = (engine.generate(prompt, Sampling(20, 0.0), purpose="sample") for prompt in PROMPTS)
            assert [done.tokens for [done] in await asyncio.gather(*asked)] == [answer(p, role) for p in PROMPTS]
            server.adapters.pop("prm", None)

    backend.serve(main())
    assert server.ever_loaded == ["prm", "reviser", "prm"]
    assert [drawn.tokens for [drawn] in draw(backend)] == [answer(prompt) for prompt in PROMPTS]  # the base
    backend.close()
    assert not server.adapters


def test_an_adapter_s_name_is_its_content(tmp_path):
    for folder, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter_config.json").write_text("{}")
        (tmp_path / folder / "adapter_model.safetensors").write_bytes(content)
    a, b, c = (endpoints.adapter_name("prm_1", str(tmp_path / folder)) for folder in "abc")
    assert a == b != c and a.startswith("prm_1-")


# ---- before the run ------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"base": "other"}, "serves other, not base"),
        ({"max_model_len": 64}, "takes 64 tokens, engine.max_model_len is 128: start it with --max-model-len 128"),
        ({"lora": "none"}, "takes no adapters: start it with --enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ({"lora": "disabled"}, "takes no adapters: start it with --enable-lora"),
        ({"old": True}, "answers unlike vLLM 0.32: KeyError"),
    ],
)
def test_a_server_that_does_not_fit_is_named_before_the_run(start, options, complaint):
    right, wrong = start(), start(**options)
    spec = EngineSpec(kind="server", servers=[right.url, wrong.url], max_model_len=128)
    with pytest.raises(UserError, match=f"^engine.servers: {wrong.url}: {complaint}"):
        remote.preflight(spec, ["base"])
    remote.preflight(spec.model_copy(update={"servers": [right.url]}), ["base"])


def test_every_faulty_server_is_named(start, capsys):
    gone, locked, other = start(), start(), start(base="prm")
    gone.kill()
    locked.key = "secret"
    spec = EngineSpec(kind="server", servers=[gone.url, locked.url, other.url], max_model_len=128)
    with pytest.raises(UserError, match="engine.servers: 3 faults, see above"):
        remote.preflight(spec, ["base", "prm"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].startswith(f"engine.servers: {gone.url}: Cannot connect")
    assert "VLLM_API_KEY" in lines[1] and lines[2] == "engine.servers: none of them serves base"
    gone.start()


def test_a_key_is_taken_from_the_environment(start, monkeypatch):
    server = start()
    server.key = "secret"
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert len(draw(opened(server)[0])) == len(PROMPTS)


@pytest.mark.parametrize(
    "overrides, complaint",
    [
        (["engine.kind=server"], "engine.servers: the addresses"),
        (["engine.servers=[http://a:1]"], "engine.servers: the addresses"),
        (["engine.kind=server", "engine.servers=[http://a:1/v1]"], "engine.servers.0"),
        (["engine.kind=server", "engine.servers=[http://a:1]", "engine.adapters=merged"], "engine.adapters: a server"),
    ],
)
def test_a_recipe_that_contradicts_itself_about_servers(overrides, complaint):
    with pytest.raises(RecipeError, match=complaint):
        load(CHAIN, overrides)


def test_servers_may_move_during_a_run():
    recipes = (load(CHAIN, ["engine.kind=server", f"engine.servers=[http://{a}:1]"]) for a in "ab")
    one, other = (recipe_leaves(recipe, ["engine"]) for recipe in recipes)
    assert one == other and one["engine.kind"] == "server"
