"""Engines: what is sampled, scored and charged. vLLM and transformers on a real micro model."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from copy import copy
from dataclasses import replace

import pytest
import torch

from flywheel.errors import EngineDied, TooLong
from flywheel.ledger import Ledger, total
from flywheel.models.driver import Driver, drive
from flywheel.models.engine import Sampling
from flywheel.models.weights import NotAModel, load_merged, load_tokenizer, open_backend, parameters
from flywheel.recipe import EngineSpec
from flywheel.records import Finish, ModelRef, Role
from flywheel.training.scores import forward_values
from tests import micro

PROMPTS = [[3, 13 + i, 11, 20 + i, 4, 2, 5, *range(30, 30 + 3 * i)] for i in range(6)]
LABELS = (9, 10)
SCRIPTED = "tests.scripted:open_backend"
SPEC = {"dtype": "float32", "max_model_len": 128, "kv_cache_mb": 16, "max_running": 64}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("micro")
    base = micro.model(folder / "base")
    return base, micro.adapter(base, folder / "adapter")


@pytest.fixture(scope="module")
def models(weights):
    base, adapter = weights
    prm = ModelRef("prm_1", base, adapter)
    return {
        Role.POLICY: ModelRef("policy_0", base),
        Role.PRM: prm,
        "base": ModelRef("policy_0", base),
        "judge": replace(prm, name="judge_1", labels=LABELS),
    }


@pytest.fixture(scope="module")
def opened(models, tmp_path_factory):
    ledger = Ledger("test", 1)
    backend = open_backend(EngineSpec(**SPEC), models, ledger, 7, tmp_path_factory.mktemp("scratch"))
    yield backend, ledger
    backend.close()


@pytest.fixture
def vllm(opened):
    backend, ledger = opened
    ledger.take()
    return backend, ledger


def results(backend, items, work):
    items = list(items)
    return dict(zip(items, backend.run(items, work)))


def reference(weights, adapted: bool):
    """The model loaded by transformers and PEFT themselves."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter = weights
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, adapter) if adapted else model).eval()


@torch.no_grad()
def next_logits(model, prompt):
    return model(torch.tensor([prompt])).logits[0, -1]


def greedy(model, prompt, count):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] != micro.EOS):
        tokens.append(int(next_logits(model, tokens).argmax()))
    return tuple(tokens[len(prompt) :])


# ---- what the model says -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vllm"])
@pytest.mark.parametrize("role", [Role.POLICY, Role.PRM])
def test_greedy_is_the_model_s_own(kind, role, weights, request):
    backend, _ = request.getfixturevalue(kind)
    engine = backend.engine(role)

    async def work(i):
        return await engine.generate(PROMPTS[i], Sampling(12, temperature=0.0), purpose="greedy")

    model = reference(weights, role == Role.PRM)
    for i, [done] in results(backend, range(6), work).items():
        expected = greedy(model, PROMPTS[i], 12)
        assert done.eos == (expected[-1] == micro.EOS)
        assert done.tokens == (expected[:-1] if done.eos else expected)


@pytest.mark.parametrize("kind", ["vllm"])
def test_scores_with_a_merged_adapter_equal_peft_s(kind, weights, request):
    backend, _ = request.getfixturevalue(kind)

    async def work(i):
        reads = [*range(1, len(PROMPTS[i]), 3), len(PROMPTS[i])]
        return [
            await backend.engine(role).score(PROMPTS[i], reads, LABELS, purpose="check")
            for role in ("judge", Role.PRM, "base")
        ]

    found = results(backend, range(6), work)
    for k, adapted in enumerate(
        (True, True, False)
    ):  # by a classifier in one pass, and by a token generated for each read
        model = reference(weights, adapted)
        for i, prompt in enumerate(PROMPTS):
            reads = [*range(1, len(prompt), 3), len(prompt)]
            expected = [next_logits(model, prompt[:read])[list(LABELS)].softmax(-1)[0].item() for read in reads]
            assert found[i][k] == pytest.approx(expected, abs=1e-4)
    assert any(abs(adapted[-1] - bare[-1]) > 0.05 for _, adapted, bare in found.values())  # the adapter is not lost


