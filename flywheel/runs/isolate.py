"""One fresh process for each stage and rank, forked from a server that has torch loaded.

The rank imports no torch and holds no device. The child owns all memory of its stage and
dies with it; it dies too, within moments, when the rank dies, and takes its own children along.
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

from flywheel.errors import UserError, explain

PRELOAD = ("torch", "transformers", "trl.trainer.sft_trainer", "peft", "datasets")
# Most of an engine's start is imports: 4.5 of 6 s. Only without a GPU: some of these may open it before the fork.
CPU_PRELOAD = (
    "flywheel.models.vllm",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
)
OWN = ("flywheel.runs.isolate", "flywheel.runs.worker", "pyarrow.parquet")
GRACE = 2.0  # seconds between SIGTERM and SIGKILL

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # trl's ping honours it too
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",  # after a child was ended: of no use
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether there is a GPU must not open it before a fork
}


class StageFailed(UserError):
    """The child ended without a result; one line says why."""


def resolve(name: str) -> Any:
    """`module:attribute` -> the object."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


# ---- in the rank -------------------------------------------------------------------------


def threads_for(ranks_here: int) -> int:
    """Each rank's share of the cores that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_here)


def start_server(ranks_here: int, preload: tuple[str, ...] = PRELOAD) -> None:
    """Start the fork server, which loads `preload` while the rank goes on.

    The server's environment is this one as it is now: OpenMP reads its thread count when
    torch is loaded (and accelerate exports OMP_NUM_THREADS=1 unless told otherwise).
    """
    from multiprocessing import forkserver

    threads = str(threads_for(ranks_here))
    os.environ.update(QUIET, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
    engines = CPU_PRELOAD if preload and not Path("/dev/nvidiactl").exists() else ()
    multiprocessing.get_context("forkserver").set_forkserver_preload([*OWN, *preload, *engines])
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is the rank's business
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)


def call(
    target: str,
    arguments: Mapping[str, Any],
    *,
    what: str,
    threads: int,
    environment: Mapping[str, str | None] = {},
    log: Path | None = None,
    tell: Callable[[int, int, dict], None] = lambda done, total, figures: None,
    watch: Callable[[], None] = lambda: None,
) -> Any:
    """`module:function` called in a fresh process; returns what it returns (picklable).

    environment: changes, None unsets. log: takes the child's output. tell: gets its progress,
    where the function has a parameter `tell`. watch: called several times a second; what it
    raises ends the child. Raises StageFailed with one line; however this ends, so has the child.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("forkserver").Process(
        target=_child, args=(theirs, target, dict(arguments), dict(environment), threads, log)
    )
    try:
        child.start()
    except (EOFError, ConnectionError) as error:
        raise StageFailed(
            f"{what}: the process that loads {', '.join(PRELOAD)} died ({error!r}); its message is above"
        ) from None
    theirs.close()
    outcome: tuple[str, Any] | None = None
    try:
        alive = True
        while alive:
            ready = connection.wait([ours, child.sentinel] if not ours.closed else [child.sentinel], timeout=0.2)
            alive = child.sentinel not in ready
            while not ours.closed and ours.poll():
                try:
                    kind, *content = ours.recv()
                except EOFError:
                    ours.close()
                    break
                if kind == "progress":
                    tell(*content)
                else:
                    outcome = (kind, content[0])
            watch()
    finally:
        end(child)
        ours.close()
    return _result(outcome, child.exitcode, what, log)


def _result(outcome: tuple[str, Any] | None, exitcode: int | None, what: str, log: Path | None) -> Any:
    match outcome:
        case ("done", value):
            return value
        case ("failed", line):
            raise StageFailed(f"{what}: {line}")
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


def end(child) -> None:
    """End the child and whatever it started; returns within seconds."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        if child.is_alive():
            try:
                os.killpg(child.pid, sent)
            except ProcessLookupError:  # it has not made its own group yet
                with suppress(ProcessLookupError):
                    os.kill(child.pid, sent)
            child.join(GRACE)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)  # its own children, where it left some


# ---- in the child ------------------------------------------------------------------------


def _child(channel, target: str, arguments: dict, environment: dict, threads: int, log: Path | None) -> None:
    gc.freeze()  # what was loaded before the fork is never garbage: collections that scan it cost a second each
    os.setsid()  # its own group: the terminal's Ctrl-C goes to the rank alone, which then ends the whole group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_rank, daemon=True).start()
    for key, value in environment.items():
        os.environ.pop(key, None) if value is None else os.environ.update({key: value})
    try:
        if log:
            _write_to(log)
        if "torch" in sys.modules:  # loaded by the server, with the server's count
            sys.modules["torch"].set_num_threads(threads)
        function = resolve(target)
        if "tell" in inspect.signature(function).parameters:
            arguments["tell"] = _teller(channel)
        message = ("done", function(**arguments))
    except BaseException as error:
        message = ("failed", _told(error, log))
    sys.stdout.flush()
    sys.stderr.flush()
    channel.send(message)
    if message[0] == "failed":
        os._exit(1)  # no clean-up may hang after a failure; the rank ends what is left of the group


def _told(error: BaseException, log: Path | None) -> str:
    if (line := explain(error)) is not None:
        return line
    traceback.print_exception(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}{f' (traceback in {log})' if log else ''}"


def _end_with_rank() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _write_to(log: Path) -> None:
    """All output from here on goes to `log`, that of native code and grandchildren too."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    print(time.strftime("---- %Y-%m-%d %H:%M:%S"), flush=True)


def _teller(channel) -> Callable[[int, int, dict], None]:
    """Sends progress, at most five times a second (and always the end)."""
    last, lock = [0.0], threading.Lock()

    def tell(done: int, total: int, figures: dict) -> None:
        with lock:
            if done >= total or time.monotonic() - last[0] > 0.2:
                last[0] = time.monotonic()
                channel.send(("progress", done, total, figures))

    return tell
