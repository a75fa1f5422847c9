"""Families of models: each is opened, sampled and judged as transformers itself would."""

from __future__ import annotations

import pytest
import torch

from flywheel.ledger import Ledger
from flywheel.models.backend import open_backend
from flywheel.models.engine import Sampling
from flywheel.models.weights import judge_fault
from flywheel.recipe import EngineSpec
from flywheel.records import ModelRef, Role
from tests import families, micro

PROMPT, READS, LABELS = list(range(20, 60)), [11, 21, 40], (50, 60)
QUICK = ("gpt_neox", "phi2")  # both run by transformers' code inside vLLM; one judges as a classifier, one does not


def test_what_is_done_to_logits_after_the_head_keeps_a_model_from_judging_as_a_classifier(tmp_path):
    found = {name: judge_fault(families.model(name, tmp_path / name)) for name in families.FAMILIES}
    faults = {"gemma2": "final_logit_softcapping", "phi2": "a bias of the LM head", "granite": "logits_scaling"}
    assert found == {name: faults.get(name) for name in families.FAMILIES}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in families.FAMILIES]
)
def test_a_family_is_served_and_judges_as_transformers_does(name, tmp_path):
    """Two engines in one process: the second is merged and counted after the first has started."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = families.model(name, tmp_path / "base")
    adapter = micro.adapter(base, tmp_path / "adapter")
    # eager: the other attention of transformers leaves out Gemma-2's soft cap
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        likeliest = plain(torch.tensor([PROMPT])).logits[0, -1].argmax().item()
        logits = PeftModel.from_pretrained(plain, adapter).eval()(torch.tensor([PROMPT])).logits[0]
    expected = logits[[read - 1 for read in READS]][:, list(LABELS)].softmax(-1)[:, 0].tolist()
    models = {Role.POLICY: ModelRef("policy_0", base), Role.PRM: ModelRef("prm_1", base, adapter, LABELS)}
    spec = EngineSpec(adapters="merged", dtype="float32", max_model_len=128, kv_cache_mb=16)
    backend = open_backend(spec, models, Ledger("test", 1), 0, tmp_path / "scratch")
    try:
        policy, judge = backend.engine(Role.POLICY), backend.engine(Role.PRM)
        [values] = backend.run([0], lambda _: judge.score(PROMPT, READS, LABELS, purpose="x"))
        [[drawn]] = backend.run([0], lambda _: policy.generate(PROMPT, Sampling(1, 0.0), purpose="x"))
    finally:
        backend.close()
    assert values == pytest.approx(expected, abs=1e-4) and judge.parameters > policy.parameters
    assert drawn.eos or drawn.tokens == (likeliest,)
    assert judge.device.one_pass == (judge_fault(base) is None)
