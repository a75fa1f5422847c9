"""Finished stages on disk, made of records that a test has written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from flywheel.runs import manifest
from flywheel.runs.files import encode
from flywheel.runs.stage import Scheduled, Stage


def store(
    root: Path, round: int, stage: str, items: Sequence[str], records: Sequence, figures: dict | None = None, chunk=2
) -> None:
    """Write `records` as shards of `chunk` of the `items`, which are question ids, and the stage's manifest."""
    directory = manifest.stage_dir(root, round, stage)
    parts = [list(items[at : at + chunk]) for at in range(0, len(items), chunk)]
    for index, part in enumerate(parts):
        shard = directory / "shards" / f"{index:05d}"
        shard.mkdir(parents=True)
        tables: dict[type, list] = {}
        for record in records:
            if record.question_id in part:
                tables.setdefault(type(record), []).append(record)
        files = {f"{cls.__name__}.parquet": encode(cls, rows) for cls, rows in tables.items()}
        for name, data in files.items():
            (shard / name).write_bytes(data)
        about = {
            "of": len(parts),
            "items": part,
            "counts": {cls.__name__: len(rows) for cls, rows in tables.items()},
            "seconds": 0.0,
            "verdicts": {},
            "files": {n: {"bytes": len(data), "sha256": sha256(data).hexdigest()} for n, data in files.items()},
        }
        (shard / "shard.json").write_text(json.dumps(about))
    seal(root, round, stage, figures)


def seal(root: Path, round: int, stage: str, figures: dict | None = None) -> None:
    """Write the manifest of a stage that has `figures`."""
    manifest.stage_dir(root, round, stage).mkdir(parents=True, exist_ok=True)
    manifest.seal(
        root, Scheduled(round, Stage(stage, (), (), train=dict), (), 0, 1), {}, figures or {}, seconds=0.0, ranks=1
    )
