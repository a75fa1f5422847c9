"""Read access to a run on disk, and the restricted view that a stage gets."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from flywheel.errors import UserError
from flywheel.ledger import Ledger
from flywheel.recipe import Recipe, load
from flywheel.records import ModelRef, Problem, Role, Split
from flywheel.runs import manifest
from flywheel.runs.files import read_json, read_rows, wait_for_names
from flywheel.runs.named import Named
from flywheel.runs.reading import Written
from flywheel.runs.stage import At, Stage

R = TypeVar("R")
BEAT = 3.0  # seconds
POLL = 0.05
SKIPPED = "skipped_questions.json"  # ids of the questions that `problems.skip_long` left out when the run began


class Run:
    """Read-only access to a run directory, finished or not: recipe, manifests, records, models."""

    def __init__(self, root: str | Path, recipe: Recipe | None = None, skipped: Collection[str] | None = None):
        """`recipe` and `skipped` (ids of left out questions): used in place of the run's own.

        Raises UserError if there is no run at `root`.
        """
        self.root = Path(root)
        if recipe is None and not (self.root / "recipe.yaml").is_file():
            raise UserError(f"{root}: not a run (no recipe.yaml in it)")
        self._recipe = recipe or load(self.root / "recipe.yaml")
        self.skipped = frozenset((read_json(self.root / SKIPPED) or ()) if skipped is None else skipped)
        self._written: dict[At, Written] = {}

    @property
    def recipe(self) -> Recipe:
        return self._recipe

    def path(self, stage: str, round: int) -> Path:
        """The directory of a stage."""
        return manifest.stage_dir(self.root, round, stage)

    # ---- stages and rounds ----

    def manifest(self, stage: str, round: int) -> dict[str, Any] | None:
        """The stage's manifest, or None while the stage is unfinished. Raises UserError if it cannot be read."""
        return manifest.load(self.root, round, stage)

    @property
    def manifests(self) -> dict[At, dict[str, Any]]:
        """The manifests of all finished stages, in the order in which they ran."""
        found = {}
        for path in self.root.glob("round_*/*/manifest.json"):
            if match := re.fullmatch(r"round_(\d+)", path.parts[-3]):
                made = self.manifest(path.parts[-2], int(match[1]))
                if made["stage"] == path.parts[-2]:  # skips renamed copies of a stage directory
                    found[made["round"], made["stage"]] = made
        return dict(sorted(found.items(), key=lambda item: (item[0][0], item[1]["place"])))

    @property
    def rounds(self) -> list[int]:
        """The finished rounds from 0 on, without a gap."""
        counts: dict[int, list[int]] = {}
        for (round, _), made in self.manifests.items():
            counts.setdefault(round, []).append(made["of"])
        done = 0
        while done in counts and len(counts[done]) == counts[done][0]:
            done += 1
        return list(range(done))

    def figures(self, stage: str, round: int) -> dict:
        """A stage's figures; empty if it is not finished."""
        return (self.manifest(stage, round) or {}).get("figures") or {}

    def written(self, stage: str, round: int) -> Written:
        """What a stage wrote; to be asked for some questions only if all its shards are there."""
        return self._written.setdefault((round, stage), Written(self.path(stage, round)))

    def read(self, cls: type[R], stage: str, round: int, questions: Iterable[str] | None = None) -> Iterator[R]:
        """The records of class `cls` that a stage wrote, in the order of its items; `questions`: of these alone."""
        return self.written(stage, round).records(cls, questions)

    @cached_property
    def ledger_rows(self) -> list[dict]:
        """All ledger rows on disk, including those of unfinished stages, but not those of a copy of a stage."""
        paths = [*self.root.glob("round_*/*/shards/*/ledger.parquet"), *self.root.glob("round_*/*/ledger*.parquet")]
        rows = []
        for path in sorted(paths):
            round, stage, *within = path.relative_to(self.root).parts
            if not any(part.startswith(".") for part in within):
                rows += [row for row in read_rows(path) if (f"round_{row['round']}", row["stage"]) == (round, stage)]
        return rows

    def harvest(self, round: int) -> Path | None:
        """The parquet file of a round's harvest, or None if there is none."""
        path = self.path("harvest", round) / "harvest.parquet"
        return path if path.is_file() else None

    # ---- questions and models ----

    def problems(self, *splits: Split) -> list[Problem]:
        """The problems of `splits`, split by split in the file's order."""
        if not splits:
            raise ValueError("which splits?")
        return [problem for split in splits for problem in self._problems.get(split, [])]

    @cached_property
    def _problems(self) -> dict[Split, list[Problem]]:
        from flywheel.problems import sources

        groups = sources.load(self._recipe.problems)
        return {split: [p for p in group if p.id not in self.skipped] for split, group in groups.items()}

    def policy_round(self, round: int) -> int:
        """The round whose distillation made the current policy after `round`; 0 is the base.

        A policy is replaced only when a later round's gate passes, so policy_1 may still be the policy of round 3.
        Raises UserError if a gate that decides this is not finished.
        """
        for r in range(round, 0, -1):
            if (gate := self.manifest("gate", r)) is None:
                gate_name = manifest.name_of((r, "gate"))
                raise UserError(f"the policy of round {r} is not decided: {gate_name} is not finished")
            if gate["figures"]["passed"]:
                return r
        return 0

    def model(self, role: Role, round: int) -> ModelRef:
        """The model of `role` after `round`. If the PRM was refused, the un-finetuned base takes its place."""
        base = self._recipe.model.base
        match role:
            case Role.POLICY:
                made = self.policy_round(round)
                adapter = str(self.path("distill", made) / "adapter") if made else None
                return ModelRef(f"policy_{made}", base, adapter)
            case Role.PRM:
                trained = self.manifest("train_prm", round)
                if trained and trained["figures"].get("refused"):
                    return ModelRef("policy_0", base)
                return ModelRef(f"prm_{round}", base, str(self.path("train_prm", round) / "adapter"))
            case Role.REVISER:
                return ModelRef(f"reviser_{round}", base, str(self.path("choose_reviser", round) / "adapter"))
            case Role.HEAD:
                trained = (self.manifest("train_head", round) or {"figures": {}})["figures"].get("trained")
                return ModelRef(
                    f"head_{round}", base, str(self.path("train_head", round) / "adapter") if trained else None
                )

    def adapters(self, round: int) -> dict[Role, Path]:
        """The LoRA adapters in use after `round`, by role; roles whose adapter does not exist are left out."""
        found = {}
        for role in Role:
            adapter = self.model(role, round).adapter
            if adapter and (Path(adapter) / "adapter_config.json").is_file():
                found[role] = Path(adapter)
        return found


