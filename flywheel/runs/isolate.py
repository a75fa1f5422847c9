"""Fresh processes for the stages of a rank, forked from a server that has already imported torch.

The rank itself holds no device. All memory of a stage belongs to the child and
is freed when it ends. If the rank dies, the child and its own children are killed within moments.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any

from flywheel.errors import StartAgain, UserError, explain
from flywheel.runs.cgroup import cpu_quota

PRELOAD = ("torch", "transformers", "trl.trainer.sft_trainer", "peft", "datasets")
# Imports take 4.5 of the 6 s of an engine's start. Only without a GPU: some of them may open it before the fork.
CPU_PRELOAD = (
    "flywheel.models.vllm",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
)
OWN = ("flywheel.runs.fork_server", "flywheel.runs.isolate", "flywheel.runs.worker", "pyarrow.parquet")
THREADS = "FLYWHEEL_THREADS"  # set in a stage's process: its share of the rank's CPU threads
GRACE = 2.0  # seconds between SIGTERM and SIGKILL
CLOSING = 30.0  # seconds in which a process that has no more calls ends by itself

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # trl's ping honours it too
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",  # appears when a child was killed
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # checking for a GPU must not open it before a fork
}


class StageFailed(UserError):
    """The child ended without a result; the message is one line that says why."""


def resolve(name: str) -> Any:
    """`module:attribute` -> the object."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


# ---- in the rank -------------------------------------------------------------------------


