"""One launch of the loop: rank 0 leads through rounds and stages, the other ranks follow."""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml

from flywheel.errors import StartAgain, UserError
from flywheel.problems.sources import load
from flywheel.recipe import Recipe
from flywheel.runs import isolate, manifest
from flywheel.runs.estimate import RATES_VERSION, Rates, cpu_name, guessed, keep, measured, overview
from flywheel.runs.files import read_json, write_file, write_json
from flywheel.runs.fork import fork
from flywheel.runs.manifest import stage_dir
from flywheel.runs.processes import Tell, call_alone, check_batches, check_devices, run_stage, threads_of, workers
from flywheel.runs.ranks import Launch, Ranks, free_port, lock
from flywheel.runs.rehearsal import rehearse
from flywheel.runs.run import SKIPPED, Run
from flywheel.runs.shards import check_shard, shard_dirs
from flywheel.runs.stage import Scheduled, Stage, schedule
from flywheel.runs.terminal import Progress, brief

STARTS = 12  # of one stage; each halves a training's micro batch
LAST = 60.0  # seconds that a launch which was asked to end takes at most


class Stopped(BaseException):
    """A signal asked this process to end; args[0] is its number."""


@contextmanager
def signals():
    """Inside, the first SIGTERM, SIGINT or SIGHUP raises Stopped; later ones are ignored, so clean-up can finish."""

    def stop(number, frame):
        # a library may catch what is raised, or wait for its own threads: then this prints where, and ends the process
        faulthandler.dump_traceback_later(LAST, exit=True, file=sys.__stderr__)
        for asked in watched:
            signal.signal(asked, signal.SIG_IGN)
        raise Stopped(number)

    # a signal that is ignored already (nohup) stays ignored
    watched = [s for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in watched}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Loop:
    """One rank's part of a launch."""

    args: argparse.Namespace  # round, name, runs, dry_run, fork, force
    load_recipe: Callable[[], Recipe]
    ranks: Ranks
    stages: str
    report: str
    preload: tuple[str, ...]
    preflight: str | None = None  # `module:function(recipe)`: ids to leave out; raises UserError
    rehearsal: str | None = None  # a module with what `runs/rehearsal.py` calls; raises UserError
    launch: Launch | None = None
    at: str = ""  # the current stage
    left: dict[int, isolate.Child] = field(default_factory=dict)  # processes that a stage has left to the next one
    parent: int = field(default_factory=os.getppid)  # the launcher

    @cached_property
    def recipe(self) -> Recipe:
        return self.load_recipe()

    @cached_property
    def run(self) -> Path:
        name = self.args.name or self.recipe.name
        if name != Path(name).name or name in ("", ".", ".."):
            raise UserError(f"--name: {name!r} cannot name a directory")
        return self.args.runs / name

    def plan(self, rounds: int) -> list[Scheduled]:
        planned = schedule(isolate.resolve(self.stages), rounds)
        return [scheduled for scheduled in planned if not (self.args.no_test and scheduled.stage.test_split)]

    def go(self) -> int:
        """Carry out the launch; returns the exit code.

        No stage's process is left: at its end Python would wait for it, and it for this one.
        """
        try:
            return self.lead() if self.ranks.rank == 0 else self.follow()
        finally:
            isolate.end_all(self.left)

    # ---- rank 0 ----

    def lead(self) -> int:
        if not self.args.dry_run:
            self.launch = Launch(self.ranks)  # first of all: the others wait for a sign of life
        notes: list[str] = []
        check_devices(self.ranks, self.recipe)
        if self.preflight:
            check_batches(self.ranks, self.recipe)
        problems = load(self.recipe.problems, notes)
        sources = manifest.source_files(self.recipe)
        reached = max(self.args.round, manifest.last_round(self.run))
        new = not (self.run / "recipe.yaml").exists()
        # before the recipe is stored: afterwards it can no longer be changed
        skipped = self.check_model() if new else Run(self.run, self.recipe).skipped
        rates = self.rates(sources, new)
        if skipped:
            notes.append(f"{len(skipped)} that do not fit engine.max_model_len are left out (problems.skip_long)")
        counts = {str(split): sum(p.id not in skipped for p in group) for split, group in problems.items()}
        if not self.args.dry_run:
            self.open_run(skipped)
        manifest.check_recipe(self.run, self.recipe)
        self.fork(sources)
        manifest.check_run(self.run, self.recipe, sources, self.plan(reached))
        plan = self.plan(self.args.round)
        todo = [scheduled for scheduled in plan if manifest.load(self.run, *scheduled.at) is None]
        parts = workers(self.recipe, threads_of(self.ranks, self.recipe))
        print(overview(self.recipe, self.run, plan, counts, rates, self.ranks.world, parts), flush=True)
        for note in notes:
            print(f"questions: {note}", flush=True)
        if self.args.dry_run:
            return 0
        unreported = {scheduled.round for scheduled in plan if not self.reported(scheduled.round).is_file()}
        rounds = sorted({scheduled.round for scheduled in todo} | unreported)
        if not rounds:
            self.dismiss()
            return self.nothing_to_do(len(plan))
        isolate.start_server(threads_of(self.ranks, self.recipe), self.preload)
        failed = []
        for round in rounds:
            mine = [scheduled for scheduled in todo if scheduled.round == round]
            for scheduled, after in itertools.zip_longest(mine, mine[1:]):
                shared = after is not None and after.stage.shares == scheduled.stage.name
                self.lead_stage(scheduled, sources, shared)
            if not self.after_round(round):
                failed.append(round)
        self.dismiss()
        print(f"{self.run} is at the end of round {self.args.round}", flush=True)
        if failed:
            raise UserError(
                f"the stages are done, but not the report of round {failed[0]}; the same command makes it again"
            )
        return 0

    def dismiss(self) -> None:
        """Tell the other ranks to end, and wait for them: they would fail if rank 0, and its store, were gone."""
        self.launch.order(do="end")
        self.launch.wait_for_all()
        self.launch.stop()

    def check_model(self) -> Collection[str]:
        """Call `preflight` in a process of its own; returns the ids of questions to leave out.

        A dry run does not download a model from the Hub for it.
        """
        if not self.preflight or self.needs_download:
            return ()
        isolate.start_server(threads_of(self.ranks, self.recipe), self.preload)
        asked = {"recipe": self.recipe}
        return call_alone(self.ranks, self.recipe, self.preflight, asked, "the recipe and its model", watch=self.watch)

    @property
    def needs_download(self) -> bool:
        models = [self.recipe.model.base, *([rival.model] if (rival := self.recipe.prm.published) else [])]
        return self.args.dry_run and not all(Path(model).is_dir() for model in models)

    def rates(self, sources: dict[str, str], new: bool) -> Rates:
        """This machine's speeds with the base: from the rehearsal of a new run, else measured before, else guessed.

        A dry run rehearses only what was not measured before. Raises UserError if the rehearsal finds a fault.
        """
        threads = threads_of(self.ranks, self.recipe)
        sections = {"model", "engine", "prompts", "sample", "calibrate", "problems", *self.recipe.trainings}
        recipe = self.recipe.model_dump(mode="json", include=sections)
        key = {"recipe": recipe, "sources": sources, "threads": threads, "cpu": cpu_name(), "rates": RATES_VERSION}
        known = measured(key)
        if new and self.rehearsal and not (self.args.dry_run and (known or self.needs_download)):
            isolate.start_server(threads, self.preload)
            if known := rehearse(self.ranks, self.recipe, self.rehearsal, self.args.force, self.watch):
                keep(key, known)
        return known or guessed(self.recipe)

    def open_run(self, skipped: Collection[str]) -> None:
        """Create and lock the run's directory; store the recipe of a new run. Raises UserError, OSError."""
        with suppress(FileExistsError):
            self.run.mkdir(parents=True)
        if not self.run.is_dir():
            raise UserError(f"{self.run}: not a directory")
        self.lock = lock(self.run)
        if not (self.run / "recipe.yaml").exists():
            if any(self.run.glob("round_*")):
                raise UserError(
                    f"{self.run}: holds rounds but no recipe.yaml; put it back, or start another run with --name"
                )
            (self.run / SKIPPED).unlink(missing_ok=True)
            if skipped:
                write_json(self.run / SKIPPED, sorted(skipped))
            text = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            write_file(self.run / "recipe.yaml", text.encode())

    def fork(self, sources: dict[str, str]) -> None:
        """With --fork, take over the named run's finished stages whose fingerprints match this recipe."""
        if self.args.fork:
            print(f"{self.run} forks {self.args.fork}:")
            plan = self.plan(max(self.args.round, manifest.last_round(self.args.fork)))
            for line in fork(self.args.fork, self.run, self.recipe, sources, plan, dry=self.args.dry_run):
                print(f"  {line}", flush=True)

    def reported(self, round: int) -> Path:
        return self.run / f"round_{round}" / "reported"

    def nothing_to_do(self, stages: int) -> int:
        print(
            f"nothing to do: {self.run} is already at the end of round {self.args.round}"
            f" (all {stages} stages are finished)",
            flush=True,
        )
        if self.args.no_test:
            return 0
        summary = isolate.resolve(f"{self.report}:summary")(Run(self.run, self.recipe))
        isolate.resolve(f"{self.report}:print_round")(summary, self.args.round)
        return 0

    def lead_stage(self, scheduled: Scheduled, sources: dict[str, str], leave_open: bool) -> None:
        """Carry out one stage on all ranks, then write its manifest; `leave_open` its engines, for the next stage."""
        round, stage = scheduled.round, scheduled.stage
        self.reported(round).unlink(missing_ok=True)
        directory = stage_dir(self.run, *scheduled.at)
        for at in scheduled.reads:
            manifest.check_files(stage_dir(self.run, *at), manifest.load(self.run, *at), contents=True)
        found = {int(shard.name): check_shard(shard) for shard in shard_dirs(directory)}  # once, for all processes
        made_from = manifest.fingerprint(self.run, self.recipe, sources, scheduled)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / manifest.FINGERPRINT, made_from)
        # seconds that earlier launches spent on this stage, if with as many processes as now
        drawn = sum(shard["seconds"] for shard in found.values())
        samplers = self.ranks.world // self.recipe.engine.tensor_parallel
        before = drawn / (samplers * workers(self.recipe, threads_of(self.ranks, self.recipe)))
        started, have = time.monotonic(), list(found)
        for attempt in range(STARTS):
            port = free_port()
            what = {"round": round, "stage": stage.name, "port": port, "have": have, "leave_open": leave_open}
            self.launch.order(do="stage", asked=self.asked, **what)
            try:
                with Progress(f"round {round}  {stage.name}") as progress:
                    figures = self.run_stage(round, stage, port, leave_open, progress.show)
                    self.launch.wait_for_all()
                break
            except StartAgain as error:  # of this rank or another
                print(error, flush=True)
                self.launch.start_again(str(error))
                self.launch.wait_for_all()
                if attempt == STARTS - 1:
                    raise
        seconds = time.monotonic() - started + before
        made = manifest.seal(self.run, scheduled, made_from, figures, seconds, self.ranks.world)
        for scratch in manifest.SCRATCH:
            if (directory / scratch).is_dir():
                shutil.rmtree(directory / scratch)
        verdicts = Counter()
        for shard in shard_dirs(directory):
            verdicts.update(read_json(shard / "shard.json").get("verdicts", {}))
        print(f"round {round}  {stage.name:14s} {made['seconds']:7.1f} s  {brief(made, verdicts)}", flush=True)
        self.at = ""

    def after_round(self, round: int) -> bool:
        """Print the round's tables and update pictures and W&B. Returns False if that failed; the run goes on."""
        try:
            isolate.call(
                f"{self.report}:after_round",
                {"run": Run(self.run, self.recipe), "round": round},
                what=f"report of round {round}",
                threads=threads_of(self.ranks, self.recipe),
                watch=self.watch,
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
        isolate.start_server(isolate.threads_for(self.ranks.local_world), self.preload)
        self.launch = Launch(self.ranks)
        while (order := self.launch.next())["do"] == "stage":
            if order["asked"] != self.asked:
                raise UserError("its recipe or run is not rank 0's: start all ranks with the same options")
            stage = next(s for s in stages(order["round"]) if s.name == order["stage"])
            try:
                self.run_stage(order["round"], stage, order["port"], order["leave_open"])
            except StartAgain as error:
                self.launch.start_again(str(error))
            self.launch.done()
        self.launch.done()  # rank 0 waits for this before it ends
        self.launch.stop()
        return 0

    # ---- all ranks ----

    @property
    def asked(self) -> list:
        """What every rank was asked to do: the run's name and the recipe, without what may differ between hosts."""
        local = {"model": {"base"}, "problems": {"path"}, "engine": True, "track": True}
        return [self.run.name, self.recipe.model_dump(mode="json", exclude=local)]

    def run_stage(
        self, round: int, stage: Stage, port: int, leave_open: bool, tell: Tell = lambda done, total, figures: None
    ) -> dict:
        """This rank's part of a stage; rank 0 returns its figures."""
        self.at = manifest.name_of((round, stage.name))
        try:
            job = (self.ranks, self.recipe, self.run, round, stage, self.stages, port)
            return run_stage(*job, tell, self.watch, self.launch, self.left, leave_open)
        except isolate.StageFailed:
            if stage.train:
                self.launch.listen(self.watch)
            raise

    def watch(self) -> None:
        """Raises LaunchFailed or Stopped if this launch is over: another rank failed, or the launcher is gone."""
        if self.launch:
            self.launch.watch()
        # accelerate's simple launcher does not forward SIGTERM: it dies and leaves its children running
        if os.getppid() != self.parent and isolate.launched():
            raise Stopped(signal.SIGTERM)

    def failed(self, line: str) -> None:
        """Report a failure once: by rank 0, or, if it cannot, by the first other rank of each host."""
        rank, first = self.ranks.rank, max(1, self.ranks.rank - self.ranks.local_rank)
        if rank == 0:
            print(f"flywheel: {line}", file=sys.stderr, flush=True)
        if self.launch:
            self.launch.fail(line)
        told = self.launch is not None and self.launch.told
        if rank == first and not told:
            print(f"flywheel: {line}", file=sys.stderr, flush=True)
