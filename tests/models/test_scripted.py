"""The scripted engine of the tests: what it plays, scores and charges."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from flywheel.errors import EngineDied, UserError
from flywheel.ledger import Ledger
from flywheel.models import backend
from flywheel.models.backend import engines, open_backend
from flywheel.models.engine import Sampling
from flywheel.models.weights import load_tokenizer
from flywheel.recipe import EngineSpec
from flywheel.records import Finish, ModelRef, Role
from tests import micro

SCRIPTED = "tests.scripted:open_backend"


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

        return dict(zip(order, backend.run(order, work)))

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

    rest, [step], [cut], values = backend.run([0], work)[0]
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
        backend.run([0], lambda _: backend.engine(Role.POLICY).generate(head, Sampling(9), purpose="s", n=4))


@pytest.mark.parametrize("option", [{"top_k": 2}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_what_it_cannot_heed_it_refuses(scripted, option):
    opened, tokenizer = scripted
    backend, _ = opened()

    async def work(prompt):
        return await backend.engine(Role.POLICY).generate(prompt, Sampling(5, **option), purpose="s")

    with pytest.raises(UserError, match=next(iter(option))):
        list(backend.run([tokenizer.encode("Q 1 + 2 ? \n Try")], work))


def test_engines_are_left_to_a_stage_with_the_same_models(scripted, tmp_path):
    """What they then draw and charge is what engines of its own would."""
    opened, tokenizer = scripted
    opened()[0].close()  # writes the script
    policy = {Role.POLICY: ModelRef("policy_0", str(tmp_path))}
    both = {**policy, Role.PRM: ModelRef("prm_1", str(tmp_path))}
    prompt, closed = tokenizer.encode("Q 1 + 2 ? \n Try"), []

    def stage(models, seed, leave_open=False, error=None):
        """(what the stage drew, its ledger, its engines)"""
        ledger = Ledger("test", seed)
        with engines(EngineSpec(kind=SCRIPTED), models, ledger, seed, tmp_path, leave_open) as mine:
            mine._devices[0].close = lambda: closed.append(seed)
            draw = lambda _: mine.engine(Role.POLICY).generate(prompt, Sampling(50), purpose="s", n=8)  # noqa: E731
            drawn = mine.run([0], draw)
            if error:
                raise error
        return drawn, ledger.rows(), mine

    alone = stage(policy, 1)
    first = stage(both, 0, leave_open=True)
    second = stage(policy, 1)
    assert second[2] is first[2] is not alone[2] and second[:2] == alone[:2] != first[:2]
    assert closed == [1, 1] and not backend._left
    left = stage(policy, 2, leave_open=True)
    other = stage(both, 3)  # a model that is not among those left
    assert other[2] is not left[2] and closed == [1, 1, 2, 3]
    with pytest.raises(EngineDied):
        stage(policy, 4, leave_open=True, error=EngineDied("it died"))
    assert closed == [1, 1, 2, 3, 4] and not backend._left
