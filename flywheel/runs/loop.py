"""One launch of the loop: rank 0 leads through rounds and stages, the other ranks follow."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from flywheel.runs import isolate
from flywheel.runs import manifest
from flywheel.errors import UserError
from flywheel.runs.estimate import overview
from flywheel.runs.ranks import Launch, LaunchFailed, Ranks, RunLock, free_port
from flywheel.runs.manifest import Entry, stage_dir
from flywheel.problems.sources import load
from flywheel.recipe import Recipe
from flywheel.runs.run import Context, Stage, entries, perform
from flywheel.runs.shards import shard_dirs
from flywheel.runs.files import read_json, write_file, write_json

SMALL = 200 << 20  # bytes of weights: an engine of less does not fill two cores


class Stopped(BaseException):
    """A signal asked this process to end; its number."""


@contextmanager
def signals():
    """SIGTERM, SIGINT and SIGHUP raise Stopped, once; what follows is not interrupted again."""

    def stop(number, frame):
        for asked in watched:
            signal.signal(asked, signal.SIG_IGN)
        raise Stopped(number)

    # a signal that is ignored (nohup) stays so
    watched = [s for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in watched}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Loop:
    """One launch of one rank."""

    args: argparse.Namespace  # round, name, runs, dry_run
    load_recipe: Callable[[], Recipe]
    ranks: Ranks
    stages: str
    report: str
    preload: tuple[str, ...]
    preflight: str | None = None  # `module:function(recipe)`, which raises UserError
    launch: Launch | None = None
    at: str = ""  # the stage at hand
    parent: int = field(default_factory=os.getppid)

    @cached_property
    def recipe(self) -> Recipe:
        return self.load_recipe()

    @cached_property
    def run(self) -> Path:
        name = self.args.name or self.recipe.name
        if name != Path(name).name or name in ("", ".", ".."):
            raise UserError(f"--name: {name!r} cannot name a directory")
        return self.args.runs / name

    @property
    def where(self) -> str:
        return f" in {self.at}" if self.at else ""

    def plan(self, rounds: int) -> list[Entry]:
        return entries(isolate.resolve(self.stages), rounds)

    # ---- rank 0 ----

    def lead(self) -> int:
        notes: list[str] = []
        counts = {str(split): len(group) for split, group in load(self.recipe.problems, notes).items()}
        sources = manifest.source_files(self.recipe)
        reached = max(self.args.round, manifest.last_round(self.run))
        if not (self.run / "recipe.yaml").exists():
            self.check_model()  # before anything is written: what is wrong can then still be mended
        if not self.args.dry_run:
            self.open_run()
        manifest.check_recipe(self.run, self.recipe)
        manifest.check_run(self.run, self.recipe, sources, self.plan(reached))
        plan = self.plan(self.args.round)
        print(overview(self.recipe, self.run, plan, counts, self.ranks.world), flush=True)
        for note in notes:
            print(f"questions: {note}", flush=True)
        if self.args.dry_run:
            return 0
        todo = [entry for entry in plan if manifest.load(self.run, entry[0], entry[1].name) is None]
        rounds = sorted({entry[0] for entry in todo} | {r for r in range(self.args.round + 1) if not self.reported(r).is_file()})
        if not rounds:
            self.launch = Launch(self.run, self.ranks)  # the other ranks wait for a word
            self.dismiss()
            return self.nothing_to_do(len(plan))
        isolate.start_server(self.ranks.local_world, self.preload)
        self.launch = Launch(self.run, self.ranks)
        unreported = []
        for round in rounds:
            for entry in todo:
                if entry[0] == round:
                    self.lead_stage(entry, sources)
            if not self.after_round(round):
                unreported.append(round)
        self.dismiss()
        print(f"{self.run} is at the end of round {self.args.round}", flush=True)
        if unreported:
            raise UserError(f"the stages are done, but not the report of round {unreported[0]}; the same command makes it again")
        return 0

    def dismiss(self) -> None:
        """Tell the other ranks that it is over, and wait: a slower one may be in a sampling stage still, and must not find rank 0 gone."""
        self.launch.order(do="end")
        self.launch.wait_for_all()

    def check_model(self) -> None:
        """Ask the stages' `preflight`, in a process of its own. A model of the Hub is not fetched for a dry run."""
        if self.preflight is None or (self.args.dry_run and not Path(self.recipe.model.base).is_dir()):
            return
        isolate.start_server(self.ranks.local_world, () if self.args.dry_run else self.preload)
        isolate.call(self.preflight, {"recipe": self.recipe}, what="the recipe and its model", threads=1)

    def open_run(self) -> None:
        """Make and lock the run's directory; a new run keeps its recipe. Raises UserError, OSError."""
        with suppress(FileExistsError):
            self.run.mkdir(parents=True)
        if not self.run.is_dir():
            raise UserError(f"{self.run}: not a directory")
        self.lock = RunLock(self.run)
        self.lock.take()
        if not (self.run / "recipe.yaml").exists():
            if any(self.run.glob("round_*")):
                raise UserError(f"{self.run}: holds rounds but no recipe.yaml; put it back, or start another run with --name")
            text = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            write_file(self.run / "recipe.yaml", text.encode())

    def reported(self, round: int) -> Path:
        return self.run / f"round_{round}" / "reported"

    def nothing_to_do(self, stages: int) -> int:
        print(f"nothing to do: {self.run} is already at the end of round {self.args.round} (all {stages} stages are finished)", flush=True)
        summary = isolate.resolve(f"{self.report}:summary")(self.run)
        isolate.resolve(f"{self.report}:print_round")(summary, self.args.round)
        return 0

    def lead_stage(self, entry: Entry, sources: dict[str, str]) -> None:
        """All ranks carry out one stage; then its manifest is written."""
        round, stage, reads = entry
        directory = stage_dir(self.run, round, stage.name)
        for at in reads:
            manifest.check_files(stage_dir(self.run, *at), manifest.load(self.run, *at), contents=True)
        made_from = manifest.fingerprint(self.recipe, stage, sources, reads, self.run)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / manifest.FINGERPRINT, made_from)
        # of an earlier launch: what its finished chunks took, drawn side by side as they are now
        before = sum(read_json(shard / "shard.json")["seconds"] for shard in shard_dirs(directory)) / (self.ranks.world * self.processes(stage))
        started, port = time.monotonic(), free_port()
        self.launch.order(do="stage", round=round, stage=stage.name, port=port)
        with Progress(f"round {round}  {stage.name}") as progress:
            figures = self.stage_child(round, stage, port, progress.show)
            if stage.train:  # of a sampling stage all shards are there, whoever made them
                self.launch.wait_for_all()
        of_round = [s.name for s in isolate.resolve(self.stages)(round)]
        made = manifest.seal(
            directory,
            made_from,
            figures,
            time.monotonic() - started + before,
            self.ranks.world,
            of_round.index(stage.name),
            len(of_round),
        )
        for scratch in manifest.SCRATCH:
            if (directory / scratch).is_dir():
                shutil.rmtree(directory / scratch)
        print(f"round {round}  {stage.name:14s} {made['seconds']:7.1f} s  {brief(made)}", flush=True)
        self.at = ""

    def after_round(self, round: int) -> bool:
        """Print the round's tables and bring pictures and W&B up to date. A fault there loses nothing."""
        try:
            isolate.call(
                f"{self.report}:after_round", {"run": self.run, "round": round}, what=f"report of round {round}",
                threads=isolate.threads_for(self.ranks.local_world), watch=self.watch,
            )
        except isolate.StageFailed as error:
            print(f"flywheel: {error}", file=sys.stderr, flush=True)
            return False
        self.reported(round).touch()
        return True

    # ---- the other ranks ----

    def follow(self) -> int:
        if self.args.dry_run:
            return 0
        stages = isolate.resolve(self.stages)
        isolate.start_server(self.ranks.local_world, self.preload)
        self.launch = Launch(self.run, self.ranks)
        while (order := self.launch.next())["do"] == "stage":
            stage = next(s for s in stages(order["round"]) if s.name == order["stage"])
            self.stage_child(order["round"], stage, order["port"])
            self.launch.done()
        self.launch.done()  # rank 0 waits for this, and only then gives up the run
        return 0

    # ---- all ranks ----

    @property
    def cores(self) -> list[int]:
        """This rank's share of the cores that the launch may use."""
        every = sorted(os.sched_getaffinity(0))
        return every[self.ranks.local_rank :: self.ranks.local_world] or every

    def processes(self, stage: Stage) -> int:
        """How many this rank starts for `stage`."""
        return 1 if stage.train else min(len(self.cores), self.recipe.engine.workers or workers(self.recipe.model.base, len(self.cores)))

    def stage_child(self, round: int, stage: Stage, port: int, tell=lambda done, total, figures: None) -> dict[str, Any]:
        """This rank's part of a stage, in processes of its own: one for a training, perhaps several for sampling.

        The first one's figures count; the others only draw chunks. Whatever ends one of them ends all.
        """
        self.at = f"round_{round}/{stage.name}"
        cores = self.cores
        count = self.processes(stage)
        over = threading.Event()

        def watch() -> None:
            if over.is_set():
                raise LaunchFailed("another process of this rank ended")
            self.watch()

        def call(worker: int, tell=lambda done, total, figures: None, watch=watch) -> dict[str, Any]:
            rank = self.ranks.rank if worker == 0 else self.ranks.world * worker + self.ranks.rank
            arguments = {
                "recipe": self.recipe, "run": self.run, "round": round, "stage": stage.name, "stages": self.stages,
                "rank": rank, "world": self.ranks.world, "cores": cores[worker::count] if not stage.train and (count > 1 or self.ranks.local_world > 1) else None,
            }
            return isolate.call(
                "flywheel.runs.loop:perform_stage",
                arguments,
                what=self.at,
                threads=len(cores[worker::count]),
                environment=environment(self.ranks, bool(stage.train), port),
                log=stage_dir(self.run, round, stage.name) / f"rank_{rank}.log",
                tell=tell,
                watch=watch,
            )

        with ThreadPoolExecutor(max(1, count - 1)) as pool:
            others = [pool.submit(call, worker) for worker in range(1, count)]
            try:
                figures = call(0, tell, lambda: (self.watch(), [other.result() for other in others if other.done()]))
                for other in others:
                    other.result()
            except BaseException:
                over.set()
                raise
        return figures

    def watch(self) -> None:
        """Raises if this launch is over: another rank failed, or the launcher is gone."""
        if self.launch:
            self.launch.watch()
        # accelerate's simple launcher passes no SIGTERM on: it just dies and leaves us behind
        if os.getppid() != self.parent and any(key.startswith("ACCELERATE_") for key in os.environ):
            raise Stopped(signal.SIGTERM)

    def failed(self, line: str) -> None:
        """Say it once: rank 0 in the terminal, another rank to rank 0, which it then gives time to speak."""
        if self.ranks.rank == 0:
            print(f"flywheel: {line}", file=sys.stderr, flush=True)
        if self.launch:
            self.launch.fail(line)
        if self.ranks.rank and not isinstance(sys.exc_info()[1], LaunchFailed):
            end = time.monotonic() + 2 * isolate.GRACE
            while time.monotonic() < end and (self.launch is None or self.launch.lock.held()):
                time.sleep(0.1)


