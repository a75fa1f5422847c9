"""Estimate a run's cost before it starts: tokens, time and disk space by stage.

A stage that an earlier round has finished is estimated by its measured figures, any other by
rough guesses from the recipe and the number of questions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flywheel.recipe import Recipe
from flywheel.runs import manifest
from flywheel.runs.files import read_json
from flywheel.runs.shards import shard_dirs
from flywheel.runs.stage import Scheduled

START = 6.0  # seconds to open a stage's engines or trainer
CORE_SAMPLING, CORE_TRAINING = 2.2e10, 7e10  # FLOP/s of a CPU core with AVX-512, measured on a model of 0.9M parameters
GPU_SAMPLING, GPU_TRAINING = 2e13, 1e14
STORED = 4  # bytes for a sampled token, compressed


@dataclass(frozen=True)
class Row:
    """`left`: fraction of the stage still to do; `tokens`, `seconds` and `bytes` are of the whole stage."""

    round: int
    stage: str
    state: str
    left: float
    tokens: int
    seconds: float
    bytes: int


def planned_tokens(recipe: Recipe, counts: dict[str, int], stage: str, round: int) -> int:
    """Nominal tokens of a stage, assuming solutions of `sample.max_tokens` / 2 tokens. 0 for an unknown stage."""
    train, calibrate, validation, test = (
        counts.get(split, 0) for split in ("train", "calibrate", "validation", "test")
    )
    solution = recipe.sample.max_tokens / 2
    drawn = solution * 1.25  # with its prompt
    judged = drawn * 2.25  # also scored by a PRM, which beam search does at every step
    steps = max(1.0, min(recipe.sample.max_steps, solution / 8))
    labelled = min(train, recipe.label.questions or train) * recipe.label.solutions
    budgets = sum(recipe.calibrate.budgets) * len(recipe.calibrate.strategies)
    one_round = {
        "sample": (train * recipe.sample.per_question + calibrate * recipe.sample.calibrate) * drawn,
        "label": labelled * steps * recipe.label.rollouts * drawn / 2,
        "train_prm": labelled * drawn * recipe.prm.epochs,
        "train_reviser": train
        * recipe.reviser.trajectories
        / 2
        * drawn
        * (1 + recipe.reviser.context / 2)
        * recipe.reviser.epochs,
        "choose_reviser": recipe.reviser.evals
        * min(validation, recipe.reviser.probe_questions)
        * recipe.reviser.probe_attempts
        * drawn
        * 2,
        "calibrate": calibrate * budgets * judged,
        "harvest": train * recipe.harvest.budget * judged,
        "distill": train * recipe.harvest.keep / 2 * drawn * recipe.distill.epochs * round,
        "gate": calibrate * recipe.sample.calibrate * drawn,
        "evaluate": test * recipe.evaluate.samples * drawn * (2 if round == 0 else 1),
        "search": test
        * (recipe.evaluate.samples + (4 + steps) * recipe.evaluate.budget + 2 * recipe.evaluate.revise_attempts)
        * drawn,
    }
    return int(one_round.get(stage, 0))


def parameters(base: Path) -> int:
    """Number of parameters of a model directory, from the headers of its safetensors; 0 if there are none."""
    count = 0
    for path in base.glob("*.safetensors"):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for n in tensor["shape"]:
                    size *= n
                count += size
    return count


def guessed_speed(recipe: Recipe, training: bool, ranks: int) -> float:
    """Tokens per second of all ranks together."""
    size = max(1, parameters(Path(recipe.model.base)))
    if Path("/dev/nvidia0").exists():
        return ranks * (GPU_TRAINING / (6 * size) if training else min(GPU_SAMPLING / (2 * size), 30_000))
    cores = len(os.sched_getaffinity(0))
    return cores * (CORE_TRAINING / (6 * size) if training else CORE_SAMPLING / (2 * size))


def estimate(recipe: Recipe, run: Path, plan: Sequence[Scheduled], counts: dict[str, int], ranks: int) -> list[Row]:
    """One row per stage. A finished stage has its own figures, which also serve as the estimate for later rounds."""
    done = {scheduled.at: made for scheduled in plan if (made := manifest.load(run, *scheduled.at))}
    rows = []
    for scheduled in plan:
        r, stage = scheduled.round, scheduled.stage
        like = [made for (_, name), made in done.items() if name == stage.name and made["round"] > 0] or None
        made = done.get((r, stage.name))
        state, left = progress_of(manifest.stage_dir(run, r, stage.name), made)
        if made or like:
            source = made or like[-1]
            size = sum(file["bytes"] for file in source["files"].values())
            grown = 1.0 if made or stage.name != "distill" else r / source["round"]
            rows.append(Row(r, stage.name, state, left, int(source["tokens"] * grown), source["seconds"] * grown, size))
            continue
        tokens = planned_tokens(recipe, counts, stage.name, r)
        seconds = START + tokens / guessed_speed(recipe, bool(stage.train), ranks)
        size = (
            12 * recipe.model.lora_rank * int(parameters(Path(recipe.model.base)) ** 0.5) * 8
            if stage.train
            else STORED * tokens
        )
        rows.append(Row(r, stage.name, state, left, tokens, seconds, size))
    return rows


def progress_of(directory: Path, made: dict[str, Any] | None) -> tuple[str, float]:
    """(state in words, fraction still to do) of a stage; `made` is its manifest, if finished."""
    if made:
        return "done", 0.0
    shards = shard_dirs(directory)
    if shards:
        of = (read_json(shards[0] / "shard.json") or {"of": len(shards)})["of"]
        return f"{len(shards)} of {of} shards", 1 - len(shards) / of
    return ("begun" if any((directory / name).exists() for name in manifest.SCRATCH) else "to do"), 1.0


def overview(recipe: Recipe, run: Path, plan: Sequence[Scheduled], counts: dict[str, int], ranks: int) -> str:
    """The table of all stages and their cost, printed before the first stage."""
    rows = estimate(recipe, run, plan, counts, ranks)
    questions = ", ".join(f"{split} {count}" for split, count in counts.items())
    lines = [
        f"{run}: recipe {recipe.name}, to the end of round {max(row.round for row in rows)}, ranks: {ranks}",
        f"questions: {questions}; base: {recipe.model.base}",
        f"{'round':5s}  {'stage':14s}  {'state':16s}  {'tokens':>8s}  {'time':>8s}  {'disk':>8s}",
    ]
    for row in rows:
        lines.append(
            f"{row.round:5d}  {row.stage:14s}  {row.state:16s}  {short(row.tokens):>8s}"
            f"  {clock(row.seconds):>8s}  {short(row.bytes):>7s}B"
        )
    if any(row.left for row in rows):
        tokens, seconds, size = (
            sum(row.left * getattr(row, name) for row in rows) for name in ("tokens", "seconds", "bytes")
        )
        grounds = (
            "from what this run measured, where it did"
            if any(row.state == "done" for row in rows)
            else "rough: nothing is measured yet"
        )
        lines.append(f"to do: about {short(tokens)} tokens, {clock(seconds)}, {short(size)}B ({grounds})")
    return "\n".join(lines)


def short(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
