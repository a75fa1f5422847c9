"""The shards of a sampling stage: chunks drawn by processes, each written to a scratch folder and then renamed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from flywheel.runs.files import Damaged, encode, encode_ledger, fence, read_json, sha256, sync_dir, write_synced


class Shards:
    """The chunks of one stage: which are done, drawing the others, and writing their shards.

    `chunks[i]` are the item ids of shard i, in directory `shards/0000i`. A drawn chunk is held by
    a lock on byte i of one file, which the kernel releases when its owner dies.
    """

    def __init__(self, stage_dir: Path, chunks: Sequence[Sequence[str]]):
        self.dir, self.chunks = stage_dir / "shards", chunks
        self.dir.mkdir(parents=True, exist_ok=True)
        # POSIX locks (not flock): a process forked from the owner cannot keep them alive
        self.locks = os.open(stage_dir / "claims.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.held: set[int] = set()  # drawn by this process, and not yet written: its own locks would not stop it
        self._check()

    def close(self) -> None:
        os.close(self.locks)

    def path(self, index: int) -> Path:
        return self.dir / f"{index:05d}"

    def done(self) -> list[int]:
        there = {int(name) for name in os.listdir(self.dir) if name.isdigit()}
        return [i for i in range(len(self.chunks)) if i in there]

    def _check(self) -> None:
        """Raises Damaged if an existing shard has other items than its chunk has now, or altered files."""
        for path in shard_dirs(self.dir.parent):
            shard, index = check_shard(path), int(path.name)
            if index >= len(self.chunks) or shard.get("items") != list(self.chunks[index]):
                raise Damaged(
                    f"{path}: holds other items than this stage has now; delete {self.dir.parent} to redo the stage"
                )

    def draw(self) -> int | None:
        """A missing chunk, locked until its shard is written; None if there is none that no process holds."""
        done = set(self.done())
        for index in range(len(self.chunks)):
            if index not in done and index not in self.held and self._lock(index):
                self.held.add(index)
                if not self.path(index).is_dir():  # else finished between the look and the lock
                    return index
                self._release(index)
        return None

    def _release(self, index: int) -> None:
        self.held.remove(index)
        fcntl.lockf(self.locks, fcntl.LOCK_UN, 1, index)

    def _lock(self, index: int) -> bool:
        try:
            fcntl.lockf(self.locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)
            return True
        except (BlockingIOError, PermissionError):
            return False

    def write(
        self,
        index: int,
        records: Iterable[object],
        ledger: Sequence[dict] = (),
        seconds: float = 0.0,
        verdicts: Mapping[str, int] = {},
    ) -> None:
        """Write a drawn chunk: one table per record class, the ledger's rows, and `shard.json`; releases it.

        `verdicts`: counts of its graded solutions. Several threads may write different chunks at the same time.
        """
        tables: dict[type, list[object]] = {}
        for record in records:
            tables.setdefault(type(record), []).append(record)
        files = {f"{cls.__name__}.parquet": encode(cls, rows) for cls, rows in tables.items()}
        if ledger:
            files["ledger.parquet"] = encode_ledger(ledger)
        about = {
            "of": len(self.chunks),
            "items": list(self.chunks[index]),
            "counts": {cls.__name__: len(rows) for cls, rows in tables.items()},
            "seconds": round(seconds, 3),
            "verdicts": dict(verdicts),
            "files": {
                name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
            },
        }
        files["shard.json"] = json.dumps(about).encode()
        for leftover in self.dir.glob(f".{index:05d}.*"):  # of a process that died: this one holds the lock now
            shutil.rmtree(leftover)
        scratch = self.dir / f".{index:05d}.{os.getpid()}"
        scratch.mkdir()
        try:
            for name, data in files.items():
                write_synced(scratch / name, data)
            sync_dir(scratch)
            fence()
            os.rename(scratch, self.path(index))
        except OSError:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        sync_dir(self.dir)
        self._release(index)


def check_files(directory: Path, files: dict[str, dict], mend: str, contents: bool = True) -> None:
    """Raises Damaged, ending with `mend`, if a file is missing or has another size or (`contents`) checksum."""
    for name, listed in files.items():
        path = directory / name
        if not path.is_file():
            raise Damaged(f"{path}: missing; {mend}")
        if path.stat().st_size != listed["bytes"]:
            raise Damaged(f"{path}: has {path.stat().st_size} bytes, was written with {listed['bytes']}; {mend}")
        if contents and sha256(path) != listed["sha256"]:
            raise Damaged(f"{path}: is not what was written (sha256); {mend}")


def check_shard(path: Path) -> dict:
    """The contents of a shard's `shard.json`, after checking all its files. Raises Damaged."""
    shard, mend = read_json(path / "shard.json"), f"delete {path} to make this chunk again"
    if not isinstance(shard, dict):
        raise Damaged(f"{path / 'shard.json'}: missing; {mend}")
    check_files(path, shard.get("files", {}), mend)
    return shard


def shard_dirs(stage_dir: Path) -> list[Path]:
    """The finished shards of a stage, in order."""
    return sorted((p for p in (stage_dir / "shards").glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
