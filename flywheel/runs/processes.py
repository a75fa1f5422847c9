"""The processes that one rank starts for a stage: which cores, threads, devices and environment each gets."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flywheel.recipe import Recipe
from flywheel.runs import isolate, manifest
from flywheel.runs.ranks import LaunchFailed, Ranks
from flywheel.runs.stage import Stage

SMALL = 200 << 20  # bytes of weights: an engine of less does not fill two cores
Tell = Callable[[int, int, dict], None]  # progress: done, of how many, figures


def own_cores(ranks: Ranks) -> list[int]:
    """This rank's share of the cores that the launch may use."""
    every = sorted(os.sched_getaffinity(0))
    return every[ranks.local_rank :: ranks.local_world] or every


def processes(ranks: Ranks, recipe: Recipe, stage: Stage) -> int:
    """How many a rank starts: one for a training; for sampling `engine.workers`, at most one a core."""
    if stage.train:
        return 1
    cores = len(own_cores(ranks))
    return min(cores, recipe.engine.workers or default_workers(recipe.model.base, cores))


def default_workers(base: str, cores: int) -> int:
    """How many sampling processes fill the cores of a machine without a GPU.

    The steps of a small model are too short to be shared out: two threads in one engine sample little more than one,
    two engines of one thread each nearly twice as much.
    """
    weights = sum(path.stat().st_size for path in Path(base).glob("*.safetensors"))
    return cores if 0 < weights < SMALL and not Path("/dev/nvidiactl").exists() else 1


def run_stage(
    ranks: Ranks,
    recipe: Recipe,
    run: Path,
    round: int,
    stage: Stage,
    stages: str,
    port: int,
    tell: Tell,
    watch: Callable[[], None],
) -> dict:
    """This rank's part of a stage, in processes of its own.

    The first one's figures count; the others only draw chunks. Whatever ends one of them ends all. `watch` is called
    several times a second, and ends the stage by raising. Raises StageFailed.
    """
    cores, count = own_cores(ranks), processes(ranks, recipe, stage)
    bound = not stage.train and (count > 1 or ranks.local_world > 1)
    over = threading.Event()

    def watch_others() -> None:
        if over.is_set():
            raise LaunchFailed("another process of this rank ended")
        watch()

    def call(worker: int, tell: Tell, watch: Callable[[], None]) -> dict:
        rank, mine = ranks.world * worker + ranks.rank, cores[worker::count]
        arguments = {
            "recipe": recipe,
            "run": run,
            "round": round,
            "stage": stage.name,
            "stages": stages,
            "rank": rank,
            "world": ranks.world,
            "cores": mine if bound else None,
        }
        return isolate.call(
            "flywheel.runs.worker:perform_stage",
            arguments,
            what=manifest.name_of((round, stage.name)),
            threads=len(mine),
            environment=environment(ranks, bool(stage.train), port),
            log=manifest.stage_dir(run, round, stage.name) / f"rank_{rank}.log",
            tell=tell,
            watch=watch,
        )

    with ThreadPoolExecutor(max(1, count - 1)) as pool:
        others = [pool.submit(call, w, lambda done, total, figures: None, watch_others) for w in range(1, count)]
        try:
            figures = call(0, tell, lambda: (watch(), [other.result() for other in others if other.done()]))
            for other in others:
                other.result()
        except BaseException:
            over.set()
            raise
    return figures


def environment(ranks: Ranks, training: bool, port: int) -> dict[str, str | None]:
    """The changes to the rank's environment for a stage's process; None unsets.

    A training meets on a port of its own, and hosts its store there itself. A sampling process stands alone, with one
    device: vLLM's in-process engine takes the first one that it sees.
    """
    changed: dict[str, str | None] = {"WANDB_MODE": "disabled", "TORCHELASTIC_USE_AGENT_STORE": None}
    if training:
        return {**changed, **({"MASTER_PORT": str(port)} if ranks.distributed else {})}
    devices = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    devices = devices or [str(i) for i in range(ranks.local_rank + 1)]
    if ranks.local_rank < len(devices):
        changed["CUDA_VISIBLE_DEVICES"] = devices[ranks.local_rank]
    alone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {**changed, **dict.fromkeys(alone)}
