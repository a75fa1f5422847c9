"""Sampling tokens/s through one `vllm serve` on this machine against the engine in this process.

    python -m eval.bench.remote data/chain/seed_model --requests 256 --repeats 5

The same requests in turns, after one uncounted turn each: answered whole, and streamed because a `Sampling.done` is
asked after each token, as by solutions that end with their answer. Prints JSON: tokens/s of each, and the median, least
and greatest ratio server / process.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

from eval.bench.engine import options, questions, sampled
from eval.bench.serve import server
from flywheel.ledger import Ledger
from flywheel.models.backend import open_backend
from flywheel.models.engine import Sampling
from flywheel.recipe import EngineSpec
from flywheel.records import ModelRef, Role
from flywheel.runs.ranks import free_port


def measure(base: str, requests: int, samples: int, max_tokens: int, repeats: int, running: int) -> dict:
    """The figures that `main` prints, for `requests` prompts with `samples` samples each."""
    models, port = {Role.POLICY: ModelRef("policy_0", base)}, free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--port", str(port)]
    flags = "--dtype float32 --max-model-len 512 --block-size 32 --enforce-eager --no-enable-chunked-prefill"
    command += [*flags.split(), "--max-num-seqs", str(running), "--kv-cache-memory-bytes", str(256 << 20)]
    specs = {
        "process": EngineSpec(dtype="float32", max_model_len=512, max_running=running),
        "server": EngineSpec(
            kind="server", servers=[f"http://127.0.0.1:{port}"], max_model_len=512, max_running=running
        ),
    }
    with tempfile.TemporaryDirectory() as folder, server(command, port, Path(folder)):
        backends = {name: open_backend(spec, models, Ledger(name, 0), 0, Path(folder)) for name, spec in specs.items()}

        def rate_of(name: str, prompts: list[list[int]], streamed: bool) -> float:
            """Tokens/s."""
            sampling, begun = Sampling(max_tokens, done=never if streamed else None), time.perf_counter()
            return sampled(backends[name], prompts, sampling, samples) / (time.perf_counter() - begun)

        rates: dict[bool, dict[str, list[float]]] = {way: {name: [] for name in specs} for way in (False, True)}
        for repeat in range(-1, repeats):
            prompts = questions(base, requests, repeat)
            for way in rates:
                for name in specs if repeat % 2 else reversed(specs):
                    rate = rate_of(name, prompts, way)
                    if repeat >= 0:
                        rates[way][name].append(rate)
        for backend in backends.values():
            backend.close()
    out = {"model": base, "requests": requests, "samples": samples, "repeats": repeats}
    for way, by in rates.items():
        ratios = [there / here for there, here in zip(by["server"], by["process"])]
        out["streamed" if way else "whole"] = {
            "tokens_per_second": {name: round(statistics.median(values)) for name, values in by.items()},
            "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        }
    return out


def never(tokens: list[int]) -> bool:
    return False


def main() -> None:
    args = options(__doc__, requests=256).parse_args()
    with redirect_stdout(sys.stderr):
        found = measure(args.model, args.requests, args.samples, args.max_tokens, args.repeats, args.max_running)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
