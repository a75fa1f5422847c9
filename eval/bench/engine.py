"""Sampling tokens/s of flywheel's scheduler against plain `LLM.generate` of the same requests.

    python -m eval.bench.engine data/chain/seed_model --requests 512 --repeats 5

Both run in one process on engines of the same settings, in alternating order (which comes
first changes with each repeat), after one uncounted turn each. Prints JSON: tokens/s of
each, and the median, least and greatest ratio scheduler / plain (goal: median >= 0.95).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from flywheel.ledger import Ledger
from flywheel.models.backend import open_backend
from flywheel.models.driver import Backend
from flywheel.models.engine import Sampling
from flywheel.models.weights import load_tokenizer
from flywheel.recipe import EngineSpec
from flywheel.records import ModelRef, Role


def questions(base: str, count: int, seed: int) -> list[list[int]]:
    """`count` random prompts: `Q`, a start and 1 to 12 operations, or random ids if the tokenizer has no operations."""
    tokenizer, chance = load_tokenizer(base), random.Random(seed)
    special = set(tokenizer.all_special_ids)
    usual = [i for i in range(len(tokenizer)) if i not in special]
    operations = [
        i for i in usual if tokenizer.decode([i]).strip()[:1] in set("+-*") and len(tokenizer.decode([i]).strip()) > 1
    ]
    words = operations or usual
    head, tail = (
        (tokenizer.encode(text, add_special_tokens=False) for text in ("Q 5", "?\nTry")) if operations else ([], [])
    )
    return [[*head, *chance.choices(words, k=chance.randint(1, 12)), *tail] for _ in range(count)]


def sampled(backend: Backend, prompts: list[list[int]], sampling: Sampling, samples: int) -> int:
    """The tokens of `samples` completions of each prompt, EOS included."""

    async def work(prompt: list[int]) -> int:
        drawn = await backend.engine(Role.POLICY).generate(prompt, sampling, purpose="sample", n=samples)
        return sum(len(one.tokens) + one.eos for one in drawn)

    return sum(backend.run(prompts, work))


def measure(base: str, requests: int, samples: int, max_tokens: int, repeats: int, spec: EngineSpec) -> dict:
    """The figures that `main` prints, for `requests` prompts with `samples` samples each."""
    from flywheel.models.vllm import engine_arguments  # sets vLLM's environment before its import

    backend = open_backend(
        spec, {Role.POLICY: ModelRef("policy_0", base)}, Ledger("bench", 0), 0, Path(tempfile.gettempdir())
    )
    from vllm import LLM, SamplingParams

    llm = LLM(**engine_arguments(spec, base))

    def scheduler(prompts: list[list[int]]) -> int:
        return sampled(backend, prompts, Sampling(max_tokens), samples)

    def generate(prompts: list[list[int]]) -> int:
        params = SamplingParams(n=samples, max_tokens=max_tokens, temperature=1.0, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return sum(len(one.token_ids) for output in outputs for one in output.outputs)

    rates: dict[str, list[float]] = {"scheduler": [], "plain": []}
    ways = [("scheduler", scheduler), ("plain", generate)]
    for repeat in range(-1, repeats):
        prompts = questions(base, requests, repeat)
        for name, way in ways if repeat % 2 else ways[::-1]:
            start = time.perf_counter()
            rate = way(prompts) / (time.perf_counter() - start)
            if repeat >= 0:
                rates[name].append(rate)
    backend.close()
    ratios = [ours / theirs for ours, theirs in zip(rates["scheduler"], rates["plain"])]
    return {
        "model": base,
        "requests": requests,
        "samples": samples,
        "dtype": str(llm.model_config.dtype).removeprefix("torch."),
        "tokens_per_second": {name: round(statistics.median(values)) for name, values in rates.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "repeats": repeats},
    }


def options(about: str, requests: int) -> argparse.ArgumentParser:
    """The options of the benchmarks of sampling; `requests`: the default."""
    parser = argparse.ArgumentParser(description=about.split("\n\n")[0])
    parser.add_argument("model", help="model directory, e.g. data/chain/seed_model")
    parser.add_argument("--requests", type=int, default=requests, help="prompts in a repeat")
    parser.add_argument("--samples", type=int, default=1, help="samples of each prompt")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-running", type=int, default=EngineSpec().max_running)
    return parser


def main() -> None:
    parser = options(__doc__, requests=512)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    args = parser.parse_args()
    spec = EngineSpec(max_model_len=512, dtype=args.dtype, max_running=args.max_running, gpu_memory=0.4)
    print(json.dumps(measure(args.model, args.requests, args.samples, args.max_tokens, args.repeats, spec), indent=1))


if __name__ == "__main__":
    main()
