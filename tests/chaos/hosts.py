"""Two hosts, one of which fails: python tests/chaos/hosts.py [--launcher accelerate] [--only WORD]

The hosts are network namespaces with hostnames of their own, joined by one link, and share a folder. Each runs one rank
of the loop over the toy stages: started by itself, as srun does, or by `accelerate launch`. A host is killed, frozen
(SIGSTOP to all of it), cut off, or never started: the other must end within a minute with one line, whichever it is,
and the same command on both must then end with the tables of an undisturbed run. Then both work on file systems that
lie (storage/sitecustomize.py), and with `accelerate launch --max_restarts` a rank is killed, and the launch must end
well by itself. Needs root and `ip`. Prints a table; exits with 1 on a fault.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from toy import HERE, Project, gone, wait_for

LIMIT = 60.0  # seconds for the survivor to end
PATIENCE = 900.0  # seconds for an undisturbed launch
HOSTS = ("fwone", "fwtwo")
ADDRESSES = ("10.77.18.1", "10.77.18.2")
HARMS = ("killed", "frozen", "cut off", "never started")
STORAGE = ("nfs", "lustre", "localflock")


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def network() -> Iterator[None]:
    """Two namespaces and the link between them. Raises CalledProcessError where this user may not make them."""
    try:
        for host in HOSTS:
            run("ip", "netns", "add", host)
        run("ip", "link", "add", "fwlink1", "netns", HOSTS[0], "type", "veth", "peer", "fwlink2", "netns", HOSTS[1])
        for i, (host, address) in enumerate(zip(HOSTS, ADDRESSES), start=1):
            run("ip", "-n", host, "address", "add", f"{address}/24", "dev", f"fwlink{i}")
            run("ip", "-n", host, "link", "set", "lo", "up")
        link("up")
        yield
    finally:
        for host in HOSTS:
            with suppress(subprocess.CalledProcessError):  # it was not made
                send(host, signal.SIGKILL)
                run("ip", "netns", "delete", host)


def link(state: str) -> None:
    for i, host in enumerate(HOSTS, start=1):
        run("ip", "-n", host, "link", "set", f"fwlink{i}", state)


def members(host: str) -> list[int]:
    return [pid for pid in map(int, run("ip", "netns", "pids", host).split()) if not gone(pid)]


def send(host: str, number: int) -> None:
    for pid in members(host):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@dataclass
class Launch:
    """The same command on both hosts, or on some."""

    project: Project
    launcher: str
    port: int
    restarts: int = 0

    def start(self, i: int, **extra: object) -> subprocess.Popen:
        where = ["ip", "netns", "exec", HOSTS[i], "unshare", "--uts", "sh", "-c"]
        where += [f'hostname {HOSTS[i]} && exec "$@"', "sh"]
        alone = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "RANK": i, "LOCAL_RANK": 0}
        alone |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": self.port}
        env = {"TOY_RANK": i, "GLOO_SOCKET_IFNAME": f"fwlink{i + 1}", "PYTHONUNBUFFERED": 1, **extra}
        if self.launcher == "srun":
            return self.project.start("--round", "1", wrapper=where, **alone, **env)
        config = yaml.safe_load((HERE.parent / "accelerate_configs" / "multi_node.yaml").read_text())
        config |= {"use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
        config |= {"machine_rank": i, "main_process_ip": ADDRESSES[0], "main_process_port": self.port}
        path = self.project.root / f"host_{i}.yaml"
        path.write_text(yaml.safe_dump(config))
        where += [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
        where += ["--rdzv_conf", "timeout=25", "--max_restarts", str(self.restarts), "--no_python"]
        return self.project.start("--round", "1", wrapper=where, **env)


def words(pid: int, file: str) -> list[str]:
    return Path(f"/proc/{pid}/{file}").read_text().split("\0")


def script(pid: int) -> bool:
    """Whether it is a rank: neither the launcher nor a process of the rank's own."""
    command = words(pid, "cmdline")
    return len(command) > 1 and command[1].endswith("toy_run.py")


def lines(text: str) -> list[str]:
    """What flywheel said; a launcher adds its own."""
    return [line for line in text.splitlines() if line.startswith("flywheel: ")]


def both(launch: Launch, wanted: dict[str, bytes], kill: int | None = None, **env: object) -> list[str]:
    """Run on both hosts to the end, one rank killed on its way (`kill`); returns the faults."""
    extra = [{"STORAGE_HOST": launch.project.root / f"known_{i}"} for i in range(2)]
    for one in extra:
        one["STORAGE_HOST"].mkdir(exist_ok=True)
    ranks = [launch.start(i, **env, **extra[i]) for i in range(2)]
    if kill is not None:
        wait_for(lambda: launch.project.logged("evaluate:0"), PATIENCE)
        [rank] = [pid for pid in members(HOSTS[kill]) if f"RANK={kill}" in words(pid, "environ") and script(pid)]
        os.kill(rank, signal.SIGKILL)
    try:
        said = [process.communicate(timeout=PATIENCE) for process in ranks]
    except subprocess.TimeoutExpired:
        return ["both hosts: did not end"]
    faults = [f"host {i}: {err.strip()[-300:]}" for i, (_, err) in enumerate(said) if ranks[i].returncode]
    return faults + (["other tables"] if launch.project.tables() != wanted else [])


