"""The ranks of one launch, which meet in the TCPStore of torch's own rendezvous.

Rank 0 gives numbered orders, which the others carry out; all draw chunks from one counter. Every rank counts a
heartbeat up, and one whose count stays the same for SILENCE seconds, by the clock of the rank that looks, is gone.
A rank or process that fails ends the whole launch, so no chunk is drawn twice in one: the next launch draws it again.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from flywheel.errors import StartAgain, UserError

SILENCE = 45.0  # seconds without a sign of life after which a rank or the store is gone; seen within a minute
BEAT = 1.0
POLL = 0.1
LAST_WORDS = 5.0  # seconds that a rank waits for the others to hear why it ends
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class InUse(UserError):
    """Another process is working on the run."""


class LaunchFailed(UserError):
    """Another rank failed or is gone, or the store is."""


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
        """Raises UserError if a launcher of several ranks does not say which of them are on this host."""
        env, alone = os.environ, {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        if int(env.get("WORLD_SIZE", 1)) > 1 and (absent := [name for name in alone if name not in env]):
            raise UserError(f"WORLD_SIZE is {env['WORLD_SIZE']}, so the launcher must set {', '.join(absent)} too")
        return cls(*(int(env.get(name, one)) for name, one in alone.items()), "RANK" in env)


def lock(run: Path) -> int:
    """Lock a run for this process; returns the open file. The kernel unlocks it when the process dies.

    Raises InUse, naming the holder. Where the file system has no locks it says so and goes on.
    """
    path = run / ".lock"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.read(file, 1000).decode(errors="replace").strip() or "unknown"
        os.close(file)
        raise InUse(f"{run} is in use by {holder}; wait for it, or start another run with --name") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(
            f"flywheel: {run}: its file system has no locks ({error.strerror}), so nothing keeps a second launch away:"
            " start no other on this run",
            file=sys.stderr,
            flush=True,
        )
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return file


class Launch:
    """One launch of `ranks.world` processes. A single rank needs no store.

    Raises LaunchFailed if the store cannot be reached. Its methods raise it too, within SILENCE seconds.
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.count, self.have, self.numbers = ranks, 0, [], itertools.count()
        self.failure = ""  # why this launch is over
        self.told = False  # rank 0 has printed why
        self.anew = (0, "")  # the order whose stage has to start again, and why
        self.restarted = 0  # the last order of which this rank has heard that
        self.lost = False  # rank 0 or the store is gone: nobody hears what this rank would say
        self.over = threading.Event()
        if ranks.world > 1:
            self.restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
            self.base, self.store = self._ask(connector(ranks, self.restart))
            self.thread = threading.Thread(target=self._beat, daemon=True)
            self.thread.start()

    def _ask(self, call: Callable[..., Any], *args: Any) -> Any:
        """What a call of the store returns.

        In a thread of its own: most calls have no time limit, never return from a frozen host, and let no signal
        through.
        """
        answer: Future = Future()

        def ask() -> None:
            try:
                answer.set_result(call(*args))
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()
        try:
            return answer.result(SILENCE)
        except (TimeoutError, RuntimeError) as error:  # torch's DistError is a RuntimeError
            self.lost = True
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            why = (str(error).splitlines() or [f"silent for {SILENCE:.0f} s"])[0]
            raise LaunchFailed(
                f"rank 0 is gone or cannot be reached: the launch's store at {where} does not answer ({why});"
                " the same command continues"
            ) from None

    def _count(self, key: str, more: int = 0) -> int:
        """A counter after adding `more`; 0 if it is new."""
        return self._ask(self.store.add, key, more)

    def _read(self, key: str) -> Any:
        """The value of a key, or None."""
        return json.loads(self._ask(self.store.get, key)) if self._ask(self.store.check, [key]) else None

    # ---- heartbeats ----

    def _beat(self) -> None:
        watched = range(1, self.ranks.world) if self.ranks.rank == 0 else [0]
        seen = {r: (0, time.monotonic()) for r in watched}  # rank -> its count, and since when
        try:
            self._look(seen)  # at once, or a rank that dies early is said not to have come
            while not self.over.wait(BEAT):
                self._look(seen)
        except LaunchFailed as error:
            self.failure = str(error)
        except Exception as error:  # such as no room for one more thread
            self.failure = f"rank {self.ranks.rank} cannot give a sign of life: {error!r}"

    def _look(self, seen: dict[int, tuple[int, float]]) -> None:
        """Give a sign of life, and look for those of others. Raises LaunchFailed."""
        self._count(f"beat_{self.ranks.rank}", 1)
        if line := self._read("over" if self.ranks.rank else "failed"):
            self.told = self.ranks.rank > 0
            raise LaunchFailed(line)
        if line := self._read(f"again_{(at := self.count)}"):
            self.anew = (at, line)
        if self._ask(self.base.check, [f"start_{self.restart + 1}"]):
            raise LaunchFailed("the launcher started the ranks of another host again")
        for r in seen:
            count, now = self._count(f"beat_{r}"), time.monotonic()
            if count != seen[r][0]:
                seen[r] = count, now
            elif now - seen[r][1] > SILENCE:
                self.lost = r == 0
                how = "is gone: no sign of life" if count else "did not come"
                raise LaunchFailed(f"rank {r} {how} within {SILENCE:.0f} s; the same command continues")

    def watch(self) -> None:
        """Raises LaunchFailed if this launch is over; not every launcher ends the other ranks then.

        Raises StartAgain if a rank said so of the current order's stage, until this rank has said it too.
        """
        if self.failure:
            raise LaunchFailed(self.failure)
        at, line = self.anew
        if at == self.count > self.restarted:
            raise StartAgain(line)

    def start_again(self, line: str) -> None:
        """Tell all ranks that the current order's stage has to start again: they end their part of it."""
        self.restarted = self.count
        if self.ranks.world > 1:
            self._ask(self.store.compare_set, f"again_{self.count}", "", json.dumps(line))

    def listen(self, watch: Callable[[], None]) -> None:
        """Call `watch` until another rank can be heard: if it ran out of memory, that broke this one's collective."""
        end = time.monotonic() + 3 * BEAT
        while self.ranks.world > 1 and time.monotonic() < end:
            watch()
            time.sleep(POLL)

    def stop(self) -> None:
        """End the heartbeats: a thread that comes back from the store while Python ends would abort the process."""
        self.over.set()
        if self.ranks.world > 1:
            self.thread.join(BEAT)

    # ---- rank 0 ----

    def order(self, **what: Any) -> None:
        """Give the next order to all other ranks. `have`: the stage's shards that exist, which nobody shall draw."""
        self.count, self.numbers, self.have = self.count + 1, itertools.count(), what.get("have", [])
        if self.ranks.world > 1:
            self._ask(self.store.set, f"order_{self.count}", json.dumps(what))

    def all_done(self) -> bool:
        """Whether every other rank has carried out the last order."""
        return self.ranks.world == 1 or self._count(f"done_{self.count}") == self.ranks.world - 1

    def wait_for_all(self) -> None:
        while not self.all_done():
            self.watch()
            time.sleep(POLL)

    # ---- the others ----

    def next(self) -> dict[str, Any]:
        """The next order, once rank 0 has given it."""
        self.count += 1
        while (found := self._read(f"order_{self.count}")) is None:
            self.watch()
            time.sleep(POLL)
        self.have = found.get("have", [])
        return found

    def done(self) -> None:
        self._count(f"done_{self.count}", 1)

    # ---- all ----

    def draw(self) -> int:
        """The number of the next chunk that rank 0 did not find finished; it goes on after the stage's last chunk."""
        alone = self.ranks.world == 1
        index = next(self.numbers) if alone else self._count(f"drawn_{self.count}", 1) - 1
        for finished in self.have:
            index += finished <= index
        return index

    def fail(self, line: str) -> None:
        """Tell the other ranks that this one failed, so that all stop. Rank 0 must have printed the line before.

        It stays until the others can have heard it, for its end may be the store's. They wait until they are `told`.
        """
        first = self.ranks.rank == 0
        end = time.monotonic() + (2 * BEAT if first else LAST_WORDS)
        try:
            with suppress(LaunchFailed):  # nobody hears it then
                if self.ranks.world > 1 and not self.lost and not self.told:
                    key, said = ("over", line) if first else ("failed", f"rank {self.ranks.rank}: {line}")
                    self._ask(self.store.compare_set, key, "", json.dumps(said))
                    while not self.told and time.monotonic() < end:
                        time.sleep(POLL)
        finally:
            self.stop()


def connector(ranks: Ranks, restart: int) -> Callable[[], tuple[Any, Any]]:
    """A function that connects to the launch's TCPStore; it returns one with the keys of the whole launch, and one with
    those since the launcher started the ranks for the `restart`-th time again, so that no older key is believed.

    The launcher's agent hosts it if torch elastic says so, else rank 0 does, at MASTER_ADDR:MASTER_PORT.
    """
    env = os.environ
    if not {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        raise UserError("WORLD_SIZE is set, but not MASTER_ADDR and MASTER_PORT: use accelerate launch")
    env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is one line of ours, not many of C++
    from torch.distributed import PrefixStore, TCPStore

    hosts = ranks.rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    how = {"is_master": hosts, "wait_for_workers": False, "timeout": timedelta(seconds=SILENCE)}

    def connect() -> tuple[Any, Any]:
        store = TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), **how)
        base = PrefixStore(f"flywheel/{env.get('TORCHELASTIC_RUN_ID', '')}", store)
        base.set(f"start_{restart}", "")
        return base, PrefixStore(f"{restart}", base)

    return connect


def free_port() -> int:
    """A free TCP port on this host."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
