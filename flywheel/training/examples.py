"""Training examples as token ids: their contents, checks, order and batches. Does not import torch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from flywheel.errors import StartAgain, UserError

WINDOW = 16  # batches whose examples are sorted by length together: little padding, yet batches stay random


class TrainingError(UserError):
    """Training cannot continue; the message says why and what to change."""


class OutOfMemory(TrainingError, StartAgain):
    """A rank ran out of memory; started again on all ranks, the training goes on with a smaller micro batch."""


@dataclass(frozen=True)
class Example:
    """A text for supervised fine-tuning (SFT), with EOS if it is to be learned; the loss is on `tokens[loss_from:]`."""

    tokens: tuple[int, ...]
    loss_from: int

    def fault(self) -> str | None:
        if 0 < self.loss_from < len(self.tokens):
            return None
        return f"loss_from {self.loss_from} leaves nothing to learn of {len(self.tokens)} tokens"

    def row(self) -> dict:
        labels = [-100] * self.loss_from + list(self.tokens[self.loss_from :])
        return {"input_ids": list(self.tokens), "labels": labels}


@dataclass(frozen=True)
class PrmExample:
    """A solution for the process reward model (PRM), with the positions and labels of its step values.

    `reads[i]`: a prefix length in tokens; the value after step i is read from the logits at position
    reads[i] - 1. `values[i]`: its soft label in [0, 1], e.g. the fraction of correct rollouts (Snell
    et al. 2024, appendix D). `weights[i]` >= 0, of positive sum; None: all 1.
    """

    tokens: tuple[int, ...]
    reads: tuple[int, ...]
    values: tuple[float, ...]
    weights: tuple[float, ...] | None = None
    question_id: str = ""

    def fault(self) -> str | None:
        row = self.row()
        weights = row["weights"]
        if not self.reads or not len(self.reads) == len(self.values) == len(weights):
            return f"{len(self.reads)} reads, {len(self.values)} values, {len(weights)} weights"
        if not all(0 < read <= len(self.tokens) for read in self.reads):
            return f"reads {self.reads} outside its {len(self.tokens)} tokens"
        if not all(0 <= value <= 1 for value in self.values):  # False for NaN too
            return f"values {self.values} outside [0, 1]"
        if not all(0 <= weight < math.inf for weight in weights) or not sum(weights):
            return f"weights {weights} are not non-negative numbers of positive sum"
        return None

    def row(self) -> dict:
        return {
            "input_ids": list(self.tokens),
            "reads": list(self.reads),
            "values": [float(value) for value in self.values],
            "weights": [float(weight) for weight in self.weights or [1.0] * len(self.reads)],
        }


def rows(name: str, examples: Sequence[Example] | Sequence[PrmExample], longest: int | None = None) -> list[dict]:
    """The examples as rows for the trainers. Nothing is truncated.

    Raises TrainingError for the first example that is malformed or has more than `longest` tokens;
    `name` says in the message which set it belongs to.
    """

    def which(index: int) -> str:
        question = getattr(examples[index], "question_id", "")
        return f"{name} example {index}" + (f" (question {question})" if question else "")

    for index, example in enumerate(examples):
        if fault := example.fault():
            raise TrainingError(f"{which(index)}: {fault}")
    too_long = [index for index, example in enumerate(examples) if longest and len(example.tokens) > longest]
    if too_long:
        first, more = too_long[0], len(too_long) - 1
        raise TrainingError(
            f"{which(first)} has {len(examples[first].tokens)} tokens, max_length is {longest}"
            + (f"; so have {more} more" if more else "")
            + ": raise max_length or filter before training"
        )
    return [example.row() for example in examples]


def targets(
    values: Sequence[float], start: float, target: str, rollouts: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(labels, weights) for the PRM from the Monte Carlo values of one solution's steps, each in [0, 1].

    `rollouts`: the number that a value is the mean of. `start`: the question's pass rate, v_0.

    `value`: the values themselves, all with weight 1 (Snell et al. 2024, appendix D).

    `progress`: the fraction of the success probability that survives the step, min(1, v_i / v_(i-1)),
    with weight v_(i-1), because a ratio of small counts is mostly noise. A step after a value of 0 gets
    weight 0. If no step raises the value, the product of a
    solution's labels is its last value divided by `start`. So a PRM trained on progress is aggregated by
    `product`, one trained on values by `last`; with `product` the model need not combine the steps
    itself, which a small model learns badly (measured: eval/LOG.md). Setlur et al. 2024
    (arXiv 2410.08146) reward a similar quantity, the difference v_i - v_(i-1).

    `ratio`: v_i / (v_(i-1) + v_i) of the same values, each shrunk towards 1/2 by half a success and half a
    failure, with the shrunk v_(i-1) as weight. 1/2 is a step that changes nothing. The odds of the labels
    multiply to v_T / v_0 however many steps there are (aggregate `odds`), while the clipped ratios of
    `progress` fall with length: the mean of min(1, .) over noise is below 1.
    """
    if target == "value":
        return tuple(values), (1.0,) * len(values)
    if target == "ratio":
        start, *values = ((value * rollouts + 0.5) / (rollouts + 1) for value in (start, *values))
    before = (start, *values[:-1])
    if target == "ratio":
        return tuple(v / (v + p) for v, p in zip(values, before)), before
    return tuple(min(1.0, v / p) if p else 0.0 for v, p in zip(values, before)), before


def order(lengths: Sequence[int], batch_size: int, epochs: float, seed: int) -> list[int]:
    """Indices of the examples in training order: ceil(epochs x n / batch_size) full batches of `batch_size`.

    Epochs are concatenated shuffles, so every batch is full, fractional epochs work, and the
    batches do not depend on the number of ranks. The examples of a batch have similar lengths,
    in ascending order.
    """
    count = len(lengths)
    steps = max(1, math.ceil(round(epochs * count / batch_size, 9)))
    rng, stream = random.Random(seed), []
    while len(stream) < steps * batch_size:
        stream += rng.sample(range(count), count)
    stream = stream[: steps * batch_size]
    # a window longer than an epoch would put copies of one example into a batch
    window = batch_size * min(WINDOW, max(1, count // batch_size))
    ordered = []
    for start in range(0, len(stream), window):
        part = sorted(stream[start : start + window], key=lambda index: lengths[index])
        batches = [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
        rng.shuffle(batches)
        ordered += [index for batch in batches for index in batch]
    return ordered


def share(batch_size: int, micro_batch_size: int, world: int) -> tuple[int, int]:
    """(micro batch per device, accumulation steps), such that their product x `world` = `batch_size`.

    The micro batch is at most `micro_batch_size`. Raises TrainingError if `world` does not divide `batch_size`.
    """
    if batch_size % world:
        raise TrainingError(
            f"batch_size {batch_size} cannot be shared by {world} processes; make it a multiple of {world}"
        )
    mine = batch_size // world
    micro = next(size for size in range(min(micro_batch_size, mine), 0, -1) if mine % size == 0)
    return micro, mine // micro
