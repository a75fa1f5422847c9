"""What both trainings share and needs no torch: reports, the order of the data, batch shares."""

from __future__ import annotations

import hashlib
import logging
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flywheel.runs.files import read_json, sha256, write_json

log = logging.getLogger(__name__)

Keep = Literal["best", "last", "all"]

WINDOW = 16  # batches that are ordered by length together: little padding, still a mixture


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says why and what to change."""


@dataclass(frozen=True)
class Checkpoint:
    """An adapter on disk. `epoch` counts passes over the examples; `eval_loss` is None without validation."""

    step: int
    epoch: float
    eval_loss: float | None
    path: str


@dataclass(frozen=True)
class TrainReport:
    """What a training did. Losses are nats per trained token (SFT) or per read position (PRM).

    `curve`: {step, loss, eval_loss}, None where not measured; its step 0 is the untrained base.
    `train_loss`: mean over the last stretch of the curve. `best`: the one kept as `adapter/`.
    `checkpoints`: those still on disk. `tokens`: all ranks, every epoch, padding left out.
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


def order(lengths: Sequence[int], batch_size: int, epochs: float, seed: int) -> list[int]:
    """Indices of all examples in training order: whole batches of `batch_size`, ceil(epochs x n / batch_size) of them.

    The epochs run on as one stream of shuffles, so every batch is full, fractions of an
    epoch work, and the batches are the same whatever the number of ranks. Batches hold
    examples of like length; inside a batch they ascend.
    """
    count = len(lengths)
    steps = max(1, math.ceil(round(epochs * count / batch_size, 9)))
    rng, stream = random.Random(seed), []
    while len(stream) < steps * batch_size:
        stream += rng.sample(range(count), count)
    stream = stream[: steps * batch_size]
    # a window no longer than an epoch, lest a batch hold one example several times
    window = batch_size * min(WINDOW, max(1, count // batch_size))
    ordered = []
    for start in range(0, len(stream), window):
        part = sorted(stream[start : start + window], key=lambda index: lengths[index])
        batches = [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
        rng.shuffle(batches)
        ordered += [index for batch in batches for index in batch]
    return ordered


def points(steps: int, evals: int) -> list[int]:
    """At most `evals` steps, evenly spread, the last step always among them."""
    return sorted({max(1, round(steps * (i + 1) / evals)) for i in range(evals)})


def digest(*parts: object) -> str:
    """Fingerprint of data and settings, by their repr."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def copy_adapter(source: Path, target: Path) -> None:
    """Copy a PEFT adapter (weights and config only); `target` appears whole or not at all."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / name, temporary / name)
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)


# ---- the directory of a training: adapter/, checkpoints/step-N/, report.json; while it runs, trainer/ ----

ROOM = "micro_batch.json"  # the largest that fitted, once memory has run out
MARK = "complete.json"  # written last into a trainer's checkpoint, once all ranks have saved


def standing(out: Path, mark: dict[str, Any]) -> tuple[TrainReport | None, str | None, float]:
    """What is already there for the training that `mark` identifies, clearing away what is of no use.

    Returns (report if it is finished, else trainer checkpoint to resume from or None, seconds
    spent so far). A checkpoint without its mark was cut off in writing and is deleted, as is one
    whose files are not what they were (torch unpickles them: nothing else may be put there); one
    with another mark (other data, other settings, DeepSpeed with other ranks) ends the lot.
    """
    done = read_json(out / "report.json")
    if done and done.pop("fingerprint") == mark["fingerprint"]:
        done["checkpoints"] = [Checkpoint(**item) for item in done["checkpoints"]]
        return TrainReport(**{**done, "best": Checkpoint(**done["best"])}), None, 0.0
    saved = sorted(
        (out / "trainer").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True
    )
    for path in saved:
        found = read_json(path / MARK)
        if found:
            seconds, files = found.pop("seconds"), found.pop("files", None)
            if found == mark:
                if sums(path) == files:
                    return None, str(path), seconds
                log.warning("%s: damaged or altered since it was written, so it is not used", path)
                shutil.rmtree(path)
                continue
            changed = "sharding" if found["fingerprint"] == mark["fingerprint"] else "data or settings"
            log.warning("%s: the %s changed since it was interrupted, so this training starts again", out, changed)
            break
        shutil.rmtree(path)
    for name in ("trainer", "checkpoints", "adapter"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "report.json").unlink(missing_ok=True)
    return None, None, 0.0


def sums(checkpoint: Path) -> dict[str, str]:
    """sha256 of every file of a trainer's checkpoint but its mark."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MARK]
    return {str(path.relative_to(checkpoint)): sha256(path) for path in files}


def settle(out: Path, keep: Keep, curve: list[dict], epochs_per_step: float) -> tuple[list[Checkpoint], Checkpoint]:
    """Make `out/adapter` of the checkpoint to keep; returns (checkpoints that will stay, that one)."""
    losses = {point["step"]: point["eval_loss"] for point in curve}
    steps = sorted(int(path.name.partition("-")[2]) for path in (out / "checkpoints").glob("step-*[0-9]"))
    saved = [Checkpoint(n, n * epochs_per_step, losses.get(n), str(out / "checkpoints" / f"step-{n}")) for n in steps]
    best = saved[-1] if keep == "last" else min(saved, key=lambda checkpoint: checkpoint.eval_loss)
    copy_adapter(Path(best.path), out / "adapter")
    if keep == "all":
        return saved, best
    best = replace(best, path=str(out / "adapter"))
    return [best], best


def conclude(out: Path, keep: Keep, report: TrainReport, fingerprint: str) -> None:
    """Write the report, then drop what only a resume needs; safe to call again after a kill in between."""
    write_json(out / "report.json", {"fingerprint": fingerprint, **asdict(report)})
    for name in ("trainer",) if keep == "all" else ("trainer", "checkpoints"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / ROOM).unlink(missing_ok=True)


def curve_of(history: list[dict]) -> list[dict[str, Any]]:
    """A trainer's log as {step, loss, eval_loss}, by step."""
    curve: dict[int, dict] = {}
    for entry in history:
        if "loss" in entry or "eval_loss" in entry:
            point = curve.setdefault(entry["step"], {"step": entry["step"], "loss": None, "eval_loss": None})
            point.update({name: entry[name] for name in ("loss", "eval_loss") if name in entry})
    return [curve[step] for step in sorted(curve)]


def check_lengths(name: str, lengths: Sequence[int], longest: int, of: Sequence[str] | None = None) -> None:
    """Nothing is cut silently: raises TrainingError for the first example longer than `longest` tokens."""
    for index, length in enumerate(lengths):
        if length > longest:
            whose = f" (question {of[index]})" if of and of[index] else ""
            more = sum(other > longest for other in lengths[index + 1 :])
            raise TrainingError(
                f"{name} example {index}{whose} has {length} tokens, max_length is {longest}"
                + (f"; so have {more} more" if more else "")
                + ": raise max_length or filter before training"
            )
