"""What a stage is, and which stages a run consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

At = tuple[int, str]  # round, name of a stage


@dataclass(frozen=True)
class Input:
    """A stage that another one reads: of the same round, `back` rounds before, round `of`, or `every` round.

    `every`: from round 1 to this one. `optional`: left out in round 0, the base, which nothing has trained.
    """

    stage: str
    back: int = 0
    of: int | None = None
    every: bool = False
    optional: bool = False

    def rounds(self, round: int) -> list[int]:
        """The rounds that a stage of `round` reads it from. There is none before round 0."""
        if self.every:
            return list(range(1, round + 1))
        at = round - self.back if self.of is None else self.of
        return [at] if at >= (1 if self.optional else 0) else []


@dataclass(frozen=True)
class Stage:
    """One step of a round. Either `items` and `work` (sampling) or `train`; `finish` may follow.

    sections: dotted recipe keys that it reads, and whose change makes it another stage; None: all of them.
    items: ids of the work items, in a fixed order; `work(context, opened, chunk)` turns a chunk of them into records
    (dataclasses), with what `open` opened (engines), once in each process.
    train: called on every rank, its environment ready for torch.distributed; resumable.
    finish: on rank 0, when all shards exist; its figures go into the manifest.
    All of them are given the stage's `Context`.
    """

    name: str
    sections: tuple[str, ...] | None
    inputs: tuple[Input, ...]
    items: Callable[..., list[str]] | None = None
    open: Callable[..., AbstractContextManager[Any]] | None = None
    work: Callable[..., Iterator[object]] | None = None
    train: Callable[..., dict] | None = None
    finish: Callable[..., dict] | None = None
    test_split: bool = False

    def __post_init__(self) -> None:
        if bool(self.train) == bool(self.items and self.work):
            raise ValueError(f"stage {self.name}: either items and work, or train")

    def reads(self, round: int) -> list[At]:
        """The stages that it may read in `round`, itself apart."""
        pairs = [(r, item.stage) for item in self.inputs for r in item.rounds(round)]
        return list(dict.fromkeys(at for at in pairs if at != (round, self.name)))


@dataclass(frozen=True)
class Scheduled:
    """A stage in its round, with those of its inputs that the run has; number `place` (from 0) of the round's `of`."""

    round: int
    stage: Stage
    reads: tuple[At, ...]
    place: int
    of: int

    @property
    def at(self) -> At:
        return self.round, self.stage.name


def schedule(stages: Callable[[int], Sequence[Stage]], rounds: int) -> list[Scheduled]:
    """All stages of rounds 0..rounds, in order. `stages`: the stages of a round."""
    by_round = [stages(r) for r in range(rounds + 1)]
    there = {(r, stage.name) for r, group in enumerate(by_round) for stage in group}
    return [
        Scheduled(r, stage, tuple(at for at in stage.reads(r) if at in there), place, len(group))
        for r, group in enumerate(by_round)
        for place, stage in enumerate(group)
    ]
