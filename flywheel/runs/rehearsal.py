"""The rehearsal of a run that is not created yet: what would fail a stage hours later fails here, within a minute."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

from flywheel.recipe import Recipe
from flywheel.runs.estimate import Rates
from flywheel.runs.processes import call_alone, training_threads
from flywheel.runs.ranks import Ranks


def rehearse(
    ranks: Ranks, recipe: Recipe, stages: str, force: bool, watch: Callable[[], None] = lambda: None
) -> Rates | None:
    """Sample the base, train it and serve what was trained, in miniature; returns this machine's speeds with it.

    stages: a module with the functions `sample`, `train` and `serve` (`flywheel.stages.rehearsal`). None if the
    engine is not vLLM, which is all that is trained and served, or if the base is to be divided among devices: one
    process, as this is, could not train it. Raises UserError; StageFailed, whose log is kept.
    """
    call = partial(call_alone, ranks, recipe, what="the rehearsal of the run", watch=watch)
    speeds = call(f"{stages}:sample", {"recipe": recipe, "force": force})
    divided = recipe.engine.tensor_parallel > 1 or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    if recipe.engine.kind != "vllm" or divided:
        return None
    out, threads = Path(mkdtemp(prefix="flywheel-")), training_threads(ranks, recipe)
    asked, log = {"recipe": recipe, "out": out}, out / "rehearsal.log"
    length = int(speeds["prompt"] + speeds["solution"])
    speeds |= call(f"{stages}:train", asked | {"length": length}, threads=threads, log=log)
    speeds |= call(f"{stages}:serve", asked, log=log)
    shutil.rmtree(out)
    return Rates(**speeds)
