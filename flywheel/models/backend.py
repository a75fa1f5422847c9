"""Open the engines of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flywheel.ledger import Ledger
from flywheel.models.driver import Backend
from flywheel.problems.grading import load_function
from flywheel.recipe import EngineSpec
from flywheel.records import ModelRef


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
