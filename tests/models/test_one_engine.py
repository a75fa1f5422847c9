"""One engine for several adapters, one after another in a process, and one over two devices: the same answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from flywheel.ledger import Ledger, total
from flywheel.models.backend import open_backend
from flywheel.models.engine import Sampling
from flywheel.recipe import EngineSpec
from flywheel.records import ModelRef, Role
from tests import micro

pytestmark = pytest.mark.slow
# longer than a block of the prefix cache, and alike but for their last token
PROMPTS = [[3, *(13 + i % 40 for i in range(45)), 20 + j] for j in range(4)]
LABELS = (9, 10)
SPEC = EngineSpec(dtype="float32", max_model_len=128, kv_cache_mb=16, max_running=64, gpu_memory=0.3)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, ModelRef]:
    """Policies and PRMs of two rounds, as `flywheel` names their folders."""
    folder = tmp_path_factory.mktemp("run")
    base = micro.model(folder / "base")
    found = {Role.POLICY: ModelRef("policy_0", base)}
    for seed, (name, stage) in enumerate(
        [("policy_1", "round_1/distill"), ("prm_1", "round_1/train_prm"), ("prm_2", "round_2/train_prm")], start=1
    ):
        found[name] = ModelRef(name, base, micro.adapter(base, folder / stage / "adapter", seed))
    return found


def answers(spec: EngineSpec, models: dict[str, ModelRef], scratch: Path) -> dict:
    """Twice, by (model, prompt): greedy tokens, and the values of some prefixes; all requests share the batches."""
    ledger = Ledger("test", 1)
    backend = open_backend(spec, models, ledger, 7, scratch)
    reads = [10, 33, len(PROMPTS[0])]

    async def ask(item: tuple[str, int]) -> tuple:
        engine, prompt = backend.engine(item[0]), PROMPTS[item[1]]
        [done] = await engine.generate(prompt, Sampling(8, temperature=0.0), purpose=item[0])
        return done.tokens, await engine.score(prompt, reads, LABELS, purpose=item[0])

    items = [(name, i) for i in range(len(PROMPTS)) for name in models]
    try:
        turns = [dict(zip(items, backend.run(items, ask))) for _ in range(2)]
        assert all(spent.cached > 0 for _, spent in total(ledger.rows(), "purpose"))  # the second turn reads the cache
        assert len(backend._devices) == (len(models) if spec.adapters == "merged" else 1)
    finally:
        backend.close()
    assert alike(turns[0], turns[1])
    return turns[0]


def alike(one: dict, other: dict, tolerance: float = 1e-5) -> bool:
    """Whether two sets of answers have the same tokens, and the same values to `tolerance`."""
    return one.keys() == other.keys() and all(
        one[item] == (tokens, pytest.approx(values, abs=tolerance)) for item, (tokens, values) in other.items()
    )


def test_three_adapters_of_two_rounds_in_one_engine_answer_as_merged_ones_do(models, tmp_path):
    """No answer comes from another round's adapter, nor from the prefix that another adapter had cached."""
    merged = answers(SPEC.model_copy(update={"adapters": "merged"}), models, tmp_path)
    runtime = answers(SPEC.model_copy(update={"adapters": "runtime"}), models, tmp_path)
    assert alike(runtime, merged)
    for i in range(len(PROMPTS)):  # they differ, so a mixed-up one would show
        every = [merged[name, i][1] for name in models]
        assert min(abs(a[-1] - b[-1]) for k, a in enumerate(every) for b in every[:k]) > 1e-4  # ten tolerances


def test_an_engine_opened_after_another_serves_the_adapter_that_is_there_now(models, tmp_path):
    """The same path and the same number in the engine, as after a stage that was computed again."""
    spec, base, path = SPEC.model_copy(update={"adapters": "runtime"}), models[Role.POLICY].base, tmp_path / "adapter"
    found = []
    for name in ("prm_1", "prm_2"):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(models[name].adapter, path)
        found.append(answers(spec, {"prm": ModelRef("prm", base, str(path))}, tmp_path))
        assert alike(found[-1], answers(spec, {"prm": models[name]}, tmp_path))
    assert not alike(found[0], found[1], 1e-3)


def test_an_engine_over_two_devices_answers_as_one_over_one_does_and_draws_the_same_again(models, tmp_path):
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("wants two GPUs")
    spec = SPEC.model_copy(update={"adapters": "runtime"})
    one = answers(spec, models, tmp_path)
    two = answers(spec.model_copy(update={"tensor_parallel": 2}), models, tmp_path)
    assert alike(two, one, 1e-4)

    def drawn() -> list:
        spec = SPEC.model_copy(update={"adapters": "runtime", "tensor_parallel": 2})
        backend = open_backend(spec, {Role.POLICY: models[Role.POLICY]}, Ledger("test", 1), 7, tmp_path)
        engine = backend.engine(Role.POLICY)
        try:
            return [
                backend.run(PROMPTS, lambda p: engine.generate(p, Sampling(8), purpose="sample", n=3)) for _ in range(2)
            ]
        finally:
            backend.close()

    first, second = drawn(), drawn()
    assert first == second and first[0] != first[1]  # seeded by the requests, also in the workers' processes
