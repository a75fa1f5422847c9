"""The process reward model: soft labels on two tokens' logits at step ends (Snell et al., appendix D)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flywheel.ledger import Ledger
from flywheel.recipe import ModelSpec, TrainSpec
from flywheel.training.checkpoints import Keep, TrainingError, TrainReport, check_lengths


@dataclass(frozen=True)
class PrmExample:
    """A solution's text and where its values are read.

    `reads[i]` is a prefix length in tokens: the value after step i is read from the logits
    at position reads[i] - 1. `values[i]` in [0, 1]: the fraction of rollouts that came out
    right. `weights[i]` >= 0 (default 1).
    """

    tokens: tuple[int, ...]
    reads: tuple[int, ...]
    values: tuple[float, ...]
    weights: tuple[float, ...] | None = None
    question_id: str = ""


def targets(values: Sequence[float], start: float, target: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(targets, weights) for the PRM's loss, of a solution's Monte Carlo step values in [0, 1].

    `value`: the values themselves, all of weight 1 (Snell et al., appendix D).

    `progress`: what share of the chance of success the step leaves, min(1, v_i / v_(i-1)), with
    weight v_(i-1), for a quotient of small counts is mostly noise; v_0 is `start`, the question's
    pass rate. After a step of value 0 nothing is learned. The product of a solution's progress
    telescopes to its last value, so the product over steps is what `last` is of a PRM of values,
    without the model having to sum up the steps itself, which a small one learns badly
    (measured: eval/LOG.md). Near Setlur et al. 2024 (arXiv 2410.08146), who reward the difference.
    """
    if target == "value":
        return tuple(values), (1.0,) * len(values)
    before = (start, *values[:-1])
    return tuple(min(1.0, v / p) if p else 0.0 for v, p in zip(values, before)), before


def train_prm(
    train: Sequence[PrmExample],
    validation: Sequence[PrmExample],
    *,
    labels: tuple[int, int],
    base: str,
    model: ModelSpec,
    spec: TrainSpec,
    out: Path,
    seed: int,
    keep: Keep,
    role: str,
    ledger: Ledger,
    start: str | None = None,
) -> TrainReport:
    """Train P(labels[0]) / (P(labels[0]) + P(labels[1])) towards the values, by soft binary cross-entropy.

    The loss is the weighted mean over all read positions of the global batch. Step 0 of the
    curve is the un-finetuned base, or `start`. Otherwise as `train_sft`, TrainingErrors included; values
    outside [0, 1] and NaN raise too.
    """
    from flywheel.training.trainer import PrmTrainer, fit

    return fit(
        PrmTrainer,
        _rows("training", train, spec.max_length),
        _rows("validation", validation, spec.max_length),
        base=base,
        model=model,
        spec=spec,
        out=out,
        seed=seed,
        keep=keep,
        role=role,
        ledger=ledger,
        start=start,
        label_tokens=labels,
    )


def score_all(
    base: str,
    adapter: str | None,
    examples: Sequence[PrmExample],
    labels: tuple[int, int],
    *,
    ledger: Ledger,
    role: str = "prm",
    purpose: str = "score",
    batch_size: int = 64,
) -> list[tuple[float, ...]]:
    """The values in [0, 1] at every example's reads, in the order given; all reads of an example in one pass.

    A direct transformers forward (PEFT where `adapter` is given), float32 on a CPU. Not
    distributed: call it on one rank.
    """
    from flywheel.training.scores import forward_values

    rows = _rows("scored", examples, longest=max((len(e.tokens) for e in examples), default=0))
    values, parameters = forward_values(base, adapter, rows, labels, batch_size)
    ledger.charge(role, purpose, parameters=parameters, scored=sum(len(e.tokens) for e in examples))
    return values


def _rows(name: str, examples: Sequence[PrmExample], longest: int) -> list[dict]:
    rows = []
    for index, example in enumerate(examples):
        weights = example.weights or (1.0,) * len(example.reads)
        where = f"{name} example {index}" + (f" (question {example.question_id})" if example.question_id else "")
        if not example.reads or not len(example.reads) == len(example.values) == len(weights):
            raise TrainingError(
                f"{where}: {len(example.reads)} reads, {len(example.values)} values, {len(weights)} weights"
            )
        if not all(0 < read <= len(example.tokens) for read in example.reads):
            raise TrainingError(f"{where}: reads {example.reads} outside its {len(example.tokens)} tokens")
        if not all(0 <= value <= 1 for value in example.values):  # False for NaN too
            raise TrainingError(f"{where}: values {example.values} outside [0, 1]")
        if not all(0 <= weight < math.inf for weight in weights) or not sum(weights):
            raise TrainingError(f"{where}: weights {weights} are not non-negative numbers of positive sum")
        rows.append(
            {
                "input_ids": list(example.tokens),
                "reads": list(example.reads),
                "values": [float(value) for value in example.values],
                "weights": [float(weight) for weight in weights],
            }
        )
    check_lengths(name, [len(e.tokens) for e in examples], longest, [e.question_id for e in examples])
    return rows


def within_question_auc(scores: Sequence[float], correct: Sequence[bool], questions: Sequence[str]) -> float | None:
    """Plain mean, over the questions with both classes, of each one's ROC AUC; None if there is no such question.

    Unlike the AUC over all solutions it gives no credit for telling easy questions from hard ones.
    """
    from sklearn.metrics import roc_auc_score

    groups: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    for score, right, question in zip(scores, correct, questions, strict=True):
        groups[question].append((right, score))
    areas = [roc_auc_score(*zip(*group)) for group in groups.values() if len({right for right, _ in group}) == 2]
    return float(sum(areas) / len(areas)) if areas else None


def calibration(scores: Sequence[float], targets: Sequence[float], bins: int = 10) -> list[dict]:
    """Equal-width bins over [0, 1]: {low, high, n, score, target}, the means of each non-empty bin.

    A calibrated PRM has score = target in every bin. The last bin includes 1.
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
