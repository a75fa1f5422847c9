"""Open the engines of a stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.util import Finalize
from pathlib import Path

from flywheel.ledger import Ledger
from flywheel.models.driver import Backend
from flywheel.problems.grading import load_function
from flywheel.recipe import EngineSpec
from flywheel.records import ModelRef

# at most one: the engines that this process's last stage left open, and what closes them if the process ends
_left: list[tuple[dict[str, ModelRef], Backend, Finalize]] = []


@contextmanager
def engines(
    spec: EngineSpec, models: Mapping[str, ModelRef], ledger: Ledger, seed: int, scratch: Path, leave_open: bool = False
) -> Iterator[Backend]:
    """`open_backend`, or the engines that this process's last stage left open, if `models` are among theirs.

    They are closed in the end; with `leave_open`, only after an error.
    """
    there, backend, closing = _left.pop() if _left else ({}, None, None)
    if closing and models.items() <= there.items():
        closing.cancel()
        backend.take_over(ledger, seed)
    else:
        if closing:
            closing()
        there, backend = dict(models), open_backend(spec, models, ledger, seed, scratch)
    done = False
    try:
        yield backend
        done = True
    finally:
        if done and leave_open:
            _left.append((there, backend, Finalize(None, backend.close, exitpriority=1)))
        else:
            backend.close()


def open_backend(spec: EngineSpec, models: Mapping[str, ModelRef], ledger: Ledger, seed: int, scratch: Path) -> Backend:
    """Open an engine for each role (or other key) of `models`; the ledger is charged by role.

    With merged adapters (`engine.adapters`), keys with equal base, adapter and labels share an engine;
    with runtime adapters, and on servers, all keys of a base do. `scratch`: a directory for merged weights, needed
    only while the engines start. The caller closes the backend. Raises NotAModel for a path without a
    model, ValueError if the recipe does not fit the model, EngineDied if an engine does not start.
    """
    if spec.kind == "vllm":
        from flywheel.models.vllm import open_backend as opener
    elif spec.kind == "server":
        from flywheel.models.remote import open_backend as opener
    else:
        opener = load_function(spec.kind, "engine.kind")
    return opener(spec, models, ledger, seed, scratch)
