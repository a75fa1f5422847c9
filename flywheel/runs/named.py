"""A recipe that shows a stage only what the stage declares to read."""

from __future__ import annotations

from typing import Any

from flywheel.runs import manifest
from flywheel.runs.stage import Stage


class Named:
    """A recipe or section limited to the keys that a stage declares, so that its fingerprint covers all it reads.

    Reading any other key raises ValueError (a bug in the stage). `model.base` and `problems.path` may always be read,
    because the contents of their files are in every fingerprint.
    """

    def __init__(self, spec: Any, stage: Stage, prefix: str = ""):
        self._spec, self._stage, self._prefix = spec, stage, prefix

    def __getattr__(self, key: str) -> Any:
        value, path = getattr(self._spec, key), f"{self._prefix}{key}"
        named = (*self._stage.sections, *manifest.PATHS, "seed")
        if any(path == section or path.startswith(f"{section}.") for section in named):
            return value
        if any(section.startswith(f"{path}.") for section in named):
            return Named(value, self._stage, f"{path}.")
        raise ValueError(f"stage {self._stage.name} reads the recipe's {path} but does not name it among its sections")
