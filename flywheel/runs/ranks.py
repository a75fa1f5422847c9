"""The ranks of one launch, coordinated without torch by files in the run directory.

Rank 0 decides what to do and writes orders, numbered files in `.launch/ID/`, which the others
carry out. The ID is unique to the launch, so files of an older launch are never read.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flywheel.errors import UserError
from flywheel.runs.files import read_json, write_json

PATIENCE = 180.0  # seconds for all ranks to start
TRY_OUT = 1800.0  # seconds for rank 0 to try the model out, before it meets the others
POLL = 0.1


class InUse(UserError):
    """Another process is working on the run."""


class LaunchFailed(UserError):
    """Another rank failed or is gone."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that `accelerate launch` started; a single rank if RANK is not set."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    distributed: bool = False  # RANK is set: training initialises torch.distributed, even for one rank

    @classmethod
    def from_env(cls) -> Ranks:
        env = os.environ
        world = int(env.get("WORLD_SIZE", 1))
        rank = int(env.get("RANK", 0))
        return cls(
            rank, world, int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", world)), "RANK" in env
        )


class RunLock:
    """Rank 0's file lock on a run. The kernel releases it when the process dies, so it is never stale.

    The other ranks take locks of another `name` in the launch's folder, to show that they are alive.
    """

    def __init__(self, run: Path, name: str = ".lock"):
        self.path = run / name

    def take(self) -> None:
        """Take the lock. Raises InUse, naming the holder."""
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(self.fd, 1000).decode(errors="replace").strip() or "unknown"
            os.close(self.fd)
            raise InUse(
                f"{self.path.parent} is in use by {holder}; wait for it, or start another run with --name"
            ) from None
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def held(self) -> bool:
        """Whether another process holds the lock."""
        with open(self.path, "rb+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return True
        return False


class Launch:
    """One launch of `ranks.world` processes on one run. Rank 0 must hold the run's lock already.

    Raises LaunchFailed if not all ranks join within PATIENCE seconds.
    """

    def __init__(self, run: Path, ranks: Ranks):
        self.ranks, self.lock, self.base, self.count = ranks, RunLock(run), run / ".launch", 0
        self.dir: Path | None = None  # None for a single rank
        if ranks.world > 1:
            self.base.mkdir(parents=True, exist_ok=True)
            self.dir = self._host() if ranks.rank == 0 else self._join()

    def _host(self) -> Path:
        """Handshake: publish every rank's token until each rank has confirmed its own. Returns the launch's folder."""
        for old in self.base.glob("*"):
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
        directory, others = self.base / uuid.uuid4().hex, range(1, self.ranks.world)
        directory.mkdir()
        published: dict[str, str] = {}
        for _ in _until(PATIENCE):
            tokens = {str(r): token for r in others if (token := read_json(self.base / f"hello_{r}.json"))}
            if tokens != published:
                published = tokens
                write_json(self.base / "welcome.json", {"launch": directory.name, "ranks": published})
            confirmed = [r for r in others if read_json(directory / f"here_{r}.json") == published.get(str(r), "")]
            if len(confirmed) == len(others):
                return directory
        missing = [r for r in others if str(r) not in published]
        raise LaunchFailed(
            f"ranks {missing or list(others)} of {self.ranks.world} did not come within {PATIENCE:.0f} s:"
            f" is {self.base.parent} shared by all hosts?"
        )

    def _join(self) -> Path:
        """The other side: write this rank's token, and confirm it once rank 0 has published it. Returns the folder."""
        token, hello = uuid.uuid4().hex, self.base / f"hello_{self.ranks.rank}.json"
        for _ in _until(PATIENCE + TRY_OUT):
            if not hello.is_file():  # rank 0 clears the folder when it starts
                with suppress(FileNotFoundError):
                    write_json(hello, token)
            welcome = read_json(self.base / "welcome.json") or {}
            if welcome.get("ranks", {}).get(str(self.ranks.rank)) == token:
                directory = self.base / welcome["launch"]
                RunLock(directory, f"alive_{self.ranks.rank}").take()
                write_json(directory / f"here_{self.ranks.rank}.json", token)
                return directory
        raise LaunchFailed(f"rank 0 did not answer within {PATIENCE + TRY_OUT:.0f} s")

    # ---- rank 0 ----

    def order(self, **what: Any) -> None:
        """Write the next order for all other ranks."""
        self.count += 1
        if self.dir:
            write_json(self.dir / f"order_{self.count}.json", what)

    def wait_for_all(self) -> None:
        """Wait until every other rank has carried out the last order. Raises LaunchFailed."""
        others = [self.dir / f"done_{self.count}_{r}" for r in range(1, self.ranks.world)] if self.dir else []
        while not all(path.is_file() for path in others):
            self.watch()
            time.sleep(POLL)

    # ---- the others ----

    def next(self) -> dict[str, Any]:
        self.count += 1
        path = self.dir / f"order_{self.count}.json"
        while (found := read_json(path)) is None:
            try:
                self.watch()
            except LaunchFailed:
                if (found := read_json(path)) is None:  # else rank 0 wrote its last order and ended
                    raise
                return found
            time.sleep(POLL)
        return found

    def done(self) -> None:
        (self.dir / f"done_{self.count}_{self.ranks.rank}").touch()

    # ---- all ----

    def fail(self, line: str) -> None:
        """Tell the other ranks that this one failed, so that all stop."""
        if self.dir:
            with suppress(OSError):  # if the disk failed, the others notice by this rank's lock or by the launcher
                write_json(self.dir / f"failed_{self.ranks.rank}.json", line)

    def watch(self) -> None:
        """Raises LaunchFailed if another rank failed or is gone; not every launcher ends the other ranks then."""
        for r in range(self.ranks.world) if self.dir else ():
            if r != self.ranks.rank and (line := read_json(self.dir / f"failed_{r}.json")):
                raise LaunchFailed(f"rank {r}: {line}" if self.ranks.rank == 0 else line)
        if self.ranks.rank:
            if not self.lock.held():
                raise LaunchFailed("rank 0 is gone")
            return
        for r in range(1, self.ranks.world) if self.dir else ():
            # check the lock before the file: a rank writes `done` before it ends
            if not RunLock(self.dir, f"alive_{r}").held() and not (self.dir / f"done_{self.count}_{r}").is_file():
                raise LaunchFailed(f"rank {r} is gone; the same command continues")


def _until(seconds: float):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(POLL)


def free_port() -> int:
    """A free TCP port on this host."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
