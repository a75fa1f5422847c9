"""Start a rank's processes for a stage, each with its cores, threads, devices and environment."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flywheel.errors import UserError
from flywheel.recipe import Recipe
from flywheel.runs import isolate, manifest
from flywheel.runs.ranks import Launch, LaunchFailed, Ranks
from flywheel.runs.stage import Stage

SMALL = 200 << 20  # bytes of weights below which one engine does not keep two cores busy
TINY = 16 << 20  # bytes of weights below which a training gains little from a second thread
Tell = Callable[[int, int, dict], None]  # progress: done, total, figures


def own_cores(ranks: Ranks) -> list[int]:
    """This rank's share of the cores that the launch may use."""
    every = sorted(os.sched_getaffinity(0))
    return every[ranks.local_rank :: ranks.local_world] or every


def threads_of(ranks: Ranks, recipe: Recipe) -> int:
    """CPU threads of this rank, all its processes together."""
    return isolate.threads_for(ranks.local_world, recipe.engine.threads)


def threads_alone(ranks: Ranks, recipe: Recipe) -> int:
    """CPU threads of one process that answers questions by itself.

    One for a small model, which gains little from more; two beside any other load are many times slower than one.
    """
    threads = threads_of(ranks, recipe)
    return threads // default_workers(recipe.model.base, threads)


def training_threads(ranks: Ranks, recipe: Recipe) -> int:
    """CPU threads of this rank's part of a training: one for a tiny model, unless `engine.threads` says more.

    Two threads of tiny steps wait for each other, beside any other load many times as long as they work.
    """
    threads = threads_of(ranks, recipe)
    return 1 if not recipe.engine.threads and small(recipe.model.base, TINY) else threads


def workers(recipe: Recipe, threads: int) -> int:
    if recipe.engine.tensor_parallel > 1 or recipe.engine.kind == "server":
        return 1  # one process keeps servers busy
    return min(threads, recipe.engine.workers or default_workers(recipe.model.base, threads))


def check_devices(ranks: Ranks, recipe: Recipe) -> None:
    """Raises UserError if the ranks of a host cannot be cut into groups of `engine.tensor_parallel`."""
    together = recipe.engine.tensor_parallel
    if ranks.local_world % together or ranks.world % together:
        raise UserError(
            f"engine.tensor_parallel: {together} devices an engine, but this launch has {ranks.local_world} processes"
            f" on this host, {ranks.world} in all; set num_processes to a multiple of {together}"
        )


def check_batches(ranks: Ranks, recipe: Recipe) -> None:
    """Raises UserError if the ranks of the launch cannot share a training's batch equally."""
    for key, spec in recipe.trainings.items():
        if spec.batch_size % ranks.world:
            raise UserError(
                f"{key}.batch_size: {spec.batch_size} cannot be shared by {ranks.world} processes; take a multiple"
            )


def default_workers(base: str, cores: int) -> int:
    """Number of sampling processes per rank if the recipe does not say: one per core for a small model on a CPU.

    A small model gains little from threads: one engine with two threads samples hardly faster than with one, while two
    engines with one thread each sample nearly twice as fast.
    """
    return cores if small(base, SMALL) else 1


def small(base: str, limit: int) -> bool:
    """Whether a base runs on the CPU and its weights have fewer bytes than `limit`."""
    weights = sum(path.stat().st_size for path in Path(base).glob("*.safetensors"))
    return 0 < weights < limit and not Path("/dev/nvidiactl").exists()


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
    launch: Launch,
    left: dict[int, isolate.Child] | None = None,
    leave_open: bool = False,
) -> dict:
    """This rank's part of a stage, in child processes; returns the figures of the first one.

    The others only process chunks, whose numbers `launch` gives them. If one process fails, all are ended. `watch` is
    called several times a second and ends the stage by raising. A rank whose device is part of another's engine does
    nothing in a sampling stage. Raises StageFailed, and StartAgain if the stage's process asks for it.

    left: worker number -> process. Before: what the stage before has left open, for this one to go on with. After: with
    `leave_open` this stage's own processes, else none.
    """
    together = recipe.engine.tensor_parallel
    if not stage.train and ranks.local_rank % together:
        return {}
    left = {} if left is None else left
    cores = own_cores(ranks)
    threads = training_threads(ranks, recipe) if stage.train else threads_of(ranks, recipe)
    count = 1 if stage.train else workers(recipe, threads)
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
            "world": ranks.world if stage.train else ranks.world // together * count,
            "cores": cores[worker::count] if bound else None,
            "leave_open": leave_open,
        }
        what = manifest.name_of((round, stage.name))
        if worker not in left:
            changed = environment(ranks, bool(stage.train), port, together)
            left[worker] = isolate.Child(what, len(range(worker, threads, count)), changed)
        child = left[worker]
        try:
            figures = child.call(
                "flywheel.runs.worker:perform_stage",
                arguments,
                what=what,
                log=manifest.stage_dir(run, round, stage.name) / f"rank_{rank}.log",
                tell=told,
                watch=watch,
                answers={"draw": launch.draw, "all drawn are written": over_all},
            )
            if not leave_open:
                child.close(watch)
        except BaseException:  # the main thread may have ended the others before this one was there
            child.end()
            raise
        return figures

    def over_all() -> bool:
        return all(other.done() for other in others) and launch.all_done()

    done, others = False, []
    isolate.ensure_server()  # here: the kernel would end one with the thread that started it
    try:
        with ThreadPoolExecutor(max(1, count - 1)) as pool:
            try:
                others += [pool.submit(call, w, watch_others) for w in range(1, count)]
                figures = call(0, lambda: (watch(), [other.result() for other in others if other.done()]))
                for other in others:
                    other.result()
            except BaseException:
                over.set()
                raise
        done = True
        return figures
    finally:
        if not (done and leave_open):
            isolate.end_all(left)


def call_alone(
    ranks: Ranks,
    recipe: Recipe,
    target: str,
    arguments: Mapping[str, Any],
    what: str,
    threads: int | None = None,
    log: Path | None = None,
    watch: Callable[[], None] = lambda: None,
) -> Any:
    """Call `module:function` in one process with the environment of a sampling stage's process, and its threads."""
    every = threads_of(ranks, recipe)
    return isolate.call(
        target,
        arguments,
        what=what,
        threads=threads or every // workers(recipe, every),
        environment=environment(ranks, False, 0, recipe.engine.tensor_parallel),
        log=log,
        watch=watch,
    )


def environment(ranks: Ranks, training: bool, port: int, together: int = 1) -> dict[str, str | None]:
    """Changes to the rank's environment for a stage's process; None unsets a variable.

    Each training of several ranks gets a new port for its torch.distributed store, which its own rank 0 hosts. Any
    other process sees `together` devices, its rank's own and the next, because vLLM's engine takes the first visible
    ones, and transformers would train one model on all.
    """
    changed: dict[str, str | None] = {"WANDB_MODE": "disabled", "TORCHELASTIC_USE_AGENT_STORE": None}
    if training and ranks.distributed:
        return {**changed, "MASTER_PORT": str(port)}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(i) for i in range(ranks.local_rank + together)] if given is None else given.split(",")
    if given != "" and ranks.local_rank < len(devices):  # empty: GPUs are hidden, and stay so
        changed["CUDA_VISIBLE_DEVICES"] = ",".join(devices[ranks.local_rank : ranks.local_rank + together])
    if training:
        return changed
    alone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    # a rehearsal trains in such a process too, more than once, which DeepSpeed does not allow
    return {**changed, **dict.fromkeys((*alone, "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"))}
