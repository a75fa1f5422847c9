"""Small models of the families that people bring, with tokenizers and chat templates in the families' manner.

Two layers of width 64, random by a seed, a byte-level BPE trained on the spot; templates are the published
ones, shortened to what a text-only conversation reaches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flywheel.recipe import PromptSpec

TURNS = (  # ChatML, of Qwen and SmolLM2
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = TURNS.replace(
    "assistant\n{%",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{%",
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GRANITE = (
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """`kind`: the prefix of transformers' classes. `bos`: whether the tokenizer puts it before every text."""

    kind: str
    eos: str
    template: str | None = None
    bos: str | None = None
    special: tuple[str, ...] = ()
    pad: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama3": Family("Llama", "<|eot_id|>", LLAMA3, "<|begin_of_text|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "gemma2": Family(
        "Gemma2",
        "<eos>",
        GEMMA,
        "<bos>",
        ("<start_of_turn>", "<end_of_turn>"),
        "<pad>",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 512, "final_logit_softcapping": 10.0},
    ),
    "gemma3": Family(
        "Gemma3",
        "<eos>",
        GEMMA,
        "<bos>",
        ("<start_of_turn>", "<end_of_turn>"),
        "<pad>",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 512},
    ),
    "qwen2.5": Family("Qwen2", "<|im_end|>", TURNS, None, ("<|im_start|>",), "<|endoftext|>"),
    "qwen3": Family("Qwen3", "<|im_end|>", QWEN3, None, ("<|im_start|>",), "<|endoftext|>", {"head_dim": 32}),
    "mistral": Family("Mistral", "</s>", MISTRAL, "<s>", ("[INST]", "[/INST]")),
    "phi3": Family("Phi3", "<|endoftext|>", PHI3, None, ("<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>"),
    "gpt_neox": Family("GPTNeoX", "<|endoftext|>"),
    "phi2": Family("Phi", "<|endoftext|>"),
    "smollm2": Family("Llama", "<|im_end|>", TURNS, None, ("<|im_start|>",), config={"tie_word_embeddings": True}),
    "granite": Family(
        "Granite",
        "<|end_of_text|>",
        GRANITE,
        None,
        ("<|start_of_role|>", "<|end_of_role|>"),
        config={"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
}


def tokenizer(name: str):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    named = {"eos_token": family.eos, "bos_token": family.bos, "pad_token": family.pad}
    named = {key: token for key, token in named.items() if token}
    special = list(dict.fromkeys([*named.values(), *family.special]))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["What is 3 and 5? Check: is 3 and 5 right?\n3 then 5\nAnswer 0\n\n"] * 20, trainer)
    if family.bos:
        at = bpe.token_to_id(family.bos)
        bpe.post_processor = processors.TemplateProcessing(f"{family.bos} $A", special_tokens=[(family.bos, at)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, chat_template=family.template, clean_up_tokenization_spaces=False, **named
    )


def model(name: str, folder: Path, seed: int = 0, **changes: Any) -> str:
    """Write a random model of the family `name` with its tokenizer; `changes` to its config. Returns the path."""
    import torch
    import transformers

    family, words = FAMILIES[name], tokenizer(name)
    kind = family.kind + ("Text" if family.kind == "Gemma3" else "")
    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": len(words),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "initializer_range": 0.15,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": words.pad_token_id,
            "tie_word_embeddings": family.kind.startswith("Gemma"),
        }
        | family.config
        | changes
    )
    torch.manual_seed(seed)
    made = getattr(transformers, f"{family.kind}ForCausalLM")(config)
    with torch.no_grad():
        for key, weight in made.named_parameters():
            if key.endswith("bias"):  # zero in a fresh model, and then nobody would miss it
                weight.normal_(std=0.3)
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def taught(name: str, folder: Path, prompts: PromptSpec, questions: list[tuple[str, str]], steps: int = 200) -> str:
    """A model of the family that writes solutions in the form of `prompts`, right in about half the cases.

    questions: (question, answer) pairs of one digit. It learns the form from random answers.
    """
    import random

    import torch
    from transformers import AutoModelForCausalLM

    from flywheel.models.prompts import Prompts
    from flywheel.models.steps import Reader
    from flywheel.records import Question

    base, words, rng = model(name, folder, initializer_range=0.05), tokenizer(name), random.Random(0)
    asked, end = Prompts(prompts, words), Reader(words, prompts).eos
    learner = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    optimizer = torch.optim.AdamW(learner.parameters(), lr=5e-3)
    for _ in range(steps):
        rows = []
        for question, _ in rng.sample(questions, 8):
            text = f"{question.replace('and', 'then')}\nAnswer {rng.randint(0, 1)}"
            rows.append((asked.solve(Question("", question)), [*words.encode(text, add_special_tokens=False), end]))
        longest = max(len(head) + len(tail) for head, tail in rows)
        ids, labels = torch.zeros(8, longest, dtype=torch.long), torch.full((8, longest), -100)
        for row, (head, tail) in enumerate(rows):
            ids[row, : len(head) + len(tail)] = torch.tensor([*head, *tail])
            labels[row, len(head) : len(head) + len(tail)] = torch.tensor(tail)
        learner(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learner.save_pretrained(folder)
    return base
