"""`flywheel serve` beside `vllm serve` of the same policy, and a mixture of strategies at once.

    python -m eval.bench.serve runs/chain --requests 200 --repeats 3

Both servers run at the same time and are asked in turns, so that a noisy machine slows both: all requests at once, at
temperature 0, of the run's test questions. Prints JSON: requests/s of each and the median, least and greatest ratio
(ours over theirs; goal: median >= 0.9), how many texts are equal; then, of as many requests with different strategies
at once, seconds to an answer by strategy, how many greedy answers are those of the first part (an answer that crossed
over to another question would not be), and whether the bills add up to what the server counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path

import httpx
import numpy as np

from flywheel.export import export
from flywheel.records import Split
from flywheel.runs.ranks import free_port
from flywheel.runs.run import Run
from flywheel.stages.kit import prompts_and_reader

MIXTURE = ("auto", "greedy", "best_of_n:4", "beam:4:width=2", "adaptive:8", "revise:4")
START_SECONDS = 300.0


@contextmanager
def server(command: Sequence[str], port: int, folder: Path, **more: str) -> Iterator[str]:
    """The URL of a server that is ready; ended on exit. Its output is in `folder`."""
    log = folder / f"{port}.log"
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **more})
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
            while not ready(url):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{' '.join(command[:4])} did not start: {log.read_text()[-2000:]}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def all_at_once(asked: Sequence, ask: Callable) -> tuple[list, float]:
    """(the answers in order, seconds until the last)."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(ask, asked))
    return found, time.perf_counter() - begun


def measure(run: Run, round: int | None, requests: int, repeats: int) -> dict:
    prompts, reader = prompts_and_reader(run)
    test = run.problems(Split.TEST)
    questions = [test[i % len(test)].question for i in range(requests)]
    served, engine = max(run.rounds) if round is None else round, run.recipe.engine
    name, most = f"{run.recipe.name}-{served}", run.recipe.sample.max_tokens
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        policy = export(run, folder / "exported", served) / "policy"
        ports = free_port(), free_port()
        run_it = [sys.executable, "-m", "flywheel", "serve", str(run.root), "--round", str(served)]
        ours = stack.enter_context(server([*run_it, "--port", str(ports[0]), "--queue", "1024"], ports[0], folder))
        # what `vllm serve` starts; the command itself wants a package vllm, which the build for CPUs is not called
        vllm = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(policy)]
        limits = [
            "--port",
            str(ports[1]),
            "--max-model-len",
            str(engine.max_model_len),
            "--max-num-seqs",
            str(engine.max_running),
        ]
        theirs = stack.enter_context(
            server([*vllm, *limits, "--served-model-name", name], ports[1], folder, VLLM_CPU_KVCACHE_SPACE="1")
        )
        client = stack.enter_context(httpx.Client(timeout=600, limits=httpx.Limits(max_connections=None)))

        def post(url: str, body: dict) -> dict:
            done = client.post(f"{url}/v1/completions", json={"model": name, **body})
            done.raise_for_status()
            return done.json()

        def ask_ours(question) -> str:
            return post(ours, {"prompt": question.text, "temperature": 0})["choices"][0]["text"]

        def ask_theirs(question) -> str:
            body = {"prompt": prompts.solve(question), "temperature": 0, "max_tokens": most}
            body["stop_token_ids"] = sorted(reader.stop)
            return post(theirs, body)["choices"][0]["text"]

        rates: dict[str, list[float]] = {"flywheel": [], "vllm": []}
        texts: dict[str, list[str]] = {}
        ways = [("flywheel", ask_ours), ("vllm", ask_theirs)]
        for repeat in range(-1, repeats):  # the first turn warms both up
            for which, way in ways if repeat % 2 else ways[::-1]:
                texts[which], seconds = all_at_once(questions, way)
                if repeat >= 0:
                    rates[which].append(requests / seconds)
        ratios = [a / b for a, b in zip(rates["flywheel"], rates["vllm"])]
        equal = sum(a.strip() == b.strip() for a, b in zip(texts["flywheel"], texts["vllm"]))
        return {
            "run": run.root.name,
            "round": served,
            "requests": requests,
            "greedy": {
                "requests_per_second": {which: statistics.median(rate) for which, rate in rates.items()},
                "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
                "equal_texts": equal,
            },
            "mixture": mixture(post, ours, questions, texts["flywheel"]),
        }


def counted(url: str) -> int:
    """All tokens that a flywheel server has charged."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("flywheel_tokens_total")))


def mixture(post: Callable, url: str, questions: Sequence, greedy: Sequence[str]) -> dict:
    before = counted(url)

    def ask(number: int) -> tuple[float, dict]:
        begun, strategy = time.perf_counter(), MIXTURE[number % len(MIXTURE)]
        done = post(url, {"prompt": questions[number].text, "strategy": strategy})
        return time.perf_counter() - begun, done

    answers, seconds = all_at_once(range(len(questions)), ask)
    out: dict = {"seconds": seconds, "requests_per_second": len(questions) / seconds, "seconds_to_answer": {}}
    for i, strategy in enumerate(MIXTURE):
        waits = [wait for wait, _ in answers[i :: len(MIXTURE)]]
        out["seconds_to_answer"][strategy] = dict(zip(("p50", "p95", "p99"), np.percentile(waits, (50, 95, 99))))
    alone = range(MIXTURE.index("greedy"), len(questions), len(MIXTURE))
    out["greedy_equal"] = sum(answers[i][1]["choices"][0]["text"] == greedy[i] for i in alone)
    out["greedy_asked"] = len(alone)
    out["tokens_billed"] = sum(done["usage"]["total_tokens"] for _, done in answers)
    out["tokens_counted"] = counted(url) - before
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Run, metavar="RUN")
    parser.add_argument("--round", type=int, metavar="R", help="the models after this round (default: the last)")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with redirect_stdout(sys.stderr):
        found = measure(args.run, args.round, args.requests, args.repeats)
    print(json.dumps({"command": " ".join(["python -m eval.bench.serve", *sys.argv[1:]]), **found}, indent=1))


if __name__ == "__main__":
    main()
