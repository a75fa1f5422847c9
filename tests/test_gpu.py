"""The GPU's way, whole: `python -m pytest -m gpu`. Nothing else of the tests opens a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flywheel.ledger import Ledger, total
from flywheel.recipe import EngineSpec
from flywheel.runs.run import Run
from flywheel.stages import ORDER
from tests import micro

ROOT = Path(__file__).parents[1]
SEED_MODEL = ROOT / "data/chain/seed_model"


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3600), pytest.mark.skipif(not gpus(), reason="wants a CUDA device")]
two_gpus = pytest.mark.skipif(gpus() < 2, reason="wants two CUDA devices")


def launch(config: str, processes: int, folder: Path, *command: str) -> str:
    """What `accelerate launch` of a command prints, with a copy of a shipped config for so many processes."""
    spec = yaml.safe_load((ROOT / "accelerate_configs" / f"{config}.yaml").read_text()) | {"num_processes": processes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(spec))
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "config.yaml")]
    done = subprocess.run([*start, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def one_round(folder: Path, config: str, processes: int, *sets: str) -> Run:
    """The default recipe to the end of round 1."""
    more = [item for pair in sets for item in ("--set", pair)]
    command = ("-m", "flywheel.iterate", "--recipe", "chain", "--runs", str(folder), "--name", "run", "--round", "1")
    launch(config, processes, folder, *command, *more)
    run = Run(folder / "run")
    assert all(run.figures(stage, 1) for stage in ORDER)
    verified = subprocess.run([sys.executable, "-m", "flywheel.verify", str(run.root)], cwd=ROOT, capture_output=True)
    assert verified.returncode == 0, verified.stdout
    return run


def test_the_default_recipe_runs_a_round_with_adapters_served_at_run_time(tmp_path):
    run = one_round(tmp_path, "gpu_1", 1)
    spent = {role: sums for (role,), sums in total(run.ledger_rows, "role")}
    assert spent["prm"].scored > 0 == spent["prm"].generated  # one pass a text, though it is not merged into its base
    assert run.figures("evaluate", 1)["policy"]["pass@1"] > 0.35  # the seed has 0.27, and 0.56 on a CPU after it


def test_flywheel_s_loop_keeps_the_rate_of_plain_vllm():
    from eval.bench.engine import measure

    found = measure(str(SEED_MODEL), 2048, 4, 96, 3, EngineSpec(max_model_len=512, gpu_memory=0.4))
    print(json.dumps(found))
    assert found["ratio"]["median"] > 0.95


def test_a_closed_engine_gives_its_memory_back_and_the_next_one_answers_as_transformers_does(tmp_path):
    import torch

    from flywheel.models.backend import open_backend
    from flywheel.models.engine import Sampling
    from flywheel.records import ModelRef, Role
    from tests.models.test_engines import LABELS, PROMPTS, greedy, next_logits, reference

    base = micro.model(tmp_path / "base")
    adapter, free = micro.adapter(base, tmp_path / "adapter"), []
    spec = EngineSpec(dtype="float32", max_model_len=128, max_running=64)
    for _ in range(3):  # each claims nine tenths of the memory
        backend = open_backend(spec, {Role.PRM: ModelRef("prm_1", base, adapter)}, Ledger("t", 1), 0, tmp_path)
        engine = backend.engine(Role.PRM)
        drawn = backend.run(PROMPTS, lambda p: engine.generate(p, Sampling(12, temperature=0.0), purpose="greedy"))
        values = backend.run(PROMPTS, lambda p: engine.score(p, [4, len(p)], LABELS, purpose="check"))
        backend.close()
        free.append(torch.cuda.mem_get_info()[0])
        model = reference(base, adapter)
        for prompt, [done], scores in zip(PROMPTS, drawn, values, strict=True):
            expected = greedy(model, prompt, 12)
            assert done.tokens == (expected[:-1] if done.eos else expected)
            logits = [next_logits(model, prompt[:read])[list(LABELS)] for read in (4, len(prompt))]
            assert scores == pytest.approx([pair.softmax(-1)[0].item() for pair in logits], abs=1e-3)
    assert min(free) > 0.95 * max(free)


@two_gpus
@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("kind", ["sft", "prm"])
def test_two_gpus_train_what_one_does(tmp_path, config, kind):
    import training_worker as lab
    from test_training import job

    worker, base, losses = str(Path(lab.__file__)), lab.make_base(tmp_path / "base"), []
    for name, way, processes in (("one", "gpu_1", 1), ("two", config, 2)):
        work = {**job(base, tmp_path / name / "out", kind), "held": 11, "report": str(tmp_path / name / "rank")}
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").write_text(json.dumps(work))
        launch(way, processes, tmp_path / name, worker, str(tmp_path / name / "job.json"))
        report = json.loads((tmp_path / name / "rank.0").read_text())["report"]
        losses.append([point["eval_loss"] for point in report["curve"] if point["eval_loss"] is not None])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # bfloat16


@two_gpus
@pytest.mark.parametrize("config, sets", [("ddp", ()), ("zero3", ("engine.tensor_parallel=2",))])
def test_two_gpus_run_a_round(tmp_path, config, sets):
    one_round(tmp_path, config, 2, *sets)
