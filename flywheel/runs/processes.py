"""Start a rank's processes for a stage, each with its cores, threads, devices and environment."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flywheel.recipe import Recipe
from flywheel.runs import isolate, manifest
from flywheel.runs.ranks import LaunchFailed, Ranks
from flywheel.runs.stage import Stage

SMALL = 200 << 20  # bytes of weights below which one engine does not keep two cores busy
Tell = Callable[[int, int, dict], None]  # progress: done, total, figures


def own_cores(ranks: Ranks) -> list[int]:
    """This rank's share of the cores that the launch may use."""
    every = sorted(os.sched_getaffinity(0))
    return every[ranks.local_rank :: ranks.local_world] or every


def processes(ranks: Ranks, recipe: Recipe, stage: Stage) -> int:
    """Number of processes per rank: 1 for training; for sampling `engine.workers`, at most one per core."""
    return 1 if stage.train else workers(recipe, threads_of(ranks, recipe))


def threads_of(ranks: Ranks, recipe: Recipe) -> int:
    """CPU threads of this rank, all its processes together."""
    return isolate.threads_for(ranks.local_world, recipe.engine.threads)


def threads_alone(ranks: Ranks, recipe: Recipe) -> int:
    """CPU threads of one process that answers questions by itself.

    One for a small model, which gains little from more; two beside any other load are many times slower than one.
    """
    threads = threads_of(ranks, recipe)
    return threads // default_workers(recipe.model.base, threads)


def workers(recipe: Recipe, threads: int) -> int:
    return min(threads, recipe.engine.workers or default_workers(recipe.model.base, threads))


def default_workers(base: str, cores: int) -> int:
    """Number of sampling processes per rank if the recipe does not say: one per core for a small model on a CPU.

    A small model gains little from threads: one engine with two threads samples hardly faster than with one, while two
    engines with one thread each sample nearly twice as fast.
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
    """This rank's part of a stage, in child processes; returns the figures of the first one.

    The others only process chunks. If one process fails, all are ended. `watch` is called several times a second and
    ends the stage by raising. Raises StageFailed.
    """
    cores, threads, count = own_cores(ranks), threads_of(ranks, recipe), processes(ranks, recipe, stage)
    # with fewer threads than cores nobody knows which cores are free, so the kernel chooses
    bound = not stage.train and (count > 1 or ranks.local_world > 1) and threads == len(cores)
    made: dict[int, float] = {}  # tokens so far, by process
    over = threading.Event()

    def watch_others() -> None:
        if over.is_set():
            raise LaunchFailed("another process of this rank ended")
        watch()

    def call(worker: int, watch: Callable[[], None]) -> dict:
        rank = ranks.world * worker + ranks.rank

        def told(done: int, total: int, figures: dict) -> None:
            made[worker] = figures.get("tokens", 0)
            if worker == 0:
                tell(done, total, figures | ({"tokens": all_made} if (all_made := sum(made.values())) else {}))

        arguments = {
            "recipe": recipe,
            "run": run,
            "round": round,
            "stage": stage.name,
            "stages": stages,
            "rank": rank,
            "world": ranks.world * count,
            "cores": cores[worker::count] if bound else None,
        }
        return isolate.call(
            "flywheel.runs.worker:perform_stage",
            arguments,
            what=manifest.name_of((round, stage.name)),
            threads=len(range(worker, threads, count)),
            environment=environment(ranks, bool(stage.train), port),
            log=manifest.stage_dir(run, round, stage.name) / f"rank_{rank}.log",
            tell=told,
            watch=watch,
        )

    with ThreadPoolExecutor(max(1, count - 1)) as pool:
        others = [pool.submit(call, w, watch_others) for w in range(1, count)]
        try:
            figures = call(0, lambda: (watch(), [other.result() for other in others if other.done()]))
            for other in others:
                other.result()
        except BaseException:
            over.set()
            raise
    return figures


def call_alone(
    ranks: Ranks,
    recipe: Recipe,
    target: str,
    arguments: Mapping[str, Any],
    what: str,
    threads: int | None = None,
    log: Path | None = None,
) -> Any:
    """Call `module:function` in one process with the environment of a sampling stage's process, and its threads."""
    every = threads_of(ranks, recipe)
    return isolate.call(
        target,
        arguments,
        what=what,
        threads=threads or every // workers(recipe, every),
        environment=environment(ranks, False, 0),
        log=log,
    )


def environment(ranks: Ranks, training: bool, port: int) -> dict[str, str | None]:
    """Changes to the rank's environment for a stage's process; None unsets a variable.

    Each training gets a new port for its torch.distributed store, which its own rank 0 hosts. A sampling process is not
    distributed and sees one device, because vLLM's in-process engine takes the first visible one.
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
