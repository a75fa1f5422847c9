"""Stages, their inputs, and the schedule of a run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

At = tuple[int, str]  # round, name of a stage


@dataclass(frozen=True)
class Input:
    """A stage that another stage reads: from `back` rounds before (0: the same round), or from round `of`.

    `every`: from each round 1 to the current one. `optional`: left out if that round is 0, the untrained base.
    """

    stage: str
    back: int = 0
    of: int | None = None
    every: bool = False
    optional: bool = False

    def rounds(self, round: int) -> list[int]:
        """The rounds from which a stage in `round` reads this input; empty if that is before round 0."""
        if self.every:
            return list(range(1, round + 1))
        at = round - self.back if self.of is None else self.of
        return [at] if at >= (1 if self.optional else 0) else []


@dataclass(frozen=True)
class Stage:
    """One stage of a round: either `items` and `work` (sampling) or `train`, and optionally `finish`.

    sections: dotted recipe keys that the stage reads and its fingerprint holds; None: all.
    items: ids of the work items, in a fixed order. `work(context, opened, chunk)`, a coroutine, turns a chunk of them
    into records (dataclasses); many chunks are under way at once. `opened` is the result of `open` (engines), called
    once per process; its `stream(source, full)` runs the coroutines that `source` gives (`models.stepping.stream`).
    train: called on every rank, with the environment set for torch.distributed; must be resumable.
    finish: called on rank 0 when all shards exist or training is done; returns figures for the manifest.
    All of them receive the stage's `Context`. test_split: the stage may read test questions. shares: the stage of the
    same round that opens the same models (or more of them); if this one follows it in a launch, it takes over its
    processes and engines.
    """

    name: str
    sections: tuple[str, ...] | None
    inputs: tuple[Input, ...]
    items: Callable[..., list[str]] | None = None
    open: Callable[..., AbstractContextManager[Any]] | None = None
    work: Callable[..., Awaitable[Iterable[object]]] | None = None
    train: Callable[..., dict] | None = None
    finish: Callable[..., dict] | None = None
    test_split: bool = False
    shares: str | None = None

    def __post_init__(self) -> None:
        if bool(self.train) == bool(self.items and self.work):
            raise ValueError(f"stage {self.name}: either items and work, or train")

    def reads(self, round: int) -> list[At]:
        """The (round, stage) pairs that the stage may read in `round`, without itself."""
        pairs = [(r, item.stage) for item in self.inputs for r in item.rounds(round)]
        return list(dict.fromkeys(at for at in pairs if at != (round, self.name)))


@dataclass(frozen=True)
class Scheduled:
    """A stage in a round. `reads`: inputs that the run has; `place`: index from 0 among the round's `of` stages."""

    round: int
    stage: Stage
    reads: tuple[At, ...]
    place: int
    of: int

    @property
    def at(self) -> At:
        return self.round, self.stage.name


def schedule(stages: Callable[[int], Sequence[Stage]], rounds: int) -> list[Scheduled]:
    """All stages of rounds 0 to `rounds`, in order. `stages(r)`: the stages of round r."""
    by_round = [stages(r) for r in range(rounds + 1)]
    there = {(r, stage.name) for r, group in enumerate(by_round) for stage in group}
    return [
        Scheduled(r, stage, tuple(at for at in stage.reads(r) if at in there), place, len(group))
        for r, group in enumerate(by_round)
        for place, stage in enumerate(group)
    ]