@pytest.mark.parametrize("kind", ["vllm"])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_samples_follow_the_model_s_distribution(kind, top_p, weights, request):
    backend, _ = request.getfixturevalue(kind)
    n = 3000

    async def work(i):
        return await backend.engine(Role.POLICY).generate(PROMPTS[i], Sampling(1, 1.0, top_p), purpose="sample", n=n)

    counts = Counter(done.tokens[0] if done.tokens else micro.EOS for done in results(backend, [2], work)[2])
    probability = next_logits(reference(weights, False), PROMPTS[2]).softmax(-1)
    order = probability.argsort(descending=True)
    before = probability[order].cumsum(0) - probability[order]
    probability[order[before >= top_p]] = 0
    probability /= probability.sum()
    share = torch.tensor([counts[token] / n for token in range(len(micro.WORDS))])
    assert (share - probability).abs().sum() / 2 < 0.06  # total variation; about 0.03 is chance
    assert not share[probability == 0].any()


@pytest.mark.parametrize("kind", ["vllm"])
def test_a_completion_keeps_its_stop_token_and_never_shows_eos(kind, request):
    backend, ledger = request.getfixturevalue(kind)
    stop = frozenset({20, 21, 22, 23})

    async def work(i):
        return await backend.engine(Role.POLICY).generate(
            PROMPTS[i], Sampling(16, 1.0, stop=stop), purpose="sample", n=40
        )

    done = [one for group in results(backend, range(6), work).values() for one in group]
    for one in done:
        assert micro.EOS not in one.tokens and not stop & set(one.tokens[:-1])
        assert one.finish is (Finish.STOP if one.eos or one.tokens[-1] in stop else Finish.LENGTH)
        assert one.finish is Finish.STOP or len(one.tokens) == 16
        assert not (one.eos and one.tokens and one.tokens[-1] in stop)
    kinds = Counter((one.eos, one.finish) for one in done)
    assert set(kinds) == {(True, Finish.STOP), (False, Finish.STOP), (False, Finish.LENGTH)}
    [row] = ledger.rows()
    assert row["generated"] == sum(len(one.tokens) + one.eos for one in done)


@pytest.mark.parametrize("kind", ["vllm"])
def test_what_does_not_fit_raises_and_is_not_cut(kind, request):
    backend, ledger = request.getfixturevalue(kind)
    engine = backend.engine(Role.POLICY)
    long = [13 + i % 40 for i in range(100)]

    async def fits(_):
        [done] = await engine.generate(long, Sampling(28), purpose="x")
        return len(done.tokens)

    async def too_long(_):
        await engine.generate(long, Sampling(29), purpose="x")

    async def too_long_to_score(_):
        await engine.score(long + long[:28], [128], LABELS, purpose="x")

    async def twice_the_same(_):
        await engine.generate(long, Sampling(5, temperature=0.0), purpose="x", n=2)

    assert 0 <= results(backend, [0], fits)[0] <= 28
    charged = ledger.tokens()
    with pytest.raises(TooLong, match="prompt of 100 tokens and 29 to generate.*128"):
        results(backend, [0], too_long)
    with pytest.raises(TooLong, match="128 tokens and 1 to generate"):
        results(backend, [0], too_long_to_score)
    with pytest.raises(ValueError, match="temperature 0"):
        results(backend, [0], twice_the_same)
    assert ledger.tokens() == charged


# ---- the loop and the ledger ---------------------------------------------------------


