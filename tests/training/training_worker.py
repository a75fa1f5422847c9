"""One rank of a small training, for tests that start it under `accelerate launch`.

python training_worker.py JOB.json: {kind, base, out, spec, seed, keep, start, held, report}. Every rank
writes REPORT.RANK: its rank, the world size, its report and its ledger rows.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flywheel.ledger import Ledger
from flywheel.recipe import ModelSpec, TrainSpec
from flywheel.training import Example, Job, PrmExample, TrainReport, train_prm, train_sft

LABELS = (2, 3)


def make_base(path: Path, vocab: int = 40) -> str:
    """A random Qwen2 of 2 layers with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

    words = {"<pad>": 0, "<eos>": 1, "ok": 2, "no": 3, **{f"w{i}": i for i in range(4, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(path)
    set_seed(0)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return str(path)


def sft_examples(count: int, seed: int) -> list[Example]:
    """Learnable: after the prompt, each token is its forerunner plus one."""
    rng, examples = random.Random(seed), []
    for _ in range(count):
        prompt = [rng.randrange(4, 40) for _ in range(rng.randrange(2, 6))]
        answer = [4 + (prompt[-1] - 3 + i) % 36 for i in range(rng.randrange(2, 16))]
        examples.append(Example((*prompt, *answer, 1), len(prompt)))
    return examples


def prm_examples(count: int, seed: int) -> list[PrmExample]:
    """Learnable: the value is 0.9 where the token read is even, else 0.2."""
    rng, examples = random.Random(seed), []
    for index in range(count):
        tokens = tuple(rng.randrange(4, 40) for _ in range(rng.randrange(4, 24)))
        reads = tuple(sorted(rng.sample(range(1, len(tokens) + 1), rng.randrange(1, 4))))
        values = tuple(0.2 if tokens[read - 1] % 2 else 0.9 for read in reads)
        examples.append(PrmExample(tokens, reads, values, question_id=f"q{index // 4}"))
    return examples


def run(work: dict, ledger: Ledger) -> TrainReport:
    model = ModelSpec(base=work["base"], lora_rank=4, lora_alpha=8)
    spec, out, keep = TrainSpec(**work["spec"]), Path(work["out"]), work.get("keep", "best")
    role = {"prm": "prm", "sft": "policy"}[work["kind"]]
    job = Job(model, spec, out, work.get("seed", 0), keep, role, ledger, work.get("start"))
    if work["kind"] == "prm":
        held = prm_examples(work.get("held", 0), 2)
        return train_prm(prm_examples(100, 0), prm_examples(21, 1), LABELS, job, held)
    return train_sft(sft_examples(100, 0), sft_examples(21, 1), job)


def small_device(room: int) -> None:
    """From the second step on this rank has no memory for micro batches of more than `room`."""
    import torch

    from flywheel.training.losses import SftTrainer

    usual, steps = SftTrainer.training_step, []

    def step(self, model, inputs, *args, **kwargs):
        steps.append(len(inputs["input_ids"]))
        if steps[-1] > room and len(steps) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual(self, model, inputs, *args, **kwargs)

    SftTrainer.training_step = step


if __name__ == "__main__":
    work = json.loads(Path(sys.argv[1]).read_text())
    if os.environ.get("RANK") in work.get("small_devices", []):
        small_device(work["room"])
    ledger = Ledger("test", 1)
    report = run(work, ledger)
    rank = int(os.environ.get("RANK", 0))
    found = {
        "rank": rank,
        "world": int(os.environ.get("WORLD_SIZE", 1)),
        "report": asdict(report),
        "rows": ledger.rows(),
    }
    Path(f"{work['report']}.{rank}").write_text(json.dumps(found))
