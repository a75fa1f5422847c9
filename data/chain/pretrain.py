"""Train the seed model from nothing: ``python -m data.chain.pretrain --out DIR --tokens 33000000``.

A Llama of under a million parameters on the endless corpus of corpus.py, with a curriculum: questions of at most
2 operations at first, growing to the longest over the first 30% of the budget.  Writes model and
tokenizer with save_pretrained, ``pretrain.jsonl`` (one line each `--log-every` steps), and a
checkpoint in ``DIR.checkpoint/`` from which the same command continues.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

from . import corpus, tokenizer
from .domain import MAX_K

OK, NO, MARK_WEIGHT = tokenizer.ID["ok"], tokenizer.ID["no"], 4.0
CURRICULUM, DENSE, WARMUP = 0.30, 0.46, 0.02


def config(layers: int, hidden: int, heads: int = 4):
    """Llama with attention biases, which is Qwen2's arithmetic.  Not Qwen2 by name, because transformers 5
    puts Qwen2's own tokenizer in place of whatever a `qwen2` folder holds."""
    from transformers import LlamaConfig

    eos, pad = tokenizer.ID[tokenizer.EOS], tokenizer.ID[tokenizer.PAD]
    return LlamaConfig(
        vocab_size=len(tokenizer.WORDS),
        hidden_size=hidden,
        intermediate_size=hidden * 9 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=True,
        attention_bias=True,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
    )


def longest(progress: float) -> int:
    """The largest number of operations at this fraction of the budget."""
    return min(MAX_K, 2 + int((MAX_K - 1) * progress / CURRICULUM))


def sparse_marks(progress: float) -> float:
    """The share of graded documents that do not mark every line: none until DENSE, all after another 15%."""
    return min(1.0, max(0.0, (progress - DENSE) / 0.15))


def learning_rate(progress: float, peak: float) -> float:
    if progress < WARMUP:
        return peak * progress / WARMUP
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))))


def tensors(batch):
    """Documents -> (ids, labels), padded on the right; causal attention never sees the padding."""
    import torch

    width = max(len(words) for words, _ in batch)
    ids = torch.full((len(batch), width), tokenizer.ID[tokenizer.PAD])
    labels = torch.full((len(batch), width), -100)
    for row, (words, start) in enumerate(batch):
        encoded = torch.tensor([tokenizer.ID[word] for word in words])
        ids[row, : len(words)] = encoded
        labels[row, start : len(words)] = encoded[start:]
    return ids, labels


def train(
    out: Path,
    *,
    minutes: float | None,
    tokens: int | None,
    seed: int,
    batch_tokens: int = 3000,
    peak: float = 3e-3,
    layers: int = 5,
    hidden: int = 128,
    heads: int = 4,
    bf16: bool = False,
    log_every: int = 100,
    save_every: float = 90.0,
) -> dict:
    """Spend the budget (minutes or tokens), save, and return the last log line."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(config(layers, hidden, heads))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=peak, betas=(0.9, 0.98)
    )
    state = {"seconds": 0.0, "tokens": 0, "step": 0, "pool": 0}
    checkpoint = out.with_name(out.name + ".checkpoint") / "state.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    out.mkdir(parents=True, exist_ok=True)
    begun, last_save, losses, line = time.monotonic() - state["seconds"], time.monotonic(), [], {}
    model.train()
    while (progress := state["tokens"] / tokens if tokens else (time.monotonic() - begun) / (60 * minutes)) < 1:
        # A pool's seed depends only on its number, so a resumed training repeats no document.
        state["pool"] += 1
        for batch in corpus.batches(
            random.Random(f"{seed}/{state['pool']}"), longest(progress), sparse_marks(progress), batch_tokens
        ):
            progress = state["tokens"] / tokens if tokens else (time.monotonic() - begun) / (60 * minutes)
            if progress >= 1:
                break
            ids, labels = tensors(batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                hidden_states = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
                wanted = labels[:, 1:] != -100
                logits = model.lm_head(hidden_states[wanted])
            targets = labels[:, 1:][wanted]
            weights = torch.where((targets == OK) | (targets == NO), MARK_WEIGHT, 1.0)
            each = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
            loss = (weights * each).sum() / weights.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, peak)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state["step"] += 1
            state["tokens"] += sum(len(words) for words, _ in batch)
            state["seconds"] = time.monotonic() - begun
            losses.append(loss.item())
            if state["step"] % log_every == 0:
                line = {
                    **state,
                    "loss": sum(losses) / len(losses),
                    "max_k": longest(progress),
                    "tokens_per_second": state["tokens"] / state["seconds"],
                }
                losses = []
                with (out / "pretrain.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
        if time.monotonic() - last_save > save_every:
            last_save = time.monotonic()
            checkpoint.parent.mkdir(exist_ok=True)
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state},
                checkpoint.with_suffix(".new"),
            )
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
    save(model, out)
    return line


def save(model, out: Path) -> None:
    """Model, generation settings and tokenizer, in float32."""
    model.generation_config.do_sample = True
    model.generation_config.eos_token_id = tokenizer.ID[tokenizer.EOS]
    model.generation_config.pad_token_id = tokenizer.ID[tokenizer.PAD]
    model.save_pretrained(out)
    tokenizer.save(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float)
    budget.add_argument("--tokens", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument(
        "--heads", type=int, default=4, help="vLLM's CPU attention wants heads of 32 or more: hidden / heads"
    )
    parser.add_argument("--batch-tokens", type=int, default=3000)
    parser.add_argument("--peak", type=float, default=3e-3)
    parser.add_argument(
        "--bf16", action="store_true", help="bfloat16 autocast: only where the CPU has it (AMX, AVX512-BF16)"
    )
    args = parser.parse_args()
    print(
        json.dumps(
            train(
                args.out,
                minutes=args.minutes,
                tokens=args.tokens,
                seed=args.seed,
                layers=args.layers,
                hidden=args.hidden,
                heads=args.heads,
                batch_tokens=args.batch_tokens,
                peak=args.peak,
                bf16=args.bf16,
            )
        )
    )


if __name__ == "__main__":
    main()
