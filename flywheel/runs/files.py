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
from pathlib import Path
from typing import Any, TypeVar

from flywheel.errors import UserError

R = TypeVar("R")


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


def write_file(path: Path, data: bytes) -> None:
    """Replace the contents of `path` by `data` atomically. Raises OSError."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_synced(scratch, data)
        fence()
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    sync_dir(path.parent)


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A scratch directory that becomes `out` when the block ends, and is removed when it fails.

    Raises UserError if `out` is there and not an empty directory, or cannot be written.
    """
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
            raise Damaged(f"{folder / min(missing)}: missing; delete {folder.parent} to redo the stage")
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
    import pyarrow as pa
    from pydantic_core import PydanticSerializationError

    schema, adapter, as_json = _layout(cls)
    try:
        rows = adapter.dump_python(list(records), mode="json", warnings="error")
    except PydanticSerializationError as error:
        raise TypeError(f"a {cls.__name__} does not hold what it declares: {error}") from None
    for row in rows if as_json else ():
        row.update((name, json.dumps(row[name])) for name in as_json)
    return _bytes(pa.Table.from_pylist(rows, schema))


def _bytes(table) -> bytes:
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


def encode_ledger(rows: list[dict]) -> bytes:
    import pyarrow as pa

    return _bytes(pa.Table.from_pylist(rows))


def write_table(path: Path, records: Iterable[object]) -> None:
    """Write records of one class to `path` atomically."""
    import pyarrow as pa

    records = list(records)
    write_file(Path(path), encode(type(records[0]), records) if records else _bytes(pa.table({})))


def read_table(path: Path, cls: type[R]) -> list[R]:
    """The records of a parquet file. Raises Damaged, naming file, row and field."""
    from pydantic import ValidationError

    _, adapter, as_json = _layout(cls)
    rows = read_rows(path)
    try:
        for row in rows if as_json else ():
            row.update((name, json.loads(row[name])) for name in as_json)
        return adapter.validate_python(rows)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise Damaged(f"{path}: not a table of {cls.__name__}: {error}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        row, *where = fault["loc"]
        raise Damaged(f"{path}: row {row}: {cls.__name__}.{'.'.join(map(str, where))}: {fault['msg']}") from None


def read_rows(path: Path) -> list[dict]:
    """The rows of any parquet file as dicts. Raises Damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:  # not read_table: a path such as `a=b` must not become a column
            return file.read().to_pylist()
    except FileNotFoundError:
        raise Damaged(f"{path}: missing") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise Damaged(f"{path}: not a parquet file, or cut short: {str(error).splitlines()[0]}") from None
