"""The PRM: values against a direct forward pass, encoding, aggregation."""

from __future__ import annotations

import math

import pytest
import torch

from flywheel.errors import TooLong
from flywheel.ledger import Ledger
from flywheel.models.backend import open_backend
from flywheel.models.prm import Prm, aggregate
from flywheel.models.prompts import Prompts
from flywheel.models.steps import Reader
from flywheel.models.weights import load_merged
from flywheel.recipe import EngineSpec, PromptSpec
from flywheel.records import ModelRef, Question, Role
from tests import micro

TOKENIZER = micro.tokenizer()
PROMPTS = Prompts(
    PromptSpec(
        solve="Q {question} ? \n Try", check="Q {question} ? \n Check", again="\n Again", answer=r"Answer (\S+)"
    ),
    TOKENIZER,
)
READER = Reader(TOKENIZER, PROMPTS.spec)
QUESTIONS = [Question(f"q{i}", f"{i} + {i + 1}") for i in range(4)]
STEPS = [
    READER.steps(TOKENIZER.encode(f"{i} + {i} = {2 * i} \n {2 * i} + 1 = {2 * i + 1} \n Answer {2 * i + 1}"))
    for i in range(4)
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prm")
    base = micro.model(folder / "base", seed=3)
    ref = ModelRef(
        "prm_1",
        base,
        micro.adapter(base, folder / "adapter", seed=4),
        labels=tuple(TOKENIZER.convert_tokens_to_ids(["ok", "no"])),
    )
    ledger = Ledger("test", 1)
    spec = EngineSpec(dtype="float32", max_model_len=64, kv_cache_mb=16)
    backend = open_backend(spec, {Role.PRM: ref}, ledger, 0, folder / "scratch")
    yield backend, ref, ledger
    backend.close()


def test_values_through_vllm_equal_a_direct_forward_pass(served):
    backend, ref, ledger = served
    prm = Prm(backend.engine(Role.PRM), PROMPTS, ("ok", "no"), "last")
    ledger.take()

    async def work(i):
        return await prm.values(QUESTIONS[i], STEPS[i]), await prm.values(QUESTIONS[i], STEPS[i], since=-1)

    found = dict(enumerate(backend.run(range(4), work)))
    model, labels = load_merged(ref, "float32"), TOKENIZER.convert_tokens_to_ids(["ok", "no"])
    for i in range(4):
        tokens, reads = PROMPTS.check(QUESTIONS[i], STEPS[i])
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        expected = [
            logits[read - 1, labels].softmax(-1)[0].item() for read in reads
        ]  # all steps in one pass, as trained
        values, last = found[i]
        assert len(values) == 3 and values == pytest.approx(expected, abs=1e-3)
        assert last == pytest.approx(expected[-1:], abs=1e-3)
    [row] = ledger.rows()
    assert row["purpose"] == "verify" and row["generated"] == 0
    assert row["scored"] == sum(2 * reads[-1] for reads in (PROMPTS.check(q, s)[1] for q, s in zip(QUESTIONS, STEPS)))


def test_a_value_is_read_before_the_separator_that_ends_the_step():
    tokens, reads = PROMPTS.check(QUESTIONS[1], STEPS[1])
    text = [TOKENIZER.decode(tokens[:read]).split("Check")[1].split("\n") for read in reads]
    assert [[piece.strip() for piece in pieces] for pieces in text] == [
        ["1 + 1 = 2"],
        ["1 + 1 = 2", "2 + 1 = 3"],
        ["1 + 1 = 2", "2 + 1 = 3", "Answer 3"],
    ]
    assert len(tokens) == reads[-1]


def test_a_text_too_long_for_the_model_raises_and_names_the_question(served):
    backend, _, ledger = served
    prm = Prm(backend.engine(Role.PRM), PROMPTS, ("ok", "no"), "last")
    long = READER.steps(TOKENIZER.encode("1 + 1 = 2 \n" * 11))
    ledger.take()
    with pytest.raises(TooLong, match="question q2: prm_1: a prompt of .* tokens .* 64"):
        backend.run([2], lambda i: prm.values(QUESTIONS[i], long))


def test_labels_must_be_two_single_tokens(served):
    engine = served[0].engine(Role.PRM)
    with pytest.raises(ValueError, match="prm.labels: 'good' is not a single token"):
        Prm(engine, PROMPTS, ("good", "no"), "last")
    with pytest.raises(ValueError, match="prm.labels: .* the same token"):
        Prm(engine, PROMPTS, ("ok", "ok"), "last")


def test_aggregates_by_hand():
    values = (0.5, 0.8, 0.25)
    assert [aggregate(values, how) for how in ("last", "min", "product", "mean")] == [
        0.25,
        0.25,
        pytest.approx(0.1),
        pytest.approx(1.55 / 3),
    ]
    assert aggregate(values, "odds") == pytest.approx((1 * 4 / 3) / (1 + 1 * 4 / 3))  # odds 1, 4 and 1/3
    assert 0 <= aggregate((0.0, 1.0), "odds") <= 1
    assert {aggregate((), how) for how in ("last", "min", "product", "mean", "odds")} == {0.0}
    with pytest.raises(ValueError, match="not a number"):
        aggregate((0.5, math.nan, 0.4), "last")
    with pytest.raises(ValueError, match="prm.aggregate: 'median'"):
        aggregate(values, "median")