def one_harm(launch: Launch, harm: str, victim: int) -> tuple[float, list[str], list[str]]:
    """(seconds from the harm until the other host ended, what it said, faults)."""
    other, faults = 1 - victim, []
    started = [None if harm == "never started" and i == victim else launch.start(i, TOY_SLEEP=2) for i in range(2)]
    if harm != "never started":
        end = time.monotonic() + PATIENCE
        while {rank for _, rank, _ in launch.project.logged("evaluate:0")} != {"0", "1"}:
            if time.monotonic() > end:
                return 0.0, [], ["the hosts did not begin"]
            time.sleep(0.05)
    begun = time.monotonic()
    match harm:
        case "killed":
            send(HOSTS[victim], signal.SIGKILL)
        case "frozen":
            send(HOSTS[victim], signal.SIGSTOP)
        case "cut off":
            link("down")
    try:
        _, err = started[other].communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        err, faults = "", ["it went on"]
        send(HOSTS[other], signal.SIGKILL)
    seconds = time.monotonic() - begun
    if (code := started[other].returncode) != 1:
        faults.append(f"exit code {code}")
    link("up")
    send(HOSTS[victim], signal.SIGCONT)
    if started[victim]:  # cut off or frozen, it must end by itself too
        try:
            started[victim].communicate(timeout=2 * LIMIT)
        except subprocess.TimeoutExpired:
            faults.append("the failed host went on for ever")
            send(HOSTS[victim], signal.SIGKILL)
    time.sleep(1)
    if left := [pid for host in HOSTS for pid in members(host)]:
        faults.append(f"{len(left)} processes were left")
        for host in HOSTS:
            send(host, signal.SIGKILL)
    return seconds, lines(err), faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--launcher", choices=("srun", "accelerate"), default="srun")
    parser.add_argument("--only", default="", help="only the cases whose name contains this")
    args = parser.parse_args()
    faults, port = [], 29600
    with tempfile.TemporaryDirectory(prefix="hosts-") as scratch:
        alone = Project(Path(scratch, "alone"))
        alone.start("--round", "1").communicate(timeout=PATIENCE)
        wanted = alone.tables()
        try:
            with network():
                cases = [(f"host {v} {harm}", harm, v) for harm in HARMS for v in (0, 1)]
                for name, harm, victim in cases:
                    if args.only not in name:
                        continue
                    port += 1
                    launch = Launch(Project(Path(scratch, name.replace(" ", "_"))), args.launcher, port)
                    seconds, said, found = one_harm(launch, harm, victim)
                    # accelerate starts no rank before all hosts are there, and gives up with words of its own
                    wanted_lines = 0 if (harm, args.launcher) == ("never started", "accelerate") else 1
                    found += ["not one line"] * (len(said) != wanted_lines) + ["too late"] * (seconds > LIMIT)
                    port += 1
                    found += both(Launch(launch.project, args.launcher, port), wanted)
                    print(f"{name:24s} {seconds:6.1f} s  {' | '.join(said)}", *found, sep="\n  FAULT ", flush=True)
                    faults += found
                for kind in STORAGE:
                    if args.only not in f"both on {kind}":
                        continue
                    port += 1
                    launch = Launch(Project(Path(scratch, kind)), args.launcher, port)
                    path = os.pathsep.join([str(Path(__file__).parent / "storage"), os.environ.get("PYTHONPATH", "")])
                    os.environ["PYTHONPATH"], before = path, os.environ.get("PYTHONPATH", "")
                    begun = time.monotonic()
                    found = both(launch, wanted, STORAGE=kind, STORAGE_ROOT=launch.project.runs, TOY_SLEEP=0.2)
                    os.environ["PYTHONPATH"] = before
                    chunks = Counter(what for what, _, _ in launch.project.logged("") if what.count(":") == 2)
                    by = Counter(rank for what, rank, _ in launch.project.logged("sample:1"))
                    found += ["a chunk was made twice"] * any(n > 1 for n in chunks.values())
                    found += ["one host drew all chunks"] * (len(by) != 2)
                    seconds = time.monotonic() - begun
                    print(f"{f'both on {kind}':24s} {seconds:6.1f} s  chunks of sample by host: {dict(by)}", *found,
                          sep="\n  FAULT ", flush=True)  # fmt: skip
                    faults += found
                for v in (0, 1) if args.launcher == "accelerate" else ():
                    if args.only not in f"rank {v} restarted":
                        continue
                    port += 1
                    begun = time.monotonic()
                    launch = Launch(Project(Path(scratch, f"again_{v}")), args.launcher, port, restarts=3)
                    found = both(launch, wanted, kill=v, TOY_SLEEP=1)
                    print(f"rank {v} restarted         {time.monotonic() - begun:6.1f} s", *found, sep="\n  FAULT ")
                    faults += found
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            print(f"skipped: this user may not make network namespaces ({error})")
            return 0
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
