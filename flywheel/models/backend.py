"""Open the engines that a stage asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flywheel.ledger import Ledger
from flywheel.models.driver import Backend
from flywheel.problems.grading import load_function
from flywheel.recipe import EngineSpec
from flywheel.records import ModelRef


def open_backend(spec: EngineSpec, models: Mapping[str, ModelRef], ledger: Ledger, seed: int, scratch: Path) -> Backend:
    """Open an engine for each role (or other key) of `models`; the ledger's rows carry the key.

    Keys with the same base, adapter and labels share one engine; so do all keys of a base where its
    adapters are served at run time (`engine.adapters`). `scratch`: a directory for merged weights,
    needed only while the engines start. The caller closes the backend. Raises NotAModel for a path
    that is no model, ValueError if the recipe and the model do not fit, EngineDied if an engine does
    not start.
    """
    if spec.kind == "vllm":
        from flywheel.models.vllm import open_backend as opener
    else:
        opener = load_function(spec.kind, "engine.kind")
    return opener(spec, models, ledger, seed, scratch)
