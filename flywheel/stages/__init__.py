"""The stages of a round, one file per stage, in the order in which they run."""

from __future__ import annotations

from importlib import import_module

ORDER = (
    "sample",
    "label",
    "train_prm",
    "train_reviser",
    "choose_reviser",
    "train_head",
    "calibrate",
    "harvest",
    "distill",
    "gate",
    "evaluate",
    "search",
)


def stages(round: int) -> list:
    """The stages of a round, in order. Round 0 is the base model, which is only evaluated."""
    names = ("evaluate",) if round == 0 else ORDER
    return [import_module(f"flywheel.stages.{name}").STAGE for name in names]
