"""Records on disk: atomic file writes, and parquet tables of frozen dataclasses."""

from __future__ import annotations

import hashlib
import io
import json
import math
import multiprocessing
import os
import shutil
import time
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from flywheel.errors import UserError, first_line

R = TypeVar("R")
ROWS = 4096  # of a long table that are in memory at a time


class Damaged(UserError):
    """A file of a run is missing, truncated, altered, or holds a row that does not match its record class."""


# ---- atomic writes ---------------------------------------------------------------------


def fence() -> None:
    """Exit at once if the rank that started this process is gone: another launch may own the run by now."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


def sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends, and is removed when it fails."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        fence()
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    sync_dir(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Replace the contents of `path` by `data` atomically. Raises OSError."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A scratch directory that becomes `out` when the block ends, and is removed when it fails.

    Raises UserError if `out` is there and not an empty directory, or cannot be written.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: not an empty directory; choose another --out")
    staging = out.with_name(f".{out.name}-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        yield staging
        staging.replace(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    write_file(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The parsed file, or None if there is no such file. Raises Damaged if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise Damaged(f"{path}: not JSON; it was altered or cut short") from None


def names_in(folder: Path) -> list[str]:
    """The names in `folder`; empty if there is none.

    Opening a folder asks the server of an NFS what is in it; until then a name that this host once looked up in vain
    may stay absent for a minute.
    """
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def wait_for_names(folder: Path, names: Collection[str], seconds: float = 10.0) -> None:
    """Wait until `folder` holds `names`, which another host may have written just now. Raises Damaged."""
    end = time.monotonic() + seconds
    while missing := set(names).difference(names_in(folder)):
        if time.monotonic() > end:
            raise Damaged(
                f"{folder / min(missing)}: missing: do all hosts share this folder?"
                f" If they do, delete {folder.parent} to redo the stage"
            )
        time.sleep(0.2)


def sha256(path: Path) -> str:
    """Hex digest of a file, cached while its size and modification time stay the same. Raises OSError."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinity become None, numpy values Python values, keys strings."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if not isinstance(value, (str, bool, int, float, type(None))) and hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- tables ------------------------------------------------------------------------------


class _NoArrowType(TypeError):
    pass


def _arrow(hint: Any):
    """The arrow type of a field. Raises _NoArrowType for dicts and unions, which are stored as JSON."""
    import pyarrow as pa

    simple = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    if hint in simple:
        return simple[hint]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return pa.string()
    if is_dataclass(hint):
        return pa.struct([(name, _arrow(kind)) for name, kind in _hints(hint).items()])
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (tuple, list) and len({a for a in args if a is not Ellipsis}) == 1:
        return pa.list_(_arrow(args[0]))
    if origin in (typing.Union, types.UnionType) and len(args) == 2 and type(None) in args:
        return _arrow(next(a for a in args if a is not type(None)))
    raise _NoArrowType(hint)


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}


@cache
def _layout(cls: type) -> tuple[Any, Any, frozenset[str]]:
    """(arrow schema, pydantic adapter for a list of `cls`, names of the columns that hold JSON)."""
    import pyarrow as pa
    from pydantic import TypeAdapter

    columns, as_json = [], set()
    for name, hint in _hints(cls).items():
        try:
            columns.append((name, _arrow(hint)))
        except _NoArrowType:
            columns.append((name, pa.string()))
            as_json.add(name)
    return pa.schema(columns), TypeAdapter(list[cls]), frozenset(as_json)


def encode(cls: type[R], records: Sequence[R]) -> bytes:
    """Records of one class as the bytes of a parquet file; equal records give equal bytes.

    Raises TypeError if a field's value does not match its annotation.
    """
    return _bytes(_table(cls, records))


def _table(cls: type[R], records: Sequence[R]):
    import pyarrow as pa
    from pydantic_core import PydanticSerializationError

    schema, adapter, as_json = _layout(cls)
    try:
        rows = adapter.dump_python(list(records), mode="json", warnings="error")
    except PydanticSerializationError as error:
        raise TypeError(f"a {cls.__name__} does not hold what it declares: {error}") from None
    for row in rows if as_json else ():
        row.update((name, json.dumps(row[name])) for name in as_json)
    return pa.Table.from_pylist(rows, schema)


def _bytes(table) -> bytes:
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


def encode_ledger(rows: list[dict]) -> bytes:
    import pyarrow as pa

    return _bytes(pa.Table.from_pylist(rows))


def write_table(path: Path, records: Iterable[object], cls: type | None = None) -> None:
    """Write records of one class to `path` atomically, at most ROWS of them in memory.

    cls: the class, for a table with its columns even if there are no records.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = iter(records)
    part = list(islice(records, ROWS))
    table = _table(cls or type(part[0]), part) if part or cls else pa.table({})
    with replacing(Path(path)) as file, pq.ParquetWriter(file, table.schema, compression="zstd") as out:
        out.write_table(table)
        while part := list(islice(records, ROWS)):
            out.write_table(_table(type(part[0]), part))


def read_table(path: Path, cls: type[R]) -> list[R]:
    """The records of a parquet file. Raises Damaged, naming file, row and field."""
    return list(stream_table(path, cls))


def stream_table(path: Path, cls: type[R]) -> Iterator[R]:
    """As `read_table`, with at most ROWS records in memory."""
    at = 0
    with opened(path) as file:
        for batch in file.iter_batches(ROWS):
            yield from to_records(batch, cls, path, at)
            at += len(batch)


def to_records(table, cls: type[R], path: Path, at: int = 0) -> list[R]:
    """Records from an arrow table that was read from `path`, its first row number `at`. Raises Damaged."""
    from pydantic import ValidationError

    _, adapter, as_json = _layout(cls)
    rows = table.to_pylist()
    try:
        for row in rows if as_json else ():
            row.update((name, json.loads(row[name])) for name in as_json)
        return adapter.validate_python(rows)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise Damaged(f"{path}: not a table of {cls.__name__}: {error}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        row, *where = fault["loc"]
        raise Damaged(f"{path}: row {at + row}: {cls.__name__}.{'.'.join(map(str, where))}: {fault['msg']}") from None


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The parquet file at `path`. Raises Damaged, also for what is found while it is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:  # not read_table: a path such as `a=b` must not become a column
            yield file
    except FileNotFoundError:
        raise Damaged(f"{path}: missing") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise Damaged(f"{path}: not a parquet file, or cut short: {first_line(error)}") from None


def read_arrow(path: Path, columns: Sequence[str] | None = None):
    """A parquet file, or some of its columns, as an arrow table. Raises Damaged."""
    with opened(path) as file:
        return file.read(columns)


def read_rows(path: Path) -> list[dict]:
    """The rows of any parquet file as dicts. Raises Damaged."""
    return read_arrow(path).to_pylist()
