"""One model, not two: the same training under `accelerate launch` on one rank, two ranks, ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import training_worker as lab
from test_training import ROOT, apart, job

pytestmark = pytest.mark.slow
WORKER = Path(lab.__file__)


def launch(config: str, job: dict, where: Path) -> subprocess.Popen:
    where.mkdir(parents=True, exist_ok=True)
    job = {**job, "report": str(where / "rank")}
    (where / "job.json").write_text(json.dumps(job))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_configs" / f"{config}.yaml"),
        str(WORKER),
        str(where / "job.json"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(where / "log", "a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def ranks(config: str, job: dict, where: Path) -> list[dict]:
    """What each rank reported, after a run to the end."""
    process = launch(config, job, where)
    try:
        code = process.wait(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert code == 0, (where / "log").read_text()[-3000:]
    return sorted((json.loads(path.read_text()) for path in where.glob("rank.*")), key=lambda found: found["rank"])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return lab.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=["sft", "prm"])
def alone(request, base, tmp_path_factory):
    """(job, its one rank's report, folder) of the training in one CPU process."""
    folder = tmp_path_factory.mktemp(request.param)
    work = {**job(base, folder / "out", request.param), "held": 11}
    (found,) = ranks("cpu", work, folder / "cpu")
    assert found["world"] == 1
    return work, found, folder


@pytest.mark.parametrize(
    "config, micro, tolerance",
    [("cpu_2", 16, 1e-5), ("cpu_2", 4, 1e-5), ("zero2_cpu_2", 16, 1e-4), ("zero2_cpu_2", 4, 1e-4),
     ("zero3_cpu_2", 16, 1e-4), ("zero3_cpu_2", 4, 1e-4)],
)  # fmt: skip
def test_two_processes_train_one_model(alone, config, micro, tolerance):
    work, one, folder = alone
    out = folder / f"{config}_{micro}"
    work = {**work, "out": str(out / "out"), "spec": {**work["spec"], "micro_batch_size": micro}}
    found = ranks(config, work, out)
    assert [(f["rank"], f["world"]) for f in found] == [(0, 2), (1, 2)]
    assert found[0]["report"] == found[1]["report"] and found[1]["rows"] == []
    assert apart(folder / "out/adapter", out / "out/adapter") < tolerance
    two, one_report = found[0]["report"], one["report"]
    for key in ("steps", "tokens", "parameters", "parameters_trained"):
        assert two[key] == one_report[key]
    for a, b in zip(two["curve"], one_report["curve"], strict=True):
        assert a == {
            "step": b["step"],
            **{name: b[name] and pytest.approx(b[name], abs=1e-4) for name in ("loss", "eval_loss")},
        }
    for ours, theirs in zip(two["held"], one_report["held"], strict=True):  # of the adapter, of the base
        assert [pytest.approx(values, abs=1e-3) for values in theirs] == ours
    assert len(two["held"]) == (2 if work["kind"] == "prm" else 0)
    spent = [{k: v for k, v in row.items() if k != "seconds"} for row in found[0]["rows"]]
    assert spent == [{k: v for k, v in row.items() if k != "seconds"} for row in one["rows"]]


@pytest.mark.parametrize("config", ["cpu_2", "zero3_cpu_2"])
def test_a_training_on_several_ranks_may_begin_with_another_adapter(alone, config):
    """`start: policy`: with a learning rate of almost nothing it stays what it was, so it had been loaded whole."""
    work, one, folder = alone
    out, spec = folder / f"start_{config}", {**work["spec"], "epochs": 1, "learning_rate": 1e-9}
    found = ranks(config, {**work, "out": str(out / "out"), "spec": spec, "start": str(folder / "out/adapter")}, out)
    assert apart(folder / "out/adapter", out / "out/adapter") < 1e-6
    assert found[0]["report"]["curve"][0]["eval_loss"] == pytest.approx(one["report"]["best"]["eval_loss"], abs=1e-4)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    """The adapter of the training that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    ranks("cpu", job(base, folder / "out", epochs=12, evals=8), folder)
    return folder / "out/adapter"


@pytest.mark.parametrize(
    "config, after",
    [("cpu", "cpu_2"), ("cpu_2", "cpu"), ("zero2_cpu_2", "zero2_cpu_2"), ("zero2_cpu_2", "cpu"),
     ("zero3_cpu_2", "zero3_cpu_2")],
)  # fmt: skip
def test_killed_with_sigkill_it_goes_on_even_with_other_ranks(base, whole, tmp_path, config, after):
    work = job(base, tmp_path / "out", epochs=12, evals=8)
    process = launch(config, work, tmp_path / "first")
    deadline = time.monotonic() + 200
    while len(list((tmp_path / "out/trainer").glob("checkpoint-*/complete.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "first/log").read_text()[-3000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end_children(tmp_path / "first/job.json")
    assert not (tmp_path / "out/report.json").exists()

    found = ranks(after, work, tmp_path / "second")
    log = (tmp_path / "second/log").read_text()
    assert ("starts again" in log) == (config.startswith("zero") and after != config)
    assert found[0]["report"]["steps"] == 75
    assert apart(tmp_path / "out/adapter", whole) < 1e-4


@pytest.mark.parametrize("kind, small", [("sft", ["1"]), ("prm", ["0", "1"])])
def test_out_of_memory_on_ranks_ends_all_and_the_same_command_goes_on(base, tmp_path, kind, small):
    work = {**job(base, tmp_path / "out", kind, epochs=1, micro_batch_size=8), "room": 4, "small_devices": small}
    first = launch("cpu_2", work, tmp_path / "first")
    assert first.wait(timeout=240) != 0
    assert (
        "out of memory at a micro batch of 8; going on with 4, the batch stays 16"
        in (tmp_path / "first/log").read_text()
    )
    ranks("cpu_2", work, tmp_path / "second")
    whole = {**job(base, tmp_path / "whole", kind, epochs=1, micro_batch_size=4)}
    ranks("cpu_2", whole, tmp_path / "third")
    assert apart(tmp_path / "out/adapter", tmp_path / "whole/adapter") < 1e-5


def end_children(job_file: Path) -> None:
    """torchrun starts its ranks in sessions of their own; end those that work on this very job file."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(job_file).encode() in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                continue
