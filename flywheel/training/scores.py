"""A PRM's step values by a transformers forward pass, and their quality: AUC and calibration."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import AutoModelForCausalLM

from flywheel.models.vllm_cpu import has_bfloat16
from flywheel.training.examples import PrmExample, rows


class PrmCollator:
    """Rows to padded tensors: input_ids and attention_mask (B, T); values, weights and `at` (B, R).

    `positions` (U,): the distinct positions read anywhere in the batch; logits are computed only there.
    `at`: the index into `positions` of each read. Padding reads have weight 0.
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
    """Logit of labels[0] minus logit of labels[1] at every read: (B, R), float32. Its sigmoid is the value."""
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=batch["positions"],
        use_cache=False,
    ).logits
    margins = logits[..., labels[0]].float() - logits[..., labels[1]].float()
    return margins.gather(1, batch["at"])


def on_cpu() -> bool:
    """Whether there is no CUDA device or accelerate was told not to use it."""
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


LARGE = 100 << 20  # bytes of weights from which bfloat16 trains faster on a CPU; a smaller model has small matrices


def dtype(base: str) -> str:
    """The dtype of the frozen base and of its matrix products. LoRA weights and losses are always float32.

    A model of 135M parameters on two cores with AMX trained 382 tokens/s in bfloat16 and 319 in float32 with bfloat16
    products; float32 throughout was several times slower.
    """
    if not on_cpu():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    size = sum(path.stat().st_size for path in Path(base).glob("*.safetensors"))
    return "bfloat16" if size > LARGE and has_bfloat16() else "float32"


@torch.no_grad()
def values_of(
    model, rows: list[dict], labels: tuple[int, int], batch_size: int, device, rank: int = 0, world: int = 1
) -> list[tuple[float, ...]]:
    """The values in [0, 1] at each row's reads, in the order of `rows`. `world` ranks share the rows; all call it.

    All ranks make equally many passes: a model that is divided among them (ZeRO-3) gathers its weights in each.
    """
    model.eval()
    collate, found = PrmCollator(pad=0), []
    ranked = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    for start in range(0, len(ranked), batch_size * world):
        several = ranked[start : start + batch_size * world]
        indices = several[rank::world] or several[:1]
        batch = {name: tensor.to(device) for name, tensor in collate([rows[index] for index in indices]).items()}
        for index, scores in zip(indices, label_margins(model, batch, labels).sigmoid().tolist()):
            found.append((index, tuple(scores[: len(rows[index]["reads"])])))
    values = dict(gather_object(found) if world > 1 else found)
    return [values[index] for index in range(len(rows))]


def score_all(
    base: str, adapter: str | None, examples: Sequence[PrmExample], labels: tuple[int, int], batch_size: int = 64
) -> list[tuple[float, ...]]:
    """The values in [0, 1] at each example's reads, in the order of `examples`; one pass per example, on one rank.

    For studies: no ledger is charged. Raises TrainingError for a malformed example.
    """
    device = "cpu" if on_cpu() else "cuda"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype(base), use_safetensors=True).to(device)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).to(device)
    return values_of(model, rows("scored", examples), labels, batch_size, device)


def within_question_auc(scores: Sequence[float], correct: Sequence[bool], questions: Sequence[str]) -> float | None:
    """Mean ROC AUC over the questions that have both correct and incorrect solutions; None if there are none.

    Unlike an AUC over all solutions, it gives no credit for telling easy questions from hard ones.
    """
    from sklearn.metrics import roc_auc_score

    groups: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    for score, right, question in zip(scores, correct, questions, strict=True):
        groups[question].append((right, score))
    areas = [roc_auc_score(*zip(*group)) for group in groups.values() if len({right for right, _ in group}) == 2]
    return float(sum(areas) / len(areas)) if areas else None


def calibration(scores: Sequence[float], targets: Sequence[float], bins: int = 10) -> list[dict]:
    """{low, high, n, mean score, mean target} of each non-empty bin of equal width over [0, 1].

    A calibrated PRM has score = target in every bin. The last bin includes 1. Raises ValueError for a score outside.
    """
    groups: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for score, target in zip(scores, targets, strict=True):
        if not 0 <= score <= 1:
            raise ValueError(f"score {score} is outside [0, 1]")
        groups[min(int(score * bins), bins - 1)].append((score, target))
    return [
        {
            "low": index / bins,
            "high": (index + 1) / bins,
            "n": len(group),
            "score": sum(score for score, _ in group) / len(group),
            "target": sum(target for _, target in group) / len(group),
        }
        for index, group in sorted(groups.items())
    ]