def workers(base: str, cores: int) -> int:
    """How many sampling processes fill the cores of a machine without a GPU.

    The steps of a small model are too short to be shared out: two threads in one engine
    sample little more than one, two engines of one thread each nearly twice as much.
    """
    weights = sum(path.stat().st_size for path in Path(base).glob("*.safetensors"))
    return cores if 0 < weights < SMALL and not Path("/dev/nvidiactl").exists() else 1


def perform_stage(recipe, run, round, stage, stages, rank, world, cores, tell) -> dict:
    """In the stage's process: one rank's part, on `cores` (None: all that the rank has)."""
    if cores:
        os.sched_setaffinity(0, cores)
    found = next(s for s in isolate.resolve(stages)(round) if s.name == stage)
    return perform(Context(recipe, run, round, found, rank, world, tell))


def environment(ranks: Ranks, training: bool, port: int) -> dict[str, str | None]:
    """What a stage's process has otherwise than its rank.

    A training meets on a port of its own, and hosts its store there itself. A sampling rank
    stands alone, with one device: vLLM's in-process engine takes the first one that it sees.
    """
    quiet = {"WANDB_MODE": "disabled"}  # one writer: the report
    if training:
        return {**quiet, "TORCHELASTIC_USE_AGENT_STORE": None, **({"MASTER_PORT": str(port)} if ranks.distributed else {})}
    devices = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d] or [str(i) for i in range(ranks.local_rank + 1)]
    if ranks.local_rank < len(devices):
        quiet["CUDA_VISIBLE_DEVICES"] = devices[ranks.local_rank]
    alone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
    return {**quiet, **dict.fromkeys(alone)}


