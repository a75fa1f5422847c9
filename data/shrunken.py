"""A published architecture, shrunken, on which the recipe for one's own questions truly runs.

    python -m data.shrunken --out DIR

makes, with no download: word problems in GSM8K's format (`DIR/gsm8k`, every row made here), a
byte-level BPE tokenizer trained on them with a ChatML chat template, a Qwen2 of few layers that is
randomly initialised and then trained for a minute on planted solutions (`DIR/model`), and
`DIR/recipe.yaml`: the Qwen recipe with these paths and small numbers. The planted author errs, so
that a sampled answer is right often, but not always. It says nothing about any published weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from flywheel import recipe as recipes
from flywheel.models.prompts import Prompts
from flywheel.records import Question

RECIPE = Path(__file__).parents[1] / "recipes" / "qwen25_05b_gsm8k.yaml"
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen2's own pre-tokenizer: digits one by one, punctuation together with the newlines after it.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

NAMES = ("Ada", "Ben", "Chen", "Dora", "Emil", "Fay", "Gus", "Hana")
THINGS = ("apples", "books", "cards", "coins", "pens", "shells", "stamps", "toys")
GAINS, LOSSES = ("finds {} more", "buys {} more", "gets {} as a gift"), ("loses {}", "gives away {}", "sells {}")
CHANGES = (2, 2, 3)  # steps of a problem, drawn from
SLIP = 0.1  # how often the planted author gets a step wrong
THREADS = 0.15  # fraction of planted texts with a second attempt, so that the model knows revisions


@dataclass(frozen=True)
class WordProblem:
    text: str
    start: int
    changes: tuple[int, ...]

    @property
    def answer(self) -> int:
        return self.start + sum(self.changes)

    def solution(self, rng: random.Random | None = None) -> str:
        """The solution, one step per line; with `rng`, with the author's random errors."""
        value, lines = self.start, []
        for change in self.changes:
            result = value + change
            if rng is not None and rng.random() < SLIP:
                result = max(0, result + rng.choice((-2, -1, 1, 2)))
            lines.append(f"{value} {'+' if change > 0 else '-'} {abs(change)} = {result}.")
            value = result
        return "\n".join([*lines, f"The answer is \\boxed{{{value}}}."])


def make_problem(rng: random.Random, how_many: tuple[int, ...] = CHANGES) -> WordProblem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    start = value = rng.randrange(3, 10)
    told, changes = [], []
    for _ in range(rng.choice(how_many)):
        change = rng.choice([n for n in range(-6, 7) if n and 0 < value + n <= 15])
        value += change
        changes.append(change)
        told.append(f"{name} {rng.choice(GAINS if change > 0 else LOSSES).format(abs(change))}.")
    return WordProblem(
        f"{name} has {start} {thing}. {' '.join(told)} How many {thing} does {name} have now?", start, tuple(changes)
    )


def distinct(rng: random.Random, count: int) -> list[WordProblem]:
    found: dict[str, WordProblem] = {}
    while len(found) < count:
        problem = make_problem(rng)
        found.setdefault(problem.text, problem)
    return list(found.values())