def threads_for(ranks_here: int, wanted: int = 0) -> int:
    """CPU threads of a rank, or of a stage's process if this is one; at least 1.

    The least of `wanted` (`engine.threads`; 0: OMP_NUM_THREADS if the user set it) and the rank's share of the cores
    that affinity and the cgroup's CPU quota leave to the `ranks_here` ranks of this host.
    """
    if given := os.environ.get(THREADS):
        return int(given)
    free = min(len(os.sched_getaffinity(0)), cpu_quota())
    return max(1, min(int(free) // ranks_here, wanted or omp_threads() or sys.maxsize))


def launched() -> bool:
    """Whether accelerate or torchrun started this process."""
    return any(key.startswith(("ACCELERATE_", "TORCHELASTIC_")) for key in os.environ)


def omp_threads() -> int:
    """OMP_NUM_THREADS as the user set it, else 0.

    accelerate and torchrun export 1 if it is not set, so under them the launcher's own environment is what counts.
    """
    found = os.environ.get("OMP_NUM_THREADS", "")
    if launched():
        with suppress(OSError):  # the launcher is gone, or belongs to somebody else
            launcher = Path(f"/proc/{os.getppid()}/environ").read_bytes().decode(errors="replace").split("\0")
            found = next((item.partition("=")[2] for item in launcher if item.startswith("OMP_NUM_THREADS=")), "")
    return int(found) if found.isdigit() else 0  # OpenMP allows a list, one number for each level of nesting


def start_server(threads: int, preload: tuple[str, ...] = PRELOAD) -> None:
    """Start the fork server, which imports `preload` in the background.

    Sets OMP_NUM_THREADS to the rank's `threads` first: the server inherits the environment, and OpenMP reads it when
    torch is imported.
    """
    os.environ.update(QUIET, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    engines = CPU_PRELOAD if preload and not Path("/dev/nvidiactl").exists() else ()
    multiprocessing.get_context("forkserver").set_forkserver_preload([*OWN, *preload, *engines])
    ensure_server()


def ensure_server() -> None:
    """Start the fork server, if it is not there or has died."""
    from multiprocessing import forkserver

    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the server: only the rank handles Ctrl-C
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)


def call(target: str, arguments: Mapping[str, Any], *, what: str, threads: int, **options: Any) -> Any:
    """Call `module:function` in a fresh process and return its (picklable) result; the process has ended then.

    options: `environment` of `Child`, and those of `Child.call`, which names the errors too.
    """
    child = Child(what, threads, options.pop("environment", {}))
    try:
        result = child.call(target, arguments, what=what, **options)
        child.close(options.get("watch", lambda: None))
        return result
    finally:
        child.end()


class Child:
    """A fresh process that carries out one call after another, until it is closed or one of them fails.

    environment: variables to set, or to unset (None). Raises StageFailed if there is no server to fork it.
    """

    def __init__(self, what: str, threads: int, environment: Mapping[str, str | None] = {}):
        self.channel, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("forkserver").Process(
            target=_child, args=(theirs, dict(environment), threads)
        )
        try:
            self.process.start()
            theirs.close()
        except (EOFError, ConnectionError) as error:
            raise StageFailed(
                f"{what}: the process that loads {', '.join(PRELOAD)} died ({error!r}); its message is above"
            ) from None
        except BaseException:  # a signal
            if self.process.pid:
                self.end()
            raise

    def call(
        self,
        target: str,
        arguments: Mapping[str, Any],
        *,
        what: str,
        log: Path | None = None,
        tell: Callable[[int, int, dict], None] = lambda done, total, figures: None,
        watch: Callable[[], None] = lambda: None,
        answers: Mapping[str, Callable[[], Any]] = {},
    ) -> Any:
        """Call `module:function` in the process and return its (picklable) result.

        log: file for the process's output. tell: called with its progress, if the function has a parameter `tell`.
        watch: called several times a second; what it raises ends the call. answers: what a function with a parameter
        `ask` may ask for by name. Raises StageFailed, and StartAgain if the function does. After any error the
        process must be ended.
        """
        with suppress(BrokenPipeError):  # it died meanwhile, which the first turn sees
            self.channel.send((target, dict(arguments), log))
        outcome: tuple[str, Any] | None = None
        heard = [self.channel, self.process.sentinel]
        while outcome is None:
            died = self.process.sentinel in connection.wait(heard, timeout=0.2)
            try:
                while outcome is None and (message := self._message()):
                    kind, *content = message
                    match kind:
                        case "progress":
                            tell(*content)
                        case "ask":
                            with suppress(BrokenPipeError):
                                self.channel.send(answers[content[0]]())
                        case _:
                            outcome = (kind, content[0])
            except EOFError:
                heard = [self.process.sentinel]  # a closed channel would end every wait at once
            watch()
            if died:
                break
        if outcome is None:
            self.process.join()
        return _result(outcome, self.process.exitcode, what, log)

    def _message(self) -> tuple | None:
        """The process's next message, or None if there is none yet. Raises EOFError if none will come."""
        try:
            return self.channel.recv() if self.channel.poll() else None
        except OSError as error:  # it was killed in the middle of one
            raise EOFError from error

    def close(self, watch: Callable[[], None] = lambda: None) -> None:
        """Let the process end by itself; after CLOSING seconds it is ended. `watch` as for `call`."""
        self.channel.close()
        end = time.monotonic() + CLOSING
        while time.monotonic() < end and not connection.wait([self.process.sentinel], timeout=0.2):
            watch()
        self.end()

    def end(self) -> None:
        """End the process and its group, by SIGTERM and after GRACE seconds by SIGKILL.

        A signal to this process may come in the middle, but once (`loop.signals`).
        """
        try:
            self._end()
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        for sent in (signal.SIGTERM, signal.SIGKILL):
            if self.process.is_alive():
                try:
                    os.killpg(self.process.pid, sent)
                except ProcessLookupError:  # it has not made its own group yet
                    with suppress(ProcessLookupError):
                        os.kill(self.process.pid, sent)
                self.process.join(GRACE)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # children that it left behind
        self.channel.close()


def end_all(children: dict[int, Child]) -> None:
    """End all of `children`, and forget each when it has ended: a signal may come in the middle."""
    for number in list(children):
        children[number].end()
        del children[number]


def _result(outcome: tuple[str, Any] | None, exitcode: int | None, what: str, log: Path | None) -> Any:
    match outcome:
        case ("done", value):
            return value
        case ("failed", line):
            raise StageFailed(f"{what}: {line}")
        case ("again", line):
            raise StartAgain(f"{what}: {line}")
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (out of memory, most often)" if name == "SIGKILL" else ""
        how = f"was killed by {name}{hint}"
    else:
        how = f"ended by itself with exit code {exitcode}"
    raise StageFailed(
        f"{what}: its process {how}{f', see {log}' if log else ''};"
        " what is finished is kept: the same command continues"
    )


# ---- in the child ------------------------------------------------------------------------


def _child(channel, environment: dict, threads: int) -> None:
    gc.freeze()  # objects from before the fork are never garbage, and each collection that scans them takes a second
    os.setsid()  # a new process group: Ctrl-C reaches only the rank, which then kills the whole group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_rank, daemon=True).start()
    for key, value in environment.items():
        os.environ.pop(key, None) if value is None else os.environ.update({key: value})
    os.environ[THREADS] = str(threads)
    lock = threading.Lock()
    try:
        while True:
            _perform(channel, lock, threads, *channel.recv())
    except EOFError:  # the rank has no more calls
        return
    except BaseException:  # the outcome cannot be sent
        with suppress(OSError):
            traceback.print_exc()
        os._exit(1)


def _perform(channel, lock: threading.Lock, threads: int, target: str, arguments: dict, log: Path | None) -> None:
    """Carry out one call and send its outcome. After a failure the process ends."""
    try:
        if log:
            _write_to(log)
        if "torch" in sys.modules:  # imported by the server, with the server's thread count
            sys.modules["torch"].set_num_threads(threads)
        function = resolve(target)
        for name, made in (("tell", _teller), ("ask", _asker)):
            if name in inspect.signature(function).parameters and name not in arguments:
                arguments[name] = made(channel, lock)
        message = ("done", function(**arguments))
    except BaseException as error:
        message = ("again" if isinstance(error, StartAgain) else "failed", _told(error, log))
    with suppress(OSError):  # of a full disk; the message says more
        sys.stdout.flush()
        sys.stderr.flush()
    channel.send(message)
    if message[0] != "done":
        os._exit(1)  # skip clean-up, which may hang after a failure; the rank kills the rest of the group


def _told(error: BaseException, log: Path | None) -> str:
    if (line := explain(error)) is not None:
        return line
    with suppress(OSError):  # of a full disk
        traceback.print_exception(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}{f' (traceback in {log})' if log else ''}"


def _end_with_rank() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _write_to(log: Path) -> None:
    """Redirect stdout and stderr to `log`, including those of native code and grandchildren."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    print(time.strftime("---- %Y-%m-%d %H:%M:%S"), flush=True)


def _asker(channel, lock: threading.Lock) -> Callable[[str], Any]:
    """A function that asks the rank, which answers within a millisecond unless its launch is over."""

    def ask(name: str) -> Any:
        with lock:
            channel.send(("ask", name))
            return channel.recv()

    return ask


def _teller(channel, lock: threading.Lock) -> Callable[[int, int, dict], None]:
    """A function that sends progress to the rank at most five times a second, and always when done >= total."""
    last = [0.0]

    def tell(done: int, total: int, figures: dict) -> None:
        with lock:
            if done >= total or time.monotonic() - last[0] > 0.2:
                last[0] = time.monotonic()
                channel.send(("progress", done, total, figures))

    return tell
