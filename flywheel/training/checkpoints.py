"""The directory of a training: resuming, choosing the checkpoint, the report. Does not import torch.

adapter/            the chosen adapter
checkpoints/step-N/ the adapter at every validation point; after the end only with `keep="all"`
report.json         written last
trainer/            optimizer states to resume from; deleted at the end
micro_batch.json    the micro batch to use after memory ran out; deleted at the end
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from flywheel.ledger import Ledger
from flywheel.recipe import ModelSpec, TrainSpec
from flywheel.runs.files import read_json, sha256, write_json

log = logging.getLogger(__name__)

ROOM = "micro_batch.json"
MARK = "complete.json"  # written into a checkpoint of `trainer/` after all ranks have saved


@dataclass(frozen=True)
class Job:
    """What to train, where and how; the same on every rank.

    `keep`: with `best` and `all`, `out/adapter` is the checkpoint with the lowest validation loss,
    with `last` the final one; `all` also keeps every validation point's adapter in `out/checkpoints`.
    `seed` is taken modulo 2^31. `start`: an adapter of the same shape to continue training, instead
    of a fresh one. Rank 0 charges `ledger` with `role` for all ranks.
    """

    model: ModelSpec
    spec: TrainSpec
    out: Path
    seed: int
    keep: Literal["best", "last", "all"]
    role: str
    ledger: Ledger
    start: str | None = None
    tell: Callable[[int, int], None] = lambda done, total: None  # called after every step


@dataclass(frozen=True)
class Checkpoint:
    """An adapter on disk. `epoch` counts passes over the examples; `eval_loss` is None without validation."""

    step: int
    epoch: float
    eval_loss: float | None
    path: str


@dataclass(frozen=True)
class TrainReport:
    """The result of a training. Losses are means in nats per trained token (SFT) or per unit of read weight (PRM).

    `curve`: {step, loss, eval_loss}, None where not measured; step 0 is the model before training.
    `train_loss`: the last training loss of the curve. `best`: the checkpoint in `adapter/`.
    `checkpoints`: those kept on disk. `tokens`: of all ranks and epochs, without padding. `held`: for the PRM, the
    values of the held-out examples by `adapter/` and by the base alone, in their order; empty without such examples.
    """

    steps: int
    epochs: float
    train_loss: float
    curve: list[dict[str, Any]]
    checkpoints: list[Checkpoint]
    best: Checkpoint
    tokens: int
    seconds: float
    parameters_trained: int
    parameters: int  # base and adapter
    held: list[list[Sequence[float]]] = field(default_factory=list)


def points(steps: int, count: int) -> list[int]:
    """At most `count` evenly spaced steps of 1 to `steps`, always including the last."""
    return sorted({max(1, round(steps * (i + 1) / count)) for i in range(count)})


def digest(*parts: object) -> str:
    """Fingerprint of data and settings, by their repr."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def copy_adapter(source: Path, target: Path) -> None:
    """Copy a PEFT adapter (weights and config only) to `target`, atomically."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / name, temporary / name)
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)


def save_point(out: Path, step: int, mark: dict[str, Any], seconds: float) -> None:
    """Copy the adapter out of the trainer's checkpoint at `step`, and mark the checkpoint as complete."""
    checkpoint = out / "trainer" / f"checkpoint-{step}"
    copy_adapter(checkpoint, out / "checkpoints" / f"step-{step}")
    write_json(checkpoint / MARK, {**mark, "seconds": seconds, "files": _sums(checkpoint)})


def resume_point(out: Path, mark: dict[str, Any]) -> tuple[TrainReport | None, str | None, float]:
    """(report, checkpoint to resume from, seconds spent so far) of the training that `mark` identifies.

    The report is None unless the training is finished. The checkpoint is None if there is none to resume
    from; then `out` is cleared. A checkpoint without a mark is incomplete and is deleted, as is one whose
    files have changed, because torch unpickles them. A checkpoint with another mark (other data or
    settings, or DeepSpeed with another number of ranks) means that all belong to another training.
    """
    done = read_json(out / "report.json")
    if done and done.pop("fingerprint") == mark["fingerprint"]:
        done["checkpoints"] = [Checkpoint(**item) for item in done["checkpoints"]]
        return TrainReport(**{**done, "best": Checkpoint(**done["best"])}), None, 0.0
    saved = (out / "trainer").glob("checkpoint-*")
    for path in sorted(saved, key=lambda path: int(path.name.partition("-")[2]), reverse=True):
        found = read_json(path / MARK) or {}
        seconds, files = found.pop("seconds", 0.0), found.pop("files", None)
        if found == mark and files == _sums(path):
            return None, str(path), seconds
        if found and found != mark:
            changed = "sharding" if found["fingerprint"] == mark["fingerprint"] else "data or settings"
            log.warning("%s: the %s changed since it was interrupted, so this training starts again", out, changed)
            break
        if found:
            log.warning("%s: damaged or altered since it was written, so it is not used", path)
        shutil.rmtree(path)
    for name in ("trainer", "checkpoints", "adapter"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "report.json").unlink(missing_ok=True)
    return None, None, 0.0


def _sums(checkpoint: Path) -> dict[str, str]:
    """sha256 by file of a trainer's checkpoint, without its mark."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MARK]
    return {str(path.relative_to(checkpoint)): sha256(path) for path in files}


def choose(
    job: Job, steps: Sequence[int], curve: list[dict], epochs_per_step: float
) -> tuple[list[Checkpoint], Checkpoint]:
    """Copy the best (or last, see `job.keep`) of the checkpoints saved at `steps` to `out/adapter`.

    Returns (the checkpoints that `conclude` leaves on disk, the chosen one).
    """
    losses, folder = {point["step"]: point["eval_loss"] for point in curve}, job.out / "checkpoints"
    saved = [Checkpoint(n, n * epochs_per_step, losses[n], str(folder / f"step-{n}")) for n in steps]
    best = saved[-1] if job.keep == "last" else min(saved, key=lambda checkpoint: checkpoint.eval_loss)
    copy_adapter(Path(best.path), job.out / "adapter")
    if job.keep == "all":
        return saved, best
    best = replace(best, path=str(job.out / "adapter"))
    return [best], best


def conclude(job: Job, report: TrainReport, fingerprint: str) -> None:
    """Write the report, then delete what only resuming needs. Safe to call again after a kill."""
    write_json(job.out / "report.json", {"fingerprint": fingerprint, **asdict(report)})
    for name in ("trainer",) if job.keep == "all" else ("trainer", "checkpoints"):
        shutil.rmtree(job.out / name, ignore_errors=True)
    (job.out / ROOM).unlink(missing_ok=True)


def curve_of(history: list[dict]) -> list[dict[str, Any]]:
    """A trainer's log as a list of {step, loss, eval_loss} in order of step; None where not measured."""
    curve: dict[int, dict] = {}
    for entry in history:
        if "loss" in entry or "eval_loss" in entry:
            point = curve.setdefault(entry["step"], {"step": entry["step"], "loss": None, "eval_loss": None})
            point.update({name: entry[name] for name in ("loss", "eval_loss") if name in entry})
    return [curve[step] for step in sorted(curve)]
