"""The shards of a sampling stage: chunks drawn by processes, each written to a scratch folder and then renamed."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from flywheel.runs.files import Damaged, encode, encode_ledger, fence, read_json, sha256, sync_dir, write_synced


class Shards:
    """The chunks of one stage: which are done, drawing the others, and writing their shards.

    `chunks[i]` are the item ids of shard i, in directory `shards/0000i`. `draw` returns the number of the next chunk,
    each once in a launch, and goes on after the last one; by default it gives the missing ones to this process.
    """

    def __init__(self, stage_dir: Path, chunks: Sequence[Sequence[str]], draw: Callable[[], int] | None = None):
        self.dir, self.chunks = stage_dir / "shards", chunks
        self.dir.mkdir(parents=True, exist_ok=True)
        self._draw = draw or missing(stage_dir)
        for path in shard_dirs(stage_dir):  # names and sizes: the launch's rank 0 has compared the contents
            self._check(path, contents=False)

    def path(self, index: int) -> Path:
        return self.dir / f"{index:05d}"

    def done(self) -> list[int]:
        """From a listing: NFS keeps a name that was looked up in vain absent for a minute."""
        return [int(path.name) for path in shard_dirs(self.dir.parent)]

    def _check(self, path: Path, contents: bool = True) -> None:
        """Raises Damaged if a shard is damaged, or has other items than its chunk has now."""
        shard, index = check_shard(path, contents), int(path.name)
        if index >= len(self.chunks) or shard.get("items") != list(self.chunks[index]):
            raise Damaged(
                f"{path}: holds other items than this stage has now; delete {self.dir.parent} to redo the stage"
            )

    def draw(self) -> int | None:
        """The index of a chunk that no other process of this launch draws, or None if none is left."""
        index = self._draw()
        return index if index < len(self.chunks) else None

    def write(
        self,
        index: int,
        records: Iterable[object],
        ledger: Sequence[dict] = (),
        seconds: float = 0.0,
        verdicts: Mapping[str, int] = {},
    ) -> None:
        """Write a drawn chunk: one table per record class, the ledger's rows, and `shard.json`.

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
        for leftover in self.dir.glob(f".{index:05d}.*"):  # of a process that died
            shutil.rmtree(leftover)
        scratch = self.dir / f".{index:05d}.{os.getpid()}"
        scratch.mkdir()
        try:
            for name, data in files.items():
                write_synced(scratch / name, data)
            sync_dir(scratch)
            fence()
            os.rename(scratch, self.path(index))
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            self._check(self.path(index))  # another launch's process wrote it: the chunk is done
        sync_dir(self.dir)


def missing(stage_dir: Path, first: int = 0, every: int = 1) -> Callable[[], int]:
    """A function that returns the next of `first`, `first + every`, ... whose shard is not there, without end."""
    there = (stage_dir / "shards" / f"{i:05d}" for i in itertools.count(first, every))
    return (int(path.name) for path in there if not path.is_dir()).__next__


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


def check_shard(path: Path, contents: bool = True) -> dict:
    """What a shard's `shard.json` holds, after checking all its files, with `contents` their checksums too.

    Raises Damaged.
    """
    shard, mend = read_json(path / "shard.json"), f"delete {path} to make this chunk again"
    if not isinstance(shard, dict):
        raise Damaged(f"{path / 'shard.json'}: missing; {mend}")
    check_files(path, shard.get("files", {}), mend, contents)
    return shard


def shard_dirs(stage_dir: Path) -> list[Path]:
    """The finished shards of a stage, in order."""
    return sorted((p for p in (stage_dir / "shards").glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
