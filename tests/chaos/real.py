"""Kill a real round, vLLM and TRL, at random moments: python tests/chaos/real.py [--kills 10] [--seed 0]

One micro round (tests/test_round.py's). After each kill every process of the run must be gone by itself and no finished
shard touched; then it is started again, until the kills are used up, and left to end. At the end `flywheel.verify` must
find every checksum and fingerprint right, every stage its manifest, and every table whole. Whether the harvest is that
of an undisturbed run is told and not asked: a training that went on from its checkpoint may differ in its last bit.
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from flywheel.stages import ORDER
from flywheel.store import read_rows
from tests.test_round import SMALL

ROOT = Path(__file__).parents[2]
PATIENCE = 900.0  # seconds
ORPHAN = 10.0


def start(runs: Path, mark: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "flywheel.iterate", "--runs", str(runs), "--name", "micro", "--round", "1"]
    for item in SMALL:
        command += ["--set", item]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "FLYWHEEL_CHAOS": mark})


def family(mark: str) -> set[int]:
    """Every live process with this mark in its environment."""
    wanted, found = f"FLYWHEEL_CHAOS={mark}".encode(), set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if alive and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.add(int(entry.name))
        except (OSError, PermissionError):
            continue  # it has just ended
    return found


def stamps(run: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for shard in run.rglob("shards/[0-9]*") if shard.name.isdigit() for p in [shard, *shard.iterdir()]}


def manifests(run: Path) -> int:
    return len(list(run.glob("round_*/*/manifest.json")))


def harvest(run: Path) -> bytes:
    return (run / "round_1/harvest/harvest.parquet").read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, faults, cases = random.Random(args.seed), [], Counter()
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        alone, run = Path(scratch, "alone", "micro"), Path(scratch, "killed", "micro")
        begun = time.monotonic()
        if start(alone.parent, f"{os.getpid()}-alone").wait(PATIENCE):
            raise SystemExit("the undisturbed round failed")
        whole = time.monotonic() - begun
        kills = 0
        kept: dict[str, tuple[int, int]] = {}
        while kills < args.kills:
            mark = f"{os.getpid()}-{kills}"
            process, before = start(run.parent, mark), manifests(run)
            # two or three stages further on, at some moment of one: ten kills then fall all over the round
            wait = rng.uniform(0.01, 0.1) * whole
            end = time.monotonic() + 3 + wait
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            if process.poll() is not None:
                if not process.returncode and kills < args.kills:
                    faults.append(f"the round ended before {args.kills} kills; another --seed, or fewer --kills")
                elif process.returncode or manifests(run) <= before:
                    faults.append(f"after {kills} kills a launch ended by itself with {process.returncode}")
                break
            members = sorted(family(mark))
            case = rng.choice(["SIGKILL to a random process", "SIGTERM to the launcher"])
            victim, number = (rng.choice(members), signal.SIGKILL) if "KILL" in case else (process.pid, signal.SIGTERM)
            os.kill(victim, number)
            kills += 1
            cases[case] += 1
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                faults.append(f"kill {kills}, {case}: hung")
                process.kill()
            end = time.monotonic() + ORPHAN
            while (left := family(mark)) and time.monotonic() < end:
                time.sleep(0.05)
            for pid in left:
                faults.append(f"kill {kills}, {case}: a process was left")
                os.kill(pid, signal.SIGKILL)
            now = stamps(run)
            if not kept.items() <= now.items():
                faults.append(f"kill {kills}, {case}: a finished shard was touched")
            kept = now
            print(f"kill {kills}: {case}, {manifests(run)} stages finished, {len(kept)} files of shards", flush=True)
        if start(run.parent, f"{os.getpid()}-end").wait(PATIENCE):
            faults.append("the resumed round failed")
        verified = subprocess.run([sys.executable, "-m", "flywheel.verify", str(run)], cwd=ROOT, capture_output=True, text=True)
        if verified.returncode:
            faults.append(f"flywheel.verify: {verified.stdout[-300:]}")
        missing = [stage for stage in ORDER if not (run / "round_1" / stage / "manifest.json").is_file()]
        if missing:
            faults.append(f"no manifest of {missing}")
        rows = sum(len(read_rows(path)) for path in run.rglob("*.parquet"))  # raises for a table that is not whole
        same = harvest(run) == harvest(alone)
    print(f"{kills} kills ({', '.join(f'{n} x {case}' for case, n in cases.items())}), an undisturbed round takes {whole:.0f} s; {rows:,} rows read, "
          f"harvest {'the same' if same else 'ANOTHER'}", *faults, sep="\n")  # fmt: skip
    return 1 if faults or kills < args.kills else 0


if __name__ == "__main__":
    sys.exit(main())
