"""A run read back from its directory: manifests, ledger rows, recipe.

Reads only; works on a run of any age and at any point. What a manifest does not hold
is absent here too: nothing is made up.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from flywheel.errors import UserError


class NotARun(UserError):
    """The path is no run, or one of its files cannot be read; one line."""


@dataclass(frozen=True)
class History:
    """`manifests[round, stage]` for every finished stage."""

    run: Path
    recipe: dict
    manifests: dict[tuple[int, str], dict]

    @classmethod
    def of(cls, run: str | Path) -> History:
        """Raises NotARun."""
        run = Path(run)
        if not (run / "recipe.yaml").is_file():
            raise NotARun(f"{run}: not a run (no recipe.yaml in it)")
        try:
            recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise NotARun(f"{run / 'recipe.yaml'}: not a recipe: {' '.join(str(error).split())}") from None
        if not isinstance(recipe, dict):
            raise NotARun(f"{run / 'recipe.yaml'}: not a recipe")
        manifests = {}
        for path in run.glob("round_*/*/manifest.json"):
            if not (match := re.fullmatch(r"round_(\d+)", path.parts[-3])):
                continue
            try:
                manifest = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise NotARun(f"{path}: not a manifest") from None
            manifests[int(match[1]), path.parts[-2]] = manifest
        order = sorted(manifests, key=lambda at: (at[0], manifests[at]["place"]))
        return cls(run, recipe, {at: manifests[at] for at in order})

    def finished(self, round: int) -> bool:
        """Whether each of the round's stages is finished."""
        found = [manifest for (r, _), manifest in self.manifests.items() if r == round]
        return bool(found) and len(found) == found[0]["of"]

    @property
    def rounds(self) -> list[int]:
        """The finished rounds from 0 on, without a gap."""
        count = 0
        while self.finished(count):
            count += 1
        return list(range(count))

    def figures(self, stage: str, round: int) -> dict:
        """A finished stage's figures; empty where it is not there."""
        return self.manifests.get((round, stage), {}).get("figures") or {}

    def path(self, stage: str, round: int) -> Path:
        return self.run / f"round_{round}" / stage

    @cached_property
    def ledger(self) -> list[dict]:
        """All ledger rows that are on disk, those of an unfinished stage's shards included."""
        import pyarrow.parquet as pq

        paths = [*self.run.glob("round_*/*/shards/*/ledger.parquet"), *self.run.glob("round_*/*/ledger.parquet")]
        # ParquetFile, not read_table: a path such as `a=b` must not become a partition column
        return [row for path in sorted(paths) for row in pq.ParquetFile(path).read().to_pylist()]

    def policy_round(self, round: int) -> int:
        """The round whose distillation made the policy that stands after `round`; 0 is the base."""
        passed = (r for r in range(round, 0, -1) if self.figures("gate", r).get("passed"))
        return next(passed, 0)

    def adapters(self, round: int) -> dict[str, Path]:
        """The LoRA adapters after `round`: policy (of the last passed gate), prm, reviser; only those there are and were used."""
        places = {
            "policy": [self.path("distill", self.policy_round(round)) / "adapter"],
            "prm": [] if self.figures("train_prm", round).get("refused") else [self.path("train_prm", round) / "adapter"],
            "reviser": [self.path("choose_reviser", round) / "adapter"],
        }
        found = {role: [p for p in paths if (p / "adapter_config.json").is_file()] for role, paths in places.items()}
        return {role: paths[0] for role, paths in found.items() if paths}

    def harvest(self, round: int) -> Path | None:
        """The parquet of one round's harvest, if it kept anything."""
        path = self.path("harvest", round) / "harvest.parquet"
        return path if path.is_file() else None