class TestSplitForbidden(UserError):
    """A stage without `test_split` asked for test questions."""

    __test__ = False  # or pytest would collect it for its name


class Context(Run):
    """A stage's view of its run: only declared inputs and recipe sections, and test questions only with `test_split`.

    `round` defaults to the stage's own round.
    """

    def __init__(
        self,
        recipe: Recipe,
        root: Path,
        round: int,
        stage: Stage,
        rank: int = 0,
        world: int = 1,
        tell: Callable[[int, int, dict], None] = lambda done, total, figures: None,
        ask: Callable[[str], Any] | None = None,
        leave_open: bool = False,
    ):
        """ask: what this process may ask its rank (`processes.run_stage`); without it the process is the only one.

        leave_open: the process's next stage may take over the engines of this one.
        """
        super().__init__(root, recipe)
        self.round, self.stage, self.rank, self.world = round, stage, rank, world
        self.ledger = Ledger(stage.name, round)
        self.dir = self.path(stage.name)
        self._inputs: dict[At, dict[str, Any]] = {}
        self._tell, self._ask, self.leave_open = tell, ask, leave_open
        self.draw = partial(ask, "draw") if ask else None  # the number of the next chunk of this launch
        self._said: tuple[int, int, dict] = (0, 0, {})  # the last progress

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, limited to the stage's sections."""
        return self._recipe if self.stage.sections is None else Named(self._recipe, self.stage)

    @property
    def chunk(self) -> int:
        """Items per shard; 0: see `flywheel.runs.worker.chunks`."""
        return self._recipe.engine.chunk

    def path(self, stage: str, round: int | None = None) -> Path:
        return super().path(stage, self.round if round is None else round)

    def seed(self, *parts: object) -> int:
        """A 63-bit seed, a hash of the run's seed, round, stage and `parts` only."""
        text = "\x1f".join(map(str, (self._recipe.seed, self.round, self.stage.name, *parts)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1

    # ---- what may be read ----

    def problems(self, *splits: Split) -> list[Problem]:
        """As `Run.problems`. Raises TestSplitForbidden if the stage may not read the test split."""
        if Split.TEST in splits and not self.stage.test_split:
            raise TestSplitForbidden(f"stage {self.stage.name} must not see the test split")
        return super().problems(*splits)

    def figures(self, stage: str, round: int | None = None) -> dict:
        """The figures of an input stage. Raises UserError if it is not finished."""
        return self._input(stage, round)["figures"]

    def written(self, stage: str, round: int | None = None) -> Written:
        """What an input stage (or this one, in `finish`) wrote.

        Raises Damaged if a shard that the input's manifest names is missing.
        """
        at = self.round if round is None else round
        if (at, stage) != (self.round, self.stage.name):
            self._input(stage, at)
        return super().written(stage, at)

    def read(
        self, cls: type[R], stage: str, round: int | None = None, questions: Iterable[str] | None = None
    ) -> Iterator[R]:
        """As `Run.read`, of an input stage (or of this one, in `finish`)."""
        return super().read(cls, stage, self.round if round is None else round, questions)

    def _input(self, stage: str, round: int | None) -> dict[str, Any]:
        at = (self.round if round is None else round, stage)
        if at not in self.stage.reads(self.round):
            raise ValueError(f"stage {self.stage.name} does not name {manifest.name_of(at)} among its inputs")
        if at not in self._inputs:  # kept: the manifest of a large stage takes long to read
            if (found := self.manifest(stage, at[0])) is None:
                raise UserError(f"{manifest.name_of(at)} is not finished, and {self.stage.name} needs it")
            shards = {name.split("/")[1] for name in found["files"] if name.startswith("shards/")}
            wait_for_names(self.path(stage, at[0]) / "shards", shards)
            self._inputs[at] = found
        return self._inputs[at]

    def wait_for_others(self) -> None:
        """On rank 0: until every other process of the stage has written all that it drew, and ended."""
        while self.rank == 0 and self._ask and not self._ask("all drawn are written"):
            time.sleep(POLL)

    # ---- progress, for the terminal ----

    def progress(self, done: int, total: int, **figures: float) -> None:
        """Report `done` of `total` units of a training, or items of a sampling stage."""
        self._said = (done, total, figures)
        self.beat()

    def beat(self) -> None:
        """Report the last progress again, with the tokens so far."""
        done, total, figures = self._said
        self._tell(done, total, figures | ({"tokens": self.ledger.so_far} if self.ledger.so_far else {}))

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Inside, a thread calls `beat` every BEAT seconds, whatever the stage does meanwhile."""
        over = threading.Event()

        def beats() -> None:
            while not over.wait(BEAT):
                self.beat()

        thread = threading.Thread(target=beats, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