def test_dependent_calls_over_two_engines_interleave(vllm):
    backend, ledger = vllm
    policy, prm = backend.engine(Role.POLICY), backend.engine(Role.PRM)
    log = []

    async def work(i):
        tokens = list(PROMPTS[i])
        for step in range(3):
            drawn = await policy.generate(tokens, Sampling(4), purpose="beam", n=3)
            values = await asyncio.gather(
                *(
                    prm.score([*tokens, *one.tokens], [len(tokens) + len(one.tokens)], LABELS, purpose="judge")
                    for one in drawn
                )
            )
            best = max(range(3), key=values.__getitem__)
            tokens += drawn[best].tokens
            log.append((i, step))
        return tokens

    found = results(backend, range(6), work)
    assert all(found[i][: len(PROMPTS[i])] == PROMPTS[i] for i in range(6)) and len(log) == 18
    starts = {i: log.index((i, 0)) for i in range(6)}
    assert max(starts[i] for i in range(6)) < log.index((0, 2))  # all at once, not one after the other
    rows = {(row["role"], row["purpose"]): row for row in ledger.rows()}
    assert set(rows) == {("policy", "beam"), ("prm", "judge")}
    assert rows["prm", "judge"]["generated"] == 6 * 3 * 3


def test_the_ledger_holds_what_the_engines_computed(vllm, monkeypatch):
    backend, ledger = vllm
    scheduled = Counter()
    for device in backend._devices:
        executor = device.llm.engine_core.engine_core.model_executor

        def count(output, *args, _run=executor.execute_model, _name=device.name, **kwargs):
            scheduled[_name] += output.total_num_scheduled_tokens
            return _run(output, *args, **kwargs)

        monkeypatch.setattr(executor, "execute_model", count)
    sequences = Counter()

    async def work(i):
        engine, judge = backend.engine(Role.POLICY), backend.engine(Role.PRM)
        sequences.update(policy_0=5, prm_1=2)
        prompt = PROMPTS[i % 6] * 3
        drawn = await engine.generate(prompt, Sampling(10 + i), purpose="sample", n=5)
        await judge.score(prompt, [len(prompt) - 1, len(prompt)], LABELS, purpose="judge")
        for reads in ([3, len(prompt)], [len(prompt)]):  # all in one pass, and the last alone
            await backend.engine("judge").score(prompt, reads, LABELS, purpose="judge")
        return drawn

    results(backend, range(12), work)
    assert sum(scheduled.values()) > 0
    for (role,), spent in total(ledger.rows(), "role"):
        name = backend.engine(role).name
        # the last token of a sequence is made but never fed back
        assert scheduled[name] == spent.tokens - spent.cached - sequences[name]
        assert spent.cached > 0  # prompts repeat, and are longer than a block
        assert spent.flops == 2 * backend.engine(role).parameters * (spent.tokens - spent.cached)


def test_a_chunk_draws_the_same_in_any_process_and_anew_when_asked_again(opened):
    backend, _ = opened

    def process():
        return Driver({Role.POLICY: copy(backend.engine(Role.POLICY))}, backend._devices, 7)

    def draw(driver, items):
        engine = driver.engine(Role.POLICY)
        return results(driver, items, lambda i: engine.generate(PROMPTS[i], Sampling(10), purpose="sample", n=4))

    first, other = process(), process()
    draw(other, [5, 4])  # another history
    one, two, again = draw(first, range(4)), draw(other, range(4)), draw(other, range(4))
    assert one == two != again


def test_an_exception_in_work_propagates_and_leaves_the_engine_usable(vllm):
    backend, _ = vllm
    cancelled = []

    async def work(i):
        try:
            await backend.engine(Role.POLICY).generate(PROMPTS[i], Sampling(3 if i == 2 else 100), purpose="sample")
        except asyncio.CancelledError:
            cancelled.append(i)
            raise
        if i == 2:
            raise KeyError("a fault of the strategy")

    with pytest.raises(KeyError, match="a fault of the strategy"):
        results(backend, range(6), work)
    assert cancelled and not any(device.llm.has_unfinished_requests() for device in backend._devices)
    assert (
        len(results(backend, [2], lambda i: backend.engine(Role.POLICY).generate(PROMPTS[i], Sampling(3), purpose="x")))
        == 1
    )


