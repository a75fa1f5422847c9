"""vLLM on a micro model: what is sampled, scored and charged, with adapters merged in and served at run time."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
import torch

from flywheel.errors import EngineDied, TooLong
from flywheel.ledger import Ledger, total
from flywheel.models.backend import open_backend
from flywheel.models.driver import drawing
from flywheel.models.engine import Sampling
from flywheel.recipe import EngineSpec
from flywheel.records import Finish, ModelRef, Role
from tests import micro

PROMPTS = [[3, 13 + i, 11, 20 + i, 4, 2, 5, *range(30, 30 + 3 * i)] for i in range(6)]
LABELS = (9, 10)

ROLES = [Role.POLICY, Role.PRM, Role.REVISER]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A base, and two adapters of it."""
    folder = tmp_path_factory.mktemp("micro")
    base = micro.model(folder / "base")
    return base, micro.adapter(base, folder / "first"), micro.adapter(base, folder / "second", seed=2)


@pytest.fixture(scope="module")
def models(weights):
    base, first, second = weights
    prm = ModelRef("prm_1", base, first)
    return {
        Role.POLICY: ModelRef("policy_0", base),
        Role.PRM: prm,
        Role.REVISER: ModelRef("reviser_1", base, second),
        "judge": replace(prm, name="judge_1", labels=LABELS),
    }


def opened(adapters, models, scratch):
    shares = {"kv_cache_mb": 16, "gpu_memory": 0.3}  # two backends are open at once
    spec = EngineSpec(adapters=adapters, dtype="float32", max_model_len=128, max_running=64, **shares)
    ledger = Ledger("test", 1)
    backend = open_backend(spec, models, ledger, 7, scratch)
    yield backend, ledger
    backend.close()


