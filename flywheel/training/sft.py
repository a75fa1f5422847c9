"""Supervised fine-tuning of a LoRA adapter on a frozen base (distillation, the reviser)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flywheel.ledger import Ledger
from flywheel.recipe import ModelSpec, TrainSpec
from flywheel.training.checkpoints import Keep, TrainingError, TrainReport, check_lengths


@dataclass(frozen=True)
class Example:
    """Token ids, EOS included where the model should learn to end; the loss is on `tokens[loss_from:]`."""

    tokens: tuple[int, ...]
    loss_from: int


def train_sft(
    train: Sequence[Example],
    validation: Sequence[Example],
    *,
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
    """Train on the mean negative log-likelihood of the tokens after `loss_from`; leaves `out/adapter/`.

    Call it on every rank of the launch environment. `keep`: `best` and `all` keep the lowest
    validation loss as `out/adapter`, `last` the end; `all` also leaves every validation
    point's adapter in `out/checkpoints/step-N`. `start`: an adapter of the same shape to train
    on from, in place of a fresh one. Called again after a kill it goes on from
    the last whole checkpoint; called again after the end it returns the same report.
    Rank 0 charges `ledger` for all ranks: training tokens of every epoch, validation as scored.
    Raises TrainingError (a RuntimeError) for examples longer than `spec.max_length`, a batch
    size that the ranks cannot share, or a loss that is not finite.
    """
    from flywheel.training.trainer import SftTrainer, fit

    return fit(
        SftTrainer,
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
    )


def _rows(name: str, examples: Sequence[Example], longest: int) -> list[dict]:
    for index, example in enumerate(examples):
        if not 0 < example.loss_from < len(example.tokens):
            raise TrainingError(
                f"{name} example {index}: loss_from {example.loss_from} leaves nothing to learn of {len(example.tokens)} tokens"
            )
    check_lengths(name, [len(example.tokens) for example in examples], longest)
    return [
        {"input_ids": list(e.tokens), "labels": [-100] * e.loss_from + list(e.tokens[e.loss_from :])} for e in examples
    ]
