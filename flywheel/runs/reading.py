"""What a stage wrote, read again: a shard at a time, in some columns, or for some questions alone.

All records of a question are in one shard, and the shards' `shard.json` say in which.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from flywheel.runs.files import Damaged, read_arrow, read_json, to_records
from flywheel.runs.shards import shard_dirs

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc

R = TypeVar("R")


def _recent(path: Path) -> pa.Table:
    """A shard's table, kept because questions that are asked for one after another are often in one shard."""
    return _kept(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _kept(path: Path, written: int) -> pa.Table:
    return read_arrow(path)


class Written:
    """The records in the shards of one stage's directory.

    Which question is where is looked up once, so all shards must be there when the first question is asked for.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def tables(self, cls: type, columns: list[str], questions: Iterable[str] | None = None) -> Iterator[pa.Table]:
        """Some columns of the records of class `cls`, a table for each shard; `questions`: of these alone."""
        for shard, asked in self._asked(questions):
            if (path := _path(shard, cls)).is_file():  # a chunk may yield no such record
                table = read_arrow(path, columns)
                yield table if asked is None else table.filter(where("question_id", asked))

    def records(
        self, cls: type[R], questions: Iterable[str] | None = None, among: pc.Expression | None = None
    ) -> Iterator[R]:
        """The records of class `cls` in the order of the stage's items, one shard of them in memory.

        questions: of these alone; no other shard is opened. among: of these, the rows that it selects. Raises Damaged.
        """
        for shard, asked in self._asked(questions):
            if (path := _path(shard, cls)).is_file():
                table = read_arrow(path) if asked is None else _recent(path).filter(where("question_id", asked))
                yield from to_records(table if among is None else table.filter(among), cls, path)

    def groups(self, questions: Iterable[str] | None = None) -> Iterator[list[str]]:
        """The questions (all, or those asked for) shard by shard."""
        for shard, asked in self._asked(questions):
            yield self._items[shard] if asked is None else asked

    def _asked(self, questions: Iterable[str] | None) -> Iterator[tuple[Path, list[str] | None]]:
        """(shard, the questions asked for in it), in the order of the shards; None: all."""
        if questions is None:
            yield from ((shard, None) for shard in shard_dirs(self.directory))
            return
        asked: dict[Path, list[str]] = {}
        for question in questions:
            if question not in self._places:
                raise Damaged(f"{self.directory}: no shard holds question {question}; delete it to redo the stage")
            asked.setdefault(self._places[question], []).append(question)
        yield from sorted(asked.items(), key=lambda item: int(item[0].name))

    @cached_property
    def _items(self) -> dict[Path, list[str]]:
        found = {shard: read_json(shard / "shard.json") for shard in shard_dirs(self.directory)}
        if missing := [shard for shard, about in found.items() if about is None]:
            raise Damaged(f"{missing[0] / 'shard.json'}: missing; delete {missing[0]} to make this chunk again")
        return {shard: about["items"] for shard, about in found.items()}

    @cached_property
    def _places(self) -> dict[str, Path]:
        return {item: shard for shard, items in self._items.items() for item in items}


def _path(shard: Path, cls: type) -> Path:
    return shard / f"{cls.__name__}.parquet"


def where(column: str, values: Iterable[str]) -> pc.Expression:
    """Selects the rows whose `column` has one of `values`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.field(column).isin(pa.array(list(values), pa.string()))
