"""Training examples as token ids: what they hold, their checks, their order and their batches. No torch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from flywheel.errors import UserError

WINDOW = 16  # batches sorted by length together: little padding, and batches are still mixtures


class TrainingError(UserError):
    """A training that cannot go on; the message says why and what to change."""


@dataclass(frozen=True)
class Example:
    """A text for supervised fine-tuning (SFT): the loss is on `tokens[loss_from:]`, with EOS if it is to be learned."""

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
    """A solution for the process reward model (PRM), and where its step values are read.

    `reads[i]` is a prefix length in tokens: the value after step i is read from the logits at
    position reads[i] - 1. `values[i]` in [0, 1] is its soft label, for instance the fraction of
    correct rollouts (Snell et al. 2024, appendix D). `weights[i]` >= 0, 1 where not given.
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
    """The examples as rows for the trainers. Nothing is cut: one of more than `longest` tokens is an error.

    Raises TrainingError for the first example that is malformed or too long; `name` says in the
    message which examples these are.
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


def targets(values: Sequence[float], start: float, target: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(labels, weights) for the PRM from the Monte Carlo values of one solution's steps, each in [0, 1].

    `value`: the values themselves, each of weight 1 (Snell et al. 2024, appendix D).

    `progress`: the fraction of the success probability that survives the step, min(1, v_i / v_(i-1)),
    with weight v_(i-1), because a quotient of small counts is mostly noise. v_0 is `start`, the
    question's pass rate. Steps after one of value 0 get weight 0. The product of a solution's labels
    is its last value over `start` (where no step raises the value), so at test time a PRM of progress
    is aggregated by `product` where a PRM of values is by `last`; the model then need not sum up the
    steps itself, which a small one learns badly (measured: eval/LOG.md). Setlur et al. 2024
    (arXiv 2410.08146) reward a similar quantity, the difference v_i - v_(i-1).
    """
    if target == "value":
        return tuple(values), (1.0,) * len(values)
    before = (start, *values[:-1])
    return tuple(min(1.0, v / p) if p else 0.0 for v, p in zip(values, before)), before


def order(lengths: Sequence[int], batch_size: int, epochs: float, seed: int) -> list[int]:
    """Indices of the examples in training order: ceil(epochs x n / batch_size) whole batches of `batch_size`.

    The epochs are one stream of shuffles, so every batch is full, fractions of an epoch work,
    and the batches are the same whatever the number of ranks. The examples of a batch have
    similar lengths, in ascending order.
    """
    count = len(lengths)
    steps = max(1, math.ceil(round(epochs * count / batch_size, 9)))
    rng, stream = random.Random(seed), []
    while len(stream) < steps * batch_size:
        stream += rng.sample(range(count), count)
    stream = stream[: steps * batch_size]
    # a window is no longer than an epoch, so that a batch does not hold one example several times
    window = batch_size * min(WINDOW, max(1, count // batch_size))
    ordered = []
    for start in range(0, len(stream), window):
        part = sorted(stream[start : start + window], key=lambda index: lengths[index])
        batches = [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
        rng.shuffle(batches)
        ordered += [index for batch in batches for index in batch]
    return ordered


def share(batch_size: int, micro_batch_size: int, world: int) -> tuple[int, int]:
    """(sequences on one device at once, accumulation steps) so that their product x world = batch_size.

    Takes the largest micro batch that divides. Raises TrainingError where the ranks cannot share it.
    """
    if batch_size % world:
        raise TrainingError(
            f"batch_size {batch_size} cannot be shared by {world} processes; make it a multiple of {world}"
        )
    mine = batch_size // world
    micro = next(size for size in range(min(micro_batch_size, mine), 0, -1) if mine % size == 0)
    return micro, mine // micro
