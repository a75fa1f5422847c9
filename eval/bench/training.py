"""Training tokens/s and memory on a CPU: what flywheel changes of TRL's training, and TRL's own.

    python -m eval.bench.training data/smollm2_135m --repeats 3

`ours` computes logits at the trained positions alone and keeps freed memory; `trl` has TRL's loss and the C library's
own settings. Each training runs in a process of its own, in alternating order, on the same random texts, trained on
their second half. Prints JSON: tokens/s and peak memory of each, and the median, least and greatest ratio ours / trl.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import statistics
import sys
import tempfile
from pathlib import Path


def train(way: str, model: str, batch: int, steps: int, length: int) -> tuple[float, float]:
    """(tokens/s, bytes of memory at the peak) of one training; call it in a fresh process."""
    sys.stdout = sys.stderr  # DeepSpeed logs there when imported
    os.environ |= {"ACCELERATE_USE_CPU": "true", "WANDB_MODE": "disabled"}
    from flywheel.ledger import Ledger
    from flywheel.models.weights import load_tokenizer
    from flywheel.recipe import ModelSpec, TrainSpec
    from flywheel.records import Role
    from flywheel.training import Example, Job, losses, train_sft, trainer

    if way == "trl":
        losses.SftTrainer.compute_loss = losses.SFTTrainer.compute_loss
        trainer.keep_memory = lambda: None
    chance, words = random.Random(0), len(load_tokenizer(model))
    texts = [tuple(chance.choices(range(words), k=length)) for _ in range(batch * steps)]
    spec = TrainSpec(batch_size=batch, micro_batch_size=batch, epochs=1, evals=1)
    with tempfile.TemporaryDirectory() as out:
        job = Job(ModelSpec(base=model), spec, Path(out), 0, "last", Role.POLICY, Ledger("bench", 0))
        report = train_sft([Example(text, length // 2) for text in texts], [], job)
    return report.tokens / report.seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="model directory, e.g. data/smollm2_135m")
    parser.add_argument("--batch", type=int, default=16, help="texts in a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=60, help="tokens of a text")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rates, memory = ({"ours": [], "trl": []} for _ in range(2))
    for repeat in range(args.repeats):
        for way in ("ours", "trl") if repeat % 2 else ("trl", "ours"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rate, peak = pool.apply(train, (way, args.model, args.batch, args.steps, args.length))
            rates[way].append(rate)
            memory[way].append(peak)
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["trl"])]
    found = {
        "tokens_per_second": {way: round(statistics.median(values)) for way, values in rates.items()},
        "peak_gb": {way: round(statistics.median(values) / 1e9, 2) for way, values in memory.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "repeats": args.repeats},
    }
    print(json.dumps({"model": args.model, **found}, indent=1))


if __name__ == "__main__":
    main()
