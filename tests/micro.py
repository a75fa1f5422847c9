"""A random micro model, its tokenizer and an adapter: the real formats at no cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

WORDS = [
    "<pad>",
    "<eos>",
    "\n",
    "Q",
    "?",
    "Try",
    "Check",
    "Again",
    "Answer",
    "ok",
    "no",
    "+",
    "=",
    *map(str, range(50)),
]
EOS = 1


def tokenizer():
    """Word-level: words and newlines are tokens, spaces only separate."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=None))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(Regex(" +"), "removed")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def model(folder: Path, seed: int = 0) -> str:
    """A Qwen2 of two layers, with weights large enough that its next token is far from uniform."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def with_value_head(base: str, folder: Path) -> str:
    """A copy of `base` with a random value head: a published PRM of the format `skywork`."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    head = torch.randn(1, width, generator=torch.manual_seed(0))
    weights |= {"v_head.summary.weight": head, "v_head.summary.bias": torch.zeros(1)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def adapter(base: str, folder: Path, seed: int = 1) -> str:
    """A LoRA adapter of `base` whose both factors are random, so that it changes the model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    adapted.save_pretrained(folder)
    return str(folder)
