"""Two servers of vLLM itself, on this machine's CPU, beside an engine in this process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from flywheel.ledger import Ledger
from flywheel.models import remote
from flywheel.models.backend import open_backend
from flywheel.models.engine import Sampling
from flywheel.recipe import EngineSpec
from flywheel.records import ModelRef, Role
from tests import micro

PROMPTS = [[3, 13 + i, 11, 20 + i] for i in range(40)]
LABELS = (9, 10)


class VllmServer:
    """`vllm serve` of a base on this machine's CPU, in a process group of its own."""

    def __init__(self, base: str, seed: int, log: Path):
        with socket.socket() as door:
            door.bind(("127.0.0.1", 0))
            self.port = door.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        flags = "--enable-lora --max-loras 3 --max-lora-rank 8 --dtype float32 --max-model-len 128 --block-size 32"
        flags += " --enforce-eager --enable-prompt-tokens-details --no-enable-chunked-prefill"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base, *flags.split()]
        command += ["--port", str(self.port), "--seed", str(seed), "--kv-cache-memory-bytes", str(16 << 20)]
        env = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        env |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}  # the sampler would be compiled at its first use
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def wait(self) -> None:
        end = time.monotonic() + 900
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-3000:])

    def kill(self) -> None:
        """End the server and its engine's process at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def all_greedy_and_scored(backend, ledger, roles):
    """Greedy completions (to the end, to a stop token, to where `done`) and values by role, and the ledger's rows."""
    stop = frozenset(range(20, 24))
    wanted = {}, {"stop": stop}, {"done": lambda tokens: len(tokens) == 3}
    prompts = [[*prompt, 4, 2, 5] for prompt in PROMPTS[:12]]
    found = {}
    for role in roles:
        engine = backend.engine(role)
        drawn = [
            backend.run(prompts, lambda p: engine.generate(p, Sampling(24, 0.0, **options), purpose="sample"))
            for options in wanted
        ]
        found[role] = drawn, backend.run(prompts, lambda p: engine.score(p, [2, 5, len(p)], LABELS, purpose="verify"))
    return found, ledger.take()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_servers_of_vllm_answer_as_an_engine_in_this_process_and_one_is_killed(tmp_path, caplog):
    base = micro.model(tmp_path / "base")
    prm, reviser = (micro.adapter(base, tmp_path / str(seed), seed=seed) for seed in (1, 2))
    models = {
        Role.POLICY: ModelRef("policy_0", base),
        Role.PRM: ModelRef("prm_1", base, prm, labels=LABELS),
        Role.REVISER: ModelRef("reviser_1", base, reviser),
    }
    servers = [VllmServer(base, seed, tmp_path / f"{seed}.log") for seed in (1, 2)]
    try:
        ledger = Ledger("test", 1)
        spec = EngineSpec(adapters="runtime", dtype="float32", max_model_len=128, kv_cache_mb=16)
        inside = open_backend(spec, models, ledger, 7, tmp_path)
        expected, rows = all_greedy_and_scored(inside, ledger, models)
        inside.close()

        for server in servers:
            server.wait()
        spec = EngineSpec(kind="server", servers=[s.url for s in servers], max_model_len=128, max_running=32)
        remote.preflight(spec, [base])
        backend = open_backend(spec, models, ledger, 7, tmp_path)
        found, billed = all_greedy_and_scored(backend, ledger, models)
        for role in models:
            assert found[role][0] == expected[role][0]
            for one, other in zip(found[role][1], expected[role][1]):
                assert one == pytest.approx(other, abs=1e-3)
        for row, other in zip(rows, billed, strict=True):
            same = ("role", "purpose", "prompt", "scored")
            assert [row[key] for key in same] == [other[key] for key in same]
            assert row["generated"] <= other["generated"]  # what came after `done` is billed too

        prompts, answered = [prompt * 10 for prompt in PROMPTS] * 10, []  # longer than a block of the prefix cache

        async def work(prompt):
            drawn = await backend.engine(Role.REVISER).generate(prompt, Sampling(60), purpose="sample", n=2)
            answered.append(prompt)
            if len(answered) == 40:
                await asyncio.to_thread(servers[0].kill)
            return drawn

        drawn = backend.run(prompts, work)
        assert len(drawn) == 400 and all(len(group) == 2 for group in drawn)
        [row] = ledger.take()
        assert row["prompt"] == 2 * sum(map(len, prompts)) and row["cached"] > 0
        assert row["generated"] == sum(len(done.tokens) + done.eos for group in drawn for done in group)
        assert f"{servers[0].url} is left out" in caplog.text
        assert all_greedy_and_scored(backend, ledger, [Role.REVISER])[0][Role.REVISER][0] == expected[Role.REVISER][0]
        backend.close()
        with urllib.request.urlopen(f"{servers[1].url}/v1/models") as models_left:
            assert [card["id"] for card in json.load(models_left)["data"]] == [base]
    finally:
        for server in servers:
            server.kill()