def brief(made: dict[str, Any], most: int = 6) -> str:
    """A manifest in part of a line: its first plain figures, else its counts."""
    plain = {k: v for k, v in made["figures"].items() if isinstance(v, (int, float, str)) and (k == "why" or len(str(v)) < 60)}
    parts = [f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in (plain or made["counts"]).items()]
    if made["tokens"]:
        parts.insert(0, f"{made['tokens']:,} tokens")
    return ", ".join(parts[: most + 1])


class Progress:
    """A bar in a terminal; elsewhere a line at most every 30 seconds."""

    EVERY = 30.0

    def __init__(self, title: str):
        self.title, self.bar, self.last = title, None, time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, done: int, total: int, figures: dict[str, float]) -> None:
        notes = {key: f"{value:.4g}" for key, value in figures.items()}
        if sys.stderr.isatty():
            self.bar = self.bar if self.bar is not None else tqdm(desc=self.title, leave=False, total=total)
            self.bar.total = total
            self.bar.set_postfix(notes, refresh=False)
            self.bar.update(done - self.bar.n)
        elif time.monotonic() - self.last >= self.EVERY:
            self.last = time.monotonic()
            print(f"{self.title}  {done}/{total}  {' '.join(f'{k} {v}' for k, v in notes.items())}", flush=True)
