"""Kill runs at random moments, resume them, and compare: python tests/chaos/kills.py [--kills 100] [--ranks 1 2 4]

The loop is the real one (launch, ranks, stage processes, shards, manifests, trainer checkpoints) over the toy
stages, whose records are the same every time. After each kill every process of the run must be gone,
no finished shard touched, and at most two chunks a rank computed again; at the end of each run, resumed with some
number of ranks, every table must be byte for byte that of an undisturbed run. Prints a table and exits with 1 if
anything was lost, hung or leaked, or if half the kills of a case ended no launch.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from toy import HERE, Project, gone

from flywheel.runs.ranks import free_port

PATIENCE = 180.0  # seconds for a resumed run to end; an undisturbed one takes 3 on a quiet machine
ORPHAN = 6.0  # seconds for the processes of a killed run to be gone
ROUND = "2"


@dataclass
class Tally:
    tries: int = 0
    kills: int = 0  # two a try where it is killed while resuming
    lost: int = 0  # a table other than the undisturbed run's, or a finished shard touched
    hung: int = 0
    leaked: int = 0  # a process left
    redone: int = 0  # chunks computed again
    missed: int = 0  # a launch that ended well in spite of its kill: it was over, or the kill did nothing
    faults: list[str] = field(default_factory=list)


def family(project: Project) -> set[int]:
    """Every live process of this run: they all have its log in their environment."""
    mark, found = f"TOY_LOG={project.log}".encode(), set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0") and not gone(int(entry.name)):
                found.add(int(entry.name))
        except (OSError, PermissionError):
            continue  # it has just ended
    return found - {os.getpid()}


def start(project: Project, world: int, launcher: bool = False) -> list[subprocess.Popen]:
    """The ranks of one launch, or `accelerate launch` of them."""
    if launcher:
        # a single process by accelerate's simple launcher, several by torch elastic
        how = HERE.parent / "accelerate_configs" / ("cpu.yaml" if world == 1 else "cpu_2.yaml")
        wrapper = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(how)]
        wrapper += ["--num_processes", str(world), "--no_python"]
        return [project.start("--round", ROUND, wrapper=wrapper, TOY_SLEEP=0.05)]
    if world == 1:
        return [project.start("--round", ROUND, TOY_SLEEP=0.05)]
    group = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "TOY_SILENCE": 30,
    }
    return [
        project.start("--round", ROUND, RANK=r, LOCAL_RANK=r, TOY_RANK=r, TOY_SLEEP=0.05, **group) for r in range(world)
    ]


def put_down(project: Project) -> list[str]:
    """Kill what lives of a run that hangs; returns what there was, and where it was."""
    members = sorted(family(project))
    told = [f"  alive: {pid} {words(pid)}" for pid in members]
    for number in (signal.SIGUSR1, signal.SIGKILL):
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(1.0)
    stacks = Path(f"{project.log}.stacks")
    return told + (stacks.read_text().splitlines() if stacks.exists() else [])


def words(pid: int) -> str:
    """A process's command line, and what it waits for in the kernel."""
    found = []
    for name in ("cmdline", "wchan"):
        with suppress(OSError):  # it has just ended
            found.append(Path(f"/proc/{pid}/{name}").read_text().replace("\0", " ")[:120])
    return " ".join(found)


def stamps(project: Project) -> dict[str, tuple[int, int]]:
    if not project.run_dir.exists():
        return {}
    return {
        str(p): (p.stat().st_ino, p.stat().st_mtime_ns)
        for shard in project.run_dir.rglob("shards/[0-9]*")
        for p in [shard, *shard.iterdir()]
    }


def lines(project: Project) -> int:
    return len(project.log.read_text().splitlines()) if project.log.exists() else 0


def wait_for_work(project: Project, processes: list[subprocess.Popen], more: int) -> None:
    """Until `more` things were logged by this launch, or it ended."""
    seen, end = lines(project), time.monotonic() + PATIENCE
    while lines(project) < seen + more and any(p.poll() is None for p in processes) and time.monotonic() < end:
        time.sleep(0.005)


def kill(rng: random.Random, project: Project, processes: list[subprocess.Popen], case: str) -> None:
    members = sorted(family(project))
    match case:
        case "SIGKILL to a random process" | "SIGKILL while resuming":
            victims = [(pid, signal.SIGKILL) for pid in rng.sample(members, min(1, len(members)))]
        case "two SIGKILLs in quick succession":
            victims = [(pid, signal.SIGKILL) for pid in rng.sample(members, min(2, len(members)))]
        case "SIGKILL to every rank":
            victims = [(p.pid, signal.SIGKILL) for p in processes]
        case "SIGTERM to the launcher" | "SIGINT to a rank":
            number = signal.SIGTERM if "TERM" in case else signal.SIGINT
            victims = [(rng.choice(processes).pid, number)]
    for pid, number in victims:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # it ended in between: a kill at the end of a run is one too
        time.sleep(rng.random() * 0.05)


