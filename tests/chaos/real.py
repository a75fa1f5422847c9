"""Kill a real round, vLLM and TRL, at random moments: python tests/chaos/real.py [--kills 10] [--ranks 1]

Micro rounds (those of tests/stages/test_round.py), killed about once a stage. After each kill every process of the run
must be gone by itself and no finished shard touched; then it is started again, and at last left to end. At the end
`flywheel verify` must
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
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from flywheel.runs.files import read_rows
from flywheel.stages import ORDER
from tests.stages.test_round import SMALL

ROOT = Path(__file__).parents[2]
PATIENCE = 900.0  # seconds
ORPHAN = 10.0


def start(runs: Path, mark: str, ranks: int) -> subprocess.Popen:
    command = [sys.executable, "-m"]
    if ranks > 1:
        config = ROOT / "accelerate_configs" / "cpu_2.yaml"
        command += ["accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(ranks), "-m"]
    command += ["flywheel.iterate", "--runs", str(runs), "--name", "micro", "--round", "1"]
    for item in SMALL:
        command += ["--set", item]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "FLYWHEEL_CHAOS": mark},
    )


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
    return {
        str(p): (p.stat().st_ino, p.stat().st_mtime_ns)
        for shard in run.rglob("shards/[0-9]*")
        if shard.name.isdigit()
        for p in [shard, *shard.iterdir()]
    }


def manifests(run: Path) -> int:
    return len(list(run.glob("round_*/*/manifest.json")))


def harvest(run: Path) -> bytes:
    return (run / "round_1/harvest/harvest.parquet").read_bytes()


def whole(run: Path) -> list[str]:
    """What is wrong with a run that ended."""
    faults = []
    verified = subprocess.run(
        [sys.executable, "-m", "flywheel.verify", str(run)], cwd=ROOT, capture_output=True, text=True
    )
    if verified.returncode:
        faults.append(f"flywheel.verify: {verified.stdout[-300:]}")
    missing = [stage for stage in ORDER if not (run / "round_1" / stage / "manifest.json").is_file()]
    if missing:
        faults.append(f"no manifest of {missing}")
    return faults


def killed(run: Path, rng: random.Random, kills: int, cases: Counter, faults: list[str], mark: str, ranks: int) -> None:
    """One run, killed up to `kills` times, about once a stage, and resumed to its end."""
    kept: dict[str, tuple[int, int]] = {}
    process = None
    for kill in range(1, kills + 1):
        before = manifests(run)
        if process is None:
            process = start(run.parent, f"{mark}-{kill}", ranks)
            alive = f"{mark}-{kill}"
        end = time.monotonic() + PATIENCE
        while process.poll() is None and manifests(run) <= before and time.monotonic() < end:
            time.sleep(0.02)
        pause = time.monotonic() + rng.uniform(0, 3)
        while process.poll() is None and time.monotonic() < pause:
            time.sleep(0.02)
        if process.poll() is not None:
            break
        case = rng.choice(["SIGKILL to a random process", "SIGTERM to the launcher"])
        victim, number = (
            (rng.choice(sorted(family(alive))), signal.SIGKILL) if "KILL" in case else (process.pid, signal.SIGTERM)
        )
        os.kill(victim, number)
        cases[case] += 1
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:  # some are needed by nobody at the moment, as the resource tracker
            cases["(of them survived)"] += 1
            print(f"{case}: the round went on", flush=True)
            continue
        end = time.monotonic() + ORPHAN
        while (left := family(alive)) and time.monotonic() < end:
            time.sleep(0.05)
        for pid in left:
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
                faults.append(f"{case}: a process was left: state and parent {state}, {words[:120]}")
                os.kill(pid, signal.SIGKILL)
        if process.returncode == 0:
            break  # the last stage had ended
        process, now = None, stamps(run)
        if not kept.items() <= now.items():
            faults.append(f"{case}: a finished shard was touched")
        kept = now
        print(f"{case}: {manifests(run)} stages finished, {len(kept)} files of shards", flush=True)
    code = (process or start(run.parent, f"{mark}-end", ranks)).wait(PATIENCE)
    if code:
        faults.append(f"the resumed round ended with {code}")
    if not kept.items() <= stamps(run).items():
        faults.append("a finished shard was touched by the last launch")
    faults += whole(run)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1, help="that `accelerate launch` starts, if more than one")
    args = parser.parse_args()
    rng, faults, cases, same, rows = random.Random(args.seed), [], Counter(), [], 0
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        alone = Path(scratch, "alone", "micro")
        begun = time.monotonic()
        if start(alone.parent, f"{os.getpid()}-alone", args.ranks).wait(PATIENCE):
            raise SystemExit("the undisturbed round failed")
        seconds = time.monotonic() - begun
        runs = 0
        while (
            left := args.kills - sum(n for case, n in cases.items() if case.startswith("SIG"))
        ) > 0 and runs < args.kills:
            run = Path(scratch, f"killed_{runs}", "micro")
            killed(run, rng, left, cases, faults, f"{os.getpid()}-{runs}", args.ranks)
            rows += sum(len(read_rows(path)) for path in run.rglob("*.parquet"))  # raises for a table that is not whole
            same.append(harvest(run) == harvest(alone))
            runs += 1
    print(
        f"{', '.join(f'{n} x {case}' for case, n in cases.items())}; {runs} rounds, an undisturbed one {seconds:.0f} s;"
        f" {rows:,} rows read, "
        f"harvest the same in {sum(same)} of {len(same)}",
        *faults,
        sep="\n",
    )
    return 1 if faults or left > 0 else 0


if __name__ == "__main__":
    sys.exit(main())
