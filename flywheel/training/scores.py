"""Values at step ends by a direct transformers forward: the PRM's side of training, and its check."""

from __future__ import annotations

import os

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class PrmCollator:
    """Rows -> padded tensors: input_ids and attention_mask (B, T); values, weights and `at` (B, R).

    `positions` (U,) are the distinct positions read anywhere in the batch; `at` says which of
    them each read is. Logits are made at these U positions only. Padded reads weigh 0.
    """

    def __init__(self, pad: int):
        self.pad = pad

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        positions = sorted({read - 1 for row in rows for read in row["reads"]})
        place = {position: index for index, position in enumerate(positions)}

        def padded(lists: list[list], fill, dtype) -> torch.Tensor:
            longest = max(map(len, lists))
            return torch.tensor([[*items, *[fill] * (longest - len(items))] for items in lists], dtype=dtype)

        return {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad, torch.long),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0, torch.long),
            "positions": torch.tensor(positions),
            "at": padded([[place[read - 1] for read in row["reads"]] for row in rows], 0, torch.long),
            "values": padded([row["values"] for row in rows], 0.0, torch.float32),
            "weights": padded([row["weights"] for row in rows], 0.0, torch.float32),
        }


def label_margins(model, batch: dict, labels: tuple[int, int]) -> torch.Tensor:
    """Logit of labels[0] less that of labels[1] at every read, (B, R), float32.

    Its sigmoid is the softmax over the two labels.
    """
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=batch["positions"],
        use_cache=False,
    ).logits
    margins = logits[..., labels[0]].float() - logits[..., labels[1]].float()
    return margins.gather(1, batch["at"])


def on_cpu() -> bool:
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


def dtype() -> str:
    """Of the frozen base. LoRA weights and losses are float32 always."""
    return "float32" if on_cpu() or not torch.cuda.is_bf16_supported() else "bfloat16"


def forward_values(
    base: str, adapter: str | None, rows: list[dict], labels: tuple[int, int], batch_size: int
) -> tuple[list[tuple[float, ...]], int]:
    """(values at each row's reads, parameters of the model)."""
    device = "cpu" if on_cpu() else "cuda"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype(), use_safetensors=True).to(device)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).to(device)
    model.eval()
    values: list[tuple[float, ...]] = [()] * len(rows)
    collate = PrmCollator(pad=0)
    ranked = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    with torch.inference_mode():
        for start in range(0, len(ranked), batch_size):
            indices = ranked[start : start + batch_size]
            batch = {name: tensor.to(device) for name, tensor in collate([rows[index] for index in indices]).items()}
            for index, scores in zip(indices, label_margins(model, batch, labels).sigmoid().tolist()):
                values[index] = tuple(scores[: len(rows[index]["reads"])])
    return values, sum(p.numel() for p in model.parameters())