def write_problems(folder: Path, problems: list[WordProblem], tests: int) -> None:
    """GSM8K's two files; the last `tests` problems are the test split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", problems[:-tests]), ("test", problems[-tests:])):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for row in rows:
                solution = "\n".join(row.solution().split("\n")[:-1])
                file.write(json.dumps({"question": row.text, "answer": f"{solution}\n#### {row.answer}"}) + "\n")


def make_tokenizer(prompts: recipes.PromptSpec, seed: int):
    """A BPE tokenizer like Qwen2's, of about 500 tokens, trained on problems, solutions and prompts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(f"tokenizer/{seed}")
    texts = [text for problem in distinct(rng, 2000) for text in (problem.text, problem.solution(rng))]
    texts += [text for text in (prompts.solve, prompts.check, prompts.again, prompts.system or "") for _ in range(200)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=512, special_tokens=[PAD, START, END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def make_model(architecture: str, tokenizer, seed: int):
    """The architecture with random weights: 3 layers, hidden 64, grouped-query attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        # two heads of 32: vLLM's CPU attention does not support heads of 16
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def curriculum(progress: float) -> tuple[int, ...]:
    """Number of changes in a planted problem: one at first, or the short training would learn nothing."""
    return (1,) if progress < 0.15 else (1, 2) if progress < 0.3 else CHANGES


def planted(
    prompts: Prompts, rng: random.Random, reserved: set[str], documents: int
) -> Iterator[tuple[list[int], list[bool]]]:
    """`documents` pairs of (token ids, whether each gets loss), of new problems that are not in the problem set."""

    def encode(text: str) -> list[int]:
        return prompts.tokenizer.encode(text, add_special_tokens=False)

    for number in range(documents):
        problem = make_problem(rng, curriculum(number / documents))
        while problem.text in reserved:
            problem = make_problem(rng)
        ids = prompts.solve(Question("planted", problem.text))
        learned = [False] * len(ids)
        for attempt in range(2 if rng.random() < THREADS else 1):
            again = encode(prompts.spec.again) if attempt else []
            solution = encode(problem.solution(rng))
            ids += again + solution
            learned += [False] * len(again) + [True] * len(solution)
        yield [*ids, prompts.tokenizer.eos_token_id], [*learned, True]


def pretrain(
    model, prompts: Prompts, reserved: set[str], *, steps: int, seed: int, batch: int = 16, peak: float = 4e-3
) -> float:
    """Train on planted solutions; returns the mean loss of the last tenth of the steps."""
    import torch

    documents = planted(prompts, random.Random(f"planted/{seed}"), reserved, steps * batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    model.train()
    for step in range(steps):
        rows = [next(documents) for _ in range(batch)]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((batch, width), prompts.tokenizer.pad_token_id)
        labels = torch.full((batch, width), -100)
        for row, (tokens, learned) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, : len(tokens)] = torch.tensor(
                [token if known else -100 for token, known in zip(tokens, learned)]
            )
        wanted = labels[:, 1:] != -100  # right padding: causal attention never sees it
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[wanted]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), labels[:, 1:][wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = (
                peak * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def small_recipe(out: Path) -> dict:
    """The Qwen recipe with its prompts untouched, these paths and small numbers."""
    data = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    training = {"learning_rate": 2e-3, "batch_size": 16, "micro_batch_size": 16, "evals": 2, "max_length": 768}
    changes = {
        "problems": {"path": str(out / "gsm8k"), "limits": {}, "check_workers": 1},
        "model": {"base": str(out / "model"), "lora_rank": 8, "lora_alpha": 16},
        "engine": {"dtype": "auto", "max_model_len": 768, "kv_cache_mb": 64, "max_running": 64, "chunk": 40},
        "sample": {"per_question": 8, "max_tokens": 64, "max_steps": 8},
        "label": {"questions": 40, "solutions": 2, "rollouts": 4, "validation": 0.2},
        "prm": {**training, "epochs": 2},
        "reviser": {**training, "epochs": 2, "samples": 8, "probe_questions": 8, "probe_attempts": 2},
        "calibrate": {"budgets": [4]},
        "harvest": {"budget": 4, "keep": 2},
        "distill": {**training, "epochs": 4},
        "evaluate": {"samples": 16, "budget": 4, "probe": 2, "revise_attempts": 3, "bootstrap": 200},
    }
    for section, values in changes.items():
        data[section] = {**data.get(section, {}), **values}
    return {**data, "name": "shrunken"}


def build(out: Path, architecture: str = "qwen2", questions: int = 160, steps: int = 1200, seed: int = 0) -> float:
    """Make everything under `out`; returns the last training loss."""
    import torch
    import transformers

    torch.set_num_threads(1)  # steps this small are slower on two: the threads wait for each other
    problems = distinct(random.Random(f"problems/{seed}"), questions + max(4, questions // 4))
    write_problems(out / "gsm8k", problems, tests=len(problems) - questions)
    spec = small_recipe(out)
    checked = recipes.parse(spec, "shrunken")
    (out / "recipe.yaml").write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    tokenizer = make_tokenizer(checked.prompts, seed)
    model = make_model(architecture, tokenizer, seed)
    transformers.logging.set_verbosity_error()
    loss = pretrain(model, Prompts(checked.prompts, tokenizer), {p.text for p in problems}, steps=steps, seed=seed)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--arch", default="qwen2", help="a transformers model type with Llama-like settings (qwen2, llama, ...)"
    )
    parser.add_argument(
        "--questions", type=int, default=160, help="train questions; a quarter as many test questions are added"
    )
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    loss = build(args.out, args.arch, args.questions, args.steps, args.seed)
    print(
        f"{args.out}: {args.questions} questions, model trained to loss {loss:.3f};"
        f" next: accelerate launch -m flywheel.iterate --recipe {args.out}/recipe.yaml --round 1"
    )


if __name__ == "__main__":
    main()
