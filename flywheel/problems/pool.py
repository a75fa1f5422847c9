"""Killable processes that call a checker: a hang or a crash costs one answer, not the stage.

Each worker is two processes. The outer one (`check_worker.py`) is a fresh interpreter that imports the
checker and forks the inner one, which calls it. Replacing a killed fork takes milliseconds, while a new
import takes a second, and a model whose answers make sympy hang writes many of them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from flywheel.errors import UserError

SLACK = 5.0  # seconds beyond the time limit for a worker to report that the limit was exceeded
START_SECONDS = 120.0  # for a worker to import the checker on a cold, busy machine

Checked = tuple[bool | None, str]  # (verdict, "") or (None, why there is no verdict)


class Lost(Exception):
    """No reply: the other process hangs or ended."""


def ask(pipe: Connection, question: Any, seconds: float) -> Any:
    """The reply to `question`. Raises Lost if there is none within `seconds`."""
    try:
        pipe.send(question)
        if pipe.poll(seconds):
            return pipe.recv()
    except (EOFError, OSError):
        raise Lost("its process died") from None
    raise Lost(f"no reply within {seconds:g} s")


class CheckerPool:
    """Calls `checker` (module:function) in `workers` processes, with a limit of `seconds` per answer.

    A worker starts at its first answer. Raises UserError if it cannot import the checker.
    """

    def __init__(self, checker: str, seconds: float, workers: int):
        self.workers = [_Worker(checker, seconds) for _ in range(workers)]
        self._threads = ThreadPoolExecutor(workers, "check")  # one per worker, waiting for its reply
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self.workers:
            self._idle.put(worker)

    def check(self, pairs: Iterable[tuple[str, str]]) -> Iterator[Checked]:
        """One result per (gold, answer) pair, in order."""
        return self._threads.map(self._check, pairs)

    async def checked(self, pair: tuple[str, str]) -> Checked:
        """As `check` of one pair, for a coroutine, which waits."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._check, pair)

    def _check(self, pair: tuple[str, str]) -> Checked:
        worker = self._idle.get()
        try:
            return worker.check(pair)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in self.workers:
            worker.kill()


class _Worker:
    """One process of check_worker.py with its fork. It enforces the time limit, and is killed if it fails to.

    A plain subprocess rather than multiprocessing: it inherits no device from a process that has loaded
    vLLM, does not import the main module again, and can be started by a daemonic process.
    """

    def __init__(self, checker: str, seconds: float):
        self.checker, self.seconds = checker, seconds
        self.process: subprocess.Popen | None = None

    def check(self, pair: tuple[str, str]) -> Checked:
        if self.process is None:
            self._start()
        try:
            return ask(self.pipe, pair, self.seconds + SLACK)
        except Lost as lost:
            self.kill()
            return None, f"the worker: {lost}"

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self.pipe = Connection(ours.detach())
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flywheel.problems.check_worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # a checker's output must not mix with the stage's stdout
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # only the parent handles Ctrl-C
            )
        try:
            fault = ask(self.pipe, (self.checker, self.seconds), START_SECONDS)
        except Lost as lost:
            fault = f"problems.checker: a worker for {self.checker} did not start: {lost}"
        if fault:
            self.kill()
            raise UserError(fault)

    def kill(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # the process and its fork
            self.process.wait()
            self.process = None
            self.pipe.close()