def test_an_engine_that_dies_says_why(vllm, monkeypatch):
    backend, ledger = vllm

    def step():
        raise MemoryError("no block is left")

    monkeypatch.setattr(backend._devices[0].llm, "step", step)
    with pytest.raises(EngineDied, match="policy_0: MemoryError: no block is left"):
        results(backend, [0], lambda i: backend.engine(Role.POLICY).generate(PROMPTS[i], Sampling(3), purpose="x"))
    assert ledger.tokens() == 0


def test_all_that_can_be_asked_is_asked_before_a_step_and_results_keep_their_order():
    waiting, widths = [], []

    def step():
        widths.append(len(waiting))
        if waiting:
            waiting.pop(0).set_result(None)
        return bool(widths[-1])

    async def work(item):
        for _ in range(item):
            future = asyncio.get_running_loop().create_future()
            waiting.append(future)
            await future
        return item * 10

    assert drive([3, 1, 2, 0, 1], work, step) == [30, 10, 20, 0, 10]
    assert widths == [4, 4, 3, 3, 2, 2, 1]
    assert drive([], work, step) == []


def test_a_fault_cancels_what_is_left():
    cancelled = []

    async def work(item):
        try:
            await asyncio.sleep(0 if item == 0 else 3600)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise
        raise KeyError(item)

    with pytest.raises(KeyError, match="0"):
        drive(range(3), work, lambda: False)
    assert cancelled == [1, 2]


# ---- the scripted engine -------------------------------------------------------------


@pytest.fixture
def scripted(tmp_path):
    micro.tokenizer().save_pretrained(tmp_path)
    lines = [
        {"text": "1 + 2 = 3 \n Answer 3", "weight": 3, "right": True},
        {"text": "1 + 2 = 4 \n Answer 4"},
        {"text": "2 + 1 = 5 \n Answer 5"},
    ]
    script = {"questions": {"Q 1 + 2": lines, "Q 1": [{"text": "7"}]}, "noise": 0.1}
    (tmp_path / "scripted.json").write_text(json.dumps(script))

    def opened(seed=0, **changes):
        (tmp_path / "scripted.json").write_text(json.dumps(script | changes))
        models = {Role.POLICY: ModelRef("policy_0", str(tmp_path)), Role.PRM: ModelRef("prm_1", str(tmp_path))}
        ledger = Ledger("test", 0)
        return open_backend(EngineSpec(kind=SCRIPTED), models, ledger, seed, tmp_path), ledger

    return opened, load_tokenizer(str(tmp_path))


def test_the_script_is_played_alike_in_any_order(scripted):
    opened, tokenizer = scripted
    prompts = [tokenizer.encode(f"{i} Q 1 + 2 ? \n Try") for i in range(20)]

    def play(order, seed=0):
        backend, _ = opened(seed)

        async def work(i):
            drawn = await backend.engine(Role.POLICY).generate(prompts[i], Sampling(50), purpose="s", n=3)
            return drawn, await backend.engine(Role.PRM).score(
                [*prompts[i], *drawn[0].tokens],
                [len(prompts[i]), len(prompts[i]) + len(drawn[0].tokens)],
                (9, 10),
                purpose="v",
            )

        return results(backend, order, work)

    assert play(range(20)) == play(range(19, -1, -1)) != play(range(20), seed=1)