CASES = (
    "SIGKILL to a random process",
    "two SIGKILLs in quick succession",
    "SIGKILL to every rank",
    "SIGINT to a rank",
    "SIGTERM to the launcher",
    "SIGKILL while resuming",
)


def ended(processes: list[subprocess.Popen], seconds: float) -> bool:
    end = time.monotonic() + seconds
    for process in processes:
        try:
            process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
    return True


def one_run(
    rng: random.Random, case: str, folder: Path, wanted: dict[str, bytes], tally: Tally, ranks: list[int]
) -> None:
    """One run, killed once (twice where it is killed while resuming), and resumed to its end by some of `ranks`."""
    project = Project(folder)
    kept: dict[str, tuple[int, int]] = {}
    worlds = []
    for attempt in range(2 if case == "SIGKILL while resuming" else 1):
        world = rng.choice(ranks)
        worlds.append(world)
        processes = start(project, world, launcher="launcher" in case)
        wait_for_work(project, processes, rng.randrange(1, 40) if attempt == 0 else rng.randrange(1, 6))
        time.sleep(rng.random() * 0.06)
        kill(rng, project, processes, case)
        tally.kills += 1
        # a killed child ends its rank, a killed rank the others: by themselves
        if not ended(processes, PATIENCE):
            tally.hung += 1
            ends = [p.poll() for p in processes]  # those of ranks, not of what still holds their output open
            tally.faults.append(f"{case}: a launch of {world} did not end by itself: {ends}")
            tally.faults += put_down(project)
            ended(processes, PATIENCE)
        tally.missed += not any(p.returncode for p in processes)
        end = time.monotonic() + ORPHAN
        while (left := family(project)) and time.monotonic() < end:
            time.sleep(0.02)
        if left:
            tally.leaked += len(left)
            tally.faults.append(f"{case}: {len(left)} processes were left")
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        now = stamps(project)
        if not kept.items() <= now.items():
            tally.lost += 1
            tally.faults.append(f"{case}: a finished shard was touched")
        kept = now
    world = rng.choice(ranks)
    worlds.append(world)
    processes = start(project, world)
    if not ended(processes, PATIENCE) or any(p.returncode for p in processes):
        tally.hung += 1
        tally.faults.append(f"{case}: the resumed launch of {world} ended with {[p.poll() for p in processes]}")
        tally.faults += put_down(project)
    made = project.tables()
    if made != wanted or not kept.items() <= stamps(project).items():
        tally.lost += 1
        other = [name for name in wanted.keys() | made.keys() if made.get(name) != wanted.get(name)]
        tally.faults.append(f"{case}: {other[:3]} differ, or a shard was touched")
    chunks = Counter(what for what, _, _ in project.logged("") if what.count(":") == 2)
    again = sum(n - 1 for n in chunks.values())
    tally.redone += again
    allowed = sum(2 * world for world in worlds[:-1])
    if again > allowed:
        tally.lost += 1
        tally.faults.append(f"{case}: {again} chunks were computed again, {allowed} at most wanted")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="one is drawn a launch")
    args = parser.parse_args()
    started, tallies, done = time.monotonic(), {case: Tally() for case in CASES}, 0
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        alone = Project(Path(scratch, "alone"))
        if not ended(start(alone, 1), PATIENCE):
            raise SystemExit("the undisturbed run did not end")
        wanted = alone.tables()
        with suppress(KeyboardInterrupt):  # the table is of the runs that ended
            while done < args.kills:
                case = CASES[done % len(CASES)]
                rng = random.Random(f"{args.seed}/{done}")
                one_run(rng, case, Path(scratch, f"run{done}"), wanted, tallies[case], args.ranks)
                tallies[case].tries += 1
                done += 1
    print(f"{'case':36s} {'tries':>5s} {'lost':>5s} {'hung':>5s} {'leaked':>6s} {'redone':>6s} {'missed':>6s} of kills")
    for case, t in tallies.items():
        print(
            f"{case:36s} {t.tries:5d} {t.lost:5d} {t.hung:5d} {t.leaked:6d} {t.redone:6d} {t.missed:6d} of {t.kills:5d}"
        )
    faults = [line for t in tallies.values() for line in t.faults]
    faults += [
        f"{case}: {t.missed} of {t.kills} kills ended no launch"
        for case, t in tallies.items()
        if 2 * t.missed > t.kills
    ]
    print(
        f"{done} kills in {time.monotonic() - started:.0f} s, {len(wanted)} tables compared after each",
        *faults,
        sep="\n",
    )
    return 1 if faults or not wanted else 0


if __name__ == "__main__":
    sys.exit(main())