@pytest.fixture(scope="module")
def merged(models, tmp_path_factory):
    """Every model has an engine of its own."""
    yield from opened("merged", models, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def runtime(models, tmp_path_factory):
    """One engine serves the base and its adapters, as on a GPU."""
    yield from opened("runtime", models, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(params=["merged", "runtime"])
def served(request):
    backend, ledger = request.getfixturevalue(request.param)
    ledger.take()
    return backend, ledger


def results(backend, items, work):
    items = list(items)
    return dict(zip(items, backend.run(items, work)))


def reference(base, adapter=None):
    """The model loaded by transformers and PEFT themselves."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


@torch.no_grad()
def next_logits(model, prompt):
    return model(torch.tensor([prompt])).logits[0, -1]


def greedy(model, prompt, count):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] != micro.EOS):
        tokens.append(int(next_logits(model, tokens).argmax()))
    return tuple(tokens[len(prompt) :])


# ---- what the model says -------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_greedy_is_the_model_s_own(served, role, models):
    backend, _ = served
    engine, ref = backend.engine(role), models[role]

    async def work(i):
        return await engine.generate(PROMPTS[i], Sampling(12, temperature=0.0), purpose="greedy")

    model = reference(ref.base, ref.adapter)
    for i, [done] in results(backend, range(6), work).items():
        expected = greedy(model, PROMPTS[i], 12)
        assert done.eos == (expected[-1] == micro.EOS)
        assert done.tokens == (expected[:-1] if done.eos else expected)


def reads_of(prompt):
    return [*range(1, len(prompt), 3), len(prompt)]


def scores(backend, role):
    engine = backend.engine(role)
    return backend.run(PROMPTS, lambda prompt: engine.score(prompt, reads_of(prompt), LABELS, purpose="check"))


@pytest.mark.parametrize("role", ["judge", *ROLES])  # only the judge's reference has labels
def test_scores_equal_those_of_transformers_and_peft(served, role, models):
    backend, ref = served[0], models[role]
    model, bare = reference(ref.base, ref.adapter), reference(ref.base)
    found = scores(backend, role)
    for prompt, values in zip(PROMPTS, found):
        logits = [next_logits(model, prompt[:read])[list(LABELS)] for read in reads_of(prompt)]
        assert values == pytest.approx([pair.softmax(-1)[0].item() for pair in logits], abs=1e-4)
    unadapted = [next_logits(bare, prompt)[list(LABELS)].softmax(-1)[0].item() for prompt in PROMPTS]
    differ = any(abs(values[-1] - value) > 0.05 for values, value in zip(found, unadapted))
    assert differ == (ref.adapter is not None)  # the adapter is not lost


def test_runtime_adapters_score_as_merged_ones_do(merged, runtime):
    for role in ("judge", *ROLES):
        for one, other in zip(scores(merged[0], role), scores(runtime[0], role), strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_adapters_are_never_mixed_up(served, models):
    """Requests of the base and of two adapters, for the same prompts, share every batch and the prefix cache."""
    backend, ledger = served
    prompts = [[*prompt, *prompt, *prompt][:40] for prompt in PROMPTS[3:]]  # longer than a block of the prefix cache
    roles = ROLES * 2

    async def ask(role, prompt):
        engine = backend.engine(role)
        [done] = await engine.generate(prompt, Sampling(6, temperature=0.0), purpose=role)
        return done.tokens, *await engine.score(prompt, [len(prompt)], LABELS, purpose=role)

    async def work(prompt):
        return await asyncio.gather(*(ask(role, prompt) for role in roles))

    turns = [backend.run(prompts, work) for _ in range(2)]
    assert all(spent.cached for _, spent in total(ledger.rows(), "role"))
    for role in ROLES:
        model = reference(models[role].base, models[role].adapter)
        for k, prompt in enumerate(prompts):
            expected = greedy(model, prompt, 6)
            text = expected[:-1] if expected[-1] == micro.EOS else expected
            value = next_logits(model, prompt)[list(LABELS)].softmax(-1)[0].item()
            answers = [turn[k][j] for turn in turns for j, other in enumerate(roles) if other == role]
            assert len(answers) == 4 and {tokens for tokens, _ in answers} == {text}
            assert [found for _, found in answers] == pytest.approx([value] * 4, abs=1e-4)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_samples_follow_the_model_s_distribution(served, top_p, weights):
    backend, _ = served
    n = 3000

    async def work(i):
        return await backend.engine(Role.POLICY).generate(PROMPTS[i], Sampling(1, 1.0, top_p), purpose="sample", n=n)

    counts = Counter(done.tokens[0] if done.tokens else micro.EOS for done in results(backend, [2], work)[2])
    probability = next_logits(reference(weights[0]), PROMPTS[2]).softmax(-1)
    order = probability.argsort(descending=True)
    before = probability[order].cumsum(0) - probability[order]
    probability[order[before >= top_p]] = 0
    probability /= probability.sum()
    share = torch.tensor([counts[token] / n for token in range(len(micro.WORDS))])
    assert (share - probability).abs().sum() / 2 < 0.06  # total variation; about 0.03 is chance
    assert not share[probability == 0].any()


def test_top_k_min_p_and_the_repetition_penalty_decide_what_is_drawn(served, weights):
    backend, _ = served
    probability = next_logits(reference(weights[0]), PROMPTS[2]).softmax(-1)
    order = probability.argsort(descending=True).tolist()
    share = ((probability[order[2]] + probability[order[3]]) / 2 / probability[order[0]]).item()  # three tokens pass

    def drawn(**options) -> set[int]:
        sampling = Sampling(1, **options)

        async def work(i):
            return await backend.engine(Role.POLICY).generate(PROMPTS[i], sampling, purpose="sample", n=400)

        return {done.tokens[0] if done.tokens else micro.EOS for done in results(backend, [2], work)[2]}

    assert len(drawn()) > 5
    assert drawn(top_k=2) == set(order[:2])
    assert drawn(min_p=share) == set(order[:3])
    assert drawn(repetition_penalty=1e6) & set(PROMPTS[2]) < drawn() & set(PROMPTS[2])


def test_a_completion_keeps_its_stop_token_and_never_shows_eos(served):
    backend, ledger = served
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


def test_done_is_asked_after_each_token_and_ends_a_completion(served):
    backend, ledger = served

    def three_and_small(tokens):
        return len(tokens) >= 3 and tokens[-1] < 30

    async def work(i):
        return await backend.engine(Role.POLICY).generate(
            PROMPTS[i], Sampling(16, 1.0, done=three_and_small), purpose="sample", n=20
        )

    every = [one for group in results(backend, range(6), work).values() for one in group]
    for one in every:
        first = next((k for k in range(1, 17) if three_and_small(one.tokens[:k])), None)
        assert first in (None, len(one.tokens)) or one.eos
        assert one.finish is (Finish.STOP if one.eos or first else Finish.LENGTH)
    kinds = {(one.eos, one.finish) for one in every}
    assert kinds >= {(True, Finish.STOP), (False, Finish.STOP)}
    [row] = ledger.rows()  # what was made after the end is neither shown nor charged
    assert row["generated"] == sum(len(one.tokens) + one.eos for one in every)


def test_what_does_not_fit_raises_and_is_not_cut(served):
    backend, ledger = served
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


def test_dependent_calls_over_two_engines_interleave(served):
    backend, ledger = served
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
    assert rows["prm", "judge"]["generated"] == (0 if prm.device.one_pass else 6 * 3 * 3)


def test_the_ledger_holds_what_the_engines_computed(served, monkeypatch):
    backend, ledger = served
    scheduled = Counter()
    for device in backend._devices:
        executor = device.llm.engine_core.engine_core.model_executor

        def count(output, *args, _run=executor.execute_model, _name=device.name, **kwargs):
            scheduled[_name] += output.total_num_scheduled_tokens
            return _run(output, *args, **kwargs)

        monkeypatch.setattr(executor, "execute_model", count)

    async def work(i):
        prompt = PROMPTS[i % 6] * 3
        drawn = await backend.engine(Role.POLICY).generate(prompt, Sampling(10 + i), purpose="sample", n=5)
        await backend.engine(Role.PRM).score(prompt, [len(prompt) - 1, len(prompt)], LABELS, purpose="judge")
        for reads in ([3, len(prompt)], [len(prompt)]):  # all in one pass, and the last alone
            await backend.engine("judge").score(prompt, reads, LABELS, purpose="judge")
        return drawn

    results(backend, range(12), work)
    # the last token of a sequence is made but never fed back
    reads = {Role.PRM: 12 * 2, "judge": 12 * 3}
    never_fed = {role: 0 if backend.engine(role).device.one_pass else count for role, count in reads.items()}
    never_fed[Role.POLICY] = 12 * 5
    computed = Counter()
    for (role,), spent in total(ledger.rows(), "role"):
        computed[backend.engine(role).device.name] += spent.tokens - spent.cached - never_fed[role]
        assert spent.cached > 0  # prompts repeat, and are longer than a block
        model, made = backend.engine(role), spent.tokens - spent.cached
        least = 2 * model.parameters * made
        assert least < spent.flops < least + 4 * model.attention * model.max_model_len * made
    assert computed == scheduled and sum(scheduled.values()) > 0


def test_scoring_is_charged_once_for_a_pass_and_once_for_each_read(served):
    """A judge reads its text in one pass; any other engine reads each prefix and makes one token behind it."""
    backend, ledger = served
    prompt, reads = PROMPTS[3], [4, 9, 12]
    for key in (Role.PRM, "judge"):
        ledger.take()
        backend.run([prompt], lambda _, key=key: backend.engine(key).score(prompt, reads, LABELS, purpose="check"))
        [row] = ledger.rows()
        one_pass = backend.engine(key).device.one_pass
        assert one_pass or key != "judge" or len(backend._devices) == 1
        assert (row["scored"], row["generated"]) == ((12, 0) if one_pass else (4 + 9 + 12, 3))
        assert row["prompt"] == 0 and row["role"] == key
        assert backend.engine(key).score_tokens(reads) == row["scored"] + row["generated"]


def test_a_question_draws_the_same_whatever_else_is_in_the_batch(served):
    backend, _ = served

    def draw(items, what="x"):
        async def one(i):
            with drawing(f"{what}/{i}"):
                return await backend.engine(Role.POLICY).generate(PROMPTS[i], Sampling(10), purpose="sample", n=4)

        return results(backend, items, one)

    whole = draw(range(len(PROMPTS)))
    assert draw([2]) | draw([3, 1]) == {i: whole[i] for i in (1, 2, 3)}
    assert draw([2], "y")[2] != whole[2] and len({done.tokens for drawn in whole.values() for done in drawn}) > 4


def test_an_exception_in_work_propagates_and_leaves_the_engine_usable(served):
    backend, _ = served
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


def test_an_engine_that_dies_says_why(served, monkeypatch):
    backend, ledger = served

    def step():
        raise MemoryError("no block is left")

    monkeypatch.setattr(backend._devices[0].llm, "step", step)
    with pytest.raises(EngineDied, match="policy_0: MemoryError: no block is left"):
        results(backend, [0], lambda i: backend.engine(Role.POLICY).generate(PROMPTS[i], Sampling(3), purpose="x"))
    assert ledger.tokens() == 0