def test_the_script_continues_what_was_begun(scripted):
    opened, tokenizer = scripted
    backend, ledger = opened()
    head, begun = tokenizer.encode("Q 1 + 2 ? \n Try"), tokenizer.encode("1 + 2 =")
    newline = tokenizer.encode("\n")[0]

    async def work(_):
        policy, prm = backend.engine(Role.POLICY), backend.engine(Role.PRM)
        rest = await policy.generate([*head, *begun], Sampling(50), purpose="s", n=400)
        step = await policy.generate([*head, *begun], Sampling(50, 0.0, stop=frozenset({newline})), purpose="s")
        cut = await policy.generate(head, Sampling(2), purpose="s")
        right, wrong = tokenizer.encode("1 + 2 = 3"), tokenizer.encode("1 + 2 = 4")
        values = [
            (await prm.score([*head, *tail], [len(head) + len(tail)], (9, 10), purpose="v"))[0]
            for tail in (right, wrong, begun)
        ]
        return rest, step, cut, values

    rest, [step], [cut], values = results(backend, [0], work)[0]
    share = Counter(tokenizer.decode(done.tokens) for done in rest)
    assert set(share) == {"3 \n Answer 3", "4 \n Answer 4"} and all(done.eos for done in rest)
    assert 0.65 < share["3 \n Answer 3"] / 400 < 0.85  # weights 3 : 1
    assert tokenizer.decode(step.tokens) == "3 \n" and not step.eos and step.finish is Finish.STOP
    assert cut.finish is Finish.LENGTH and len(cut.tokens) == 2
    assert values == [pytest.approx(0.9, abs=0.05), pytest.approx(0.2, abs=0.05), pytest.approx(0.9, abs=0.05)]
    assert ledger.tokens() == sum(row["prompt"] + row["generated"] + row["scored"] for row in ledger.rows()) > 0


def test_the_script_dies_when_told(scripted):
    backend, _ = scripted[0](dies_after=3)
    head = scripted[1].encode("Q 1 + 2 ? \n Try")
    with pytest.raises(EngineDied, match="policy_0"):
        results(backend, [0], lambda _: backend.engine(Role.POLICY).generate(head, Sampling(9), purpose="s", n=4))


# ---- models that are none ------------------------------------------------------------


def test_a_path_that_is_no_model_is_named(tmp_path, weights):
    base, adapter = weights
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(NotAModel, match=str(path)) as caught:
            load_tokenizer(str(path))
        assert "\n" not in str(caught.value)
    for kind in ("vllm", SCRIPTED):
        with pytest.raises(NotAModel, match=str(tmp_path)):
            open_backend(
                EngineSpec(kind=kind), {Role.POLICY: ModelRef("p", str(tmp_path))}, Ledger("t", 0), 0, tmp_path
            )
    with pytest.raises(NotAModel, match="adapter_config.json is missing"):
        parameters(ModelRef("p", base, str(tmp_path)))
    with pytest.raises(ValueError, match="engine.max_model_len: 1024 .* 256 positions"):
        open_backend(EngineSpec(), {Role.POLICY: ModelRef("p", base)}, Ledger("t", 0), 0, tmp_path)


class Planted:
    """What runs when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return (open, (self.canary, "w"))


def test_pickled_weights_are_loaded_by_nobody(tmp_path, weights):
    canary, folder = tmp_path / "canary", tmp_path / "pickled"
    shutil.copytree(weights[0], folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save({"model.embed_tokens.weight": Planted(canary)}, folder / "pytorch_model.bin")
    with pytest.raises(NotAModel, match=r"no model could be loaded"):
        load_merged(ModelRef("p", str(folder)), "float32")
    with pytest.raises(OSError, match="safetensors"):
        forward_values(str(folder), None, [], LABELS, 1)
    with pytest.raises(EngineDied, match="did not start for p"):
        open_backend(
            EngineSpec(max_model_len=64), {Role.POLICY: ModelRef("p", str(folder))}, Ledger("t", 0), 0, tmp_path
        )
    assert not canary.exists()


def test_parameters_count_base_and_adapter(weights):
    base, adapter = weights
    bare = sum(weight.numel() for weight in reference(weights, False).parameters())
    assert parameters(ModelRef("p", base)) == bare
    lora = 2 * 8 * (4 * (64 + 64) + 3 * (64 + 128))  # 2 layers, rank 8: q k v o, gate up down
    assert parameters(ModelRef("p", base, adapter)) == bare + lora
