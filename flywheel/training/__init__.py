"""LoRA training of the three roles with TRL and accelerate. Importing this package does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flywheel.training.checkpoints import Job, TrainReport
from flywheel.training.examples import Example, PrmExample, TrainingError, rows

if TYPE_CHECKING:
    from datasets import Dataset


def train_sft(train: Sequence[Example] | Dataset, validation: Sequence[Example] | Dataset, job: Job) -> TrainReport:
    """Train on the mean negative log-likelihood of `tokens[loss_from:]`; writes `job.out/adapter/`.

    `train`, `validation`: examples, or the parts of `Stored.split`, which stay on disk.
    Call it on every rank of the launch environment. Called again after a kill, it resumes from the
    last complete checkpoint; after the end, it returns the same report. Charges `job.ledger` the
    training tokens of every epoch, and validation as scored tokens.
    Raises TrainingError for malformed examples, examples longer than `spec.max_length`, a batch size
    not divisible by the number of ranks, a non-finite loss, or a device too small for one sequence; OutOfMemory if
    memory ran out on one of several ranks.
    """
    from flywheel.training.losses import SftTrainer
    from flywheel.training.trainer import fit

    return fit(SftTrainer, *_checked(train, validation, job), job)


def train_prm(
    train: Sequence[PrmExample] | Dataset,
    validation: Sequence[PrmExample] | Dataset,
    labels: tuple[int, int],
    job: Job,
    held: Sequence[PrmExample] = (),
) -> TrainReport:
    """Train the PRM so that P(labels[0]) / (P(labels[0]) + P(labels[1])) at each read predicts its value.

    `labels`: the token ids of the good and the bad label. The loss is soft binary cross-entropy (Snell
    et al. 2024, appendix D), a weighted mean over all reads of the global batch. Otherwise as `train_sft`.

    `held`: examples of any length that the trained PRM judges at the end, see `TrainReport.held`; their values are not
    read. Charges them twice as scored tokens.
    """
    from flywheel.training.losses import PrmTrainer
    from flywheel.training.trainer import fit

    return fit(PrmTrainer, *_checked(train, validation, job), job, labels, rows("held-out", held))


def _checked(train: Sequence | Dataset, validation: Sequence | Dataset, job: Job) -> tuple[Dataset, Dataset]:
    from datasets import Dataset

    def checked(name: str, part: Sequence | Dataset) -> Dataset:
        if isinstance(part, Dataset):  # checked when it was stored
            return part
        return Dataset.from_list(rows(name, part, job.spec.max_length))

    parts = checked("training", train), checked("validation", validation)
    if not len(train):
        raise TrainingError(f"no training example for the {job.role}")
    if job.keep != "last" and not len(validation):
        raise TrainingError(f"keep={job.keep!r} chooses by validation loss, but there is no validation example")
    return parts
