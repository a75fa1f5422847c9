"""All values of a text in one request, as vLLM's V2 runner answers it on a GPU: its own code for that, on the CPU.

That runner does not start here (it wants Triton), so its engine is not run: its check of the request is, and its
reading of the logits, which transformers makes here.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flywheel.ledger import Ledger
from flywheel.models.backend import open_backend
from flywheel.models.driver import Scoring
from flywheel.recipe import EngineSpec
from flywheel.records import ModelRef, Role
from tests import micro
from tests.models.test_engines import LABELS, PROMPTS, reference

pytestmark = pytest.mark.slow
READS = (4, 5, 9, 12)


@torch.no_grad()
def answered(model, prompt: list[int], params, chunks: list[int]) -> np.ndarray:
    """The log-probabilities that V2's worker makes of a prompt that is read in chunks of these lengths."""
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    worker = PromptLogprobsWorker(1, torch.device("cpu"), "raw_logits")  # of logits: the other kind is a Triton kernel
    worker.add_request("r", 0, params)
    hidden, at = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0], 0
    for length in chunks:
        batch = SimpleNamespace(
            req_ids=["r"],
            idx_mapping_np=np.array([0]),
            num_computed_prefill_tokens_np=np.array([at]),
            num_scheduled_tokens=np.array([length]),
            prefill_len_np=np.array([len(prompt)]),
            query_start_loc_np=np.array([0, length]),
        )
        done = worker.compute_prompt_token_id_logprobs(
            model.lm_head, hidden[at : at + length], batch, np.array([len(prompt)])
        )
        at += length
    return done["r"].numpy()


def test_one_request_asks_v2_for_every_read_and_its_answer_has_the_values_of_transformers(tmp_path, monkeypatch):
    from vllm.inputs.engine import tokens_input
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput

    base = micro.model(tmp_path / "base")
    spec = EngineSpec(dtype="float32", max_model_len=128, kv_cache_mb=16, adapters="runtime")
    backend = open_backend(spec, {Role.PRM: ModelRef("prm_1", base)}, Ledger("t", 1), 0, tmp_path)
    try:
        [device] = backend._devices
        assert not device.one_pass
        monkeypatch.setattr(device, "one_pass", True)
        monkeypatch.setattr(type(device.llm.vllm_config), "use_v2_model_runner", True)  # what vLLM's check asks
        request, prompt = Scoring(LABELS, READS), PROMPTS[3][: READS[-1]]
        params = device._vllm_params(request)
        sent = device.llm.input_processor.process_inputs("r", tokens_input(prompt), params, ("generate",))
        assert sent.sampling_params.prompt_logprob_token_ids.shape == (READS[-1] - READS[0], 2)

        model = reference(base)
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0]
        last = {label: Logprob(logits[-1].log_softmax(-1)[label].item()) for label in LABELS}
        made = CompletionOutput(0, "", [7], None, [last], finish_reason="length")
        for chunks in ([12], [5, 7], [3, 1, 8]):
            rows = answered(model, prompt, sent.sampling_params, chunks)
            result = RequestOutput("r", None, prompt, None, [made], True, prompt_token_id_logprobs=rows)
            output = device._output(result, request)
            expected = [logits[read - 1, list(LABELS)].softmax(-1)[0].item() for read in READS]
            assert output.values == pytest.approx(expected, abs=1e-5)
            assert output.tokens == ()  # what is made behind a text is nobody's, so it is not charged
    finally:
        backend.close()
