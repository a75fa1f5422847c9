"""Training examples on disk: made once, by rank 0, and mapped into memory by every rank. Does not import torch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from flywheel.runs.files import read_json, replacing, write_json
from flywheel.training.examples import Example, PrmExample, TrainingError

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 1000  # rows in memory while they are written or read through
FOLDER = "examples"  # in a training stage's directory; deleted when the stage is finished


@dataclass(frozen=True)
class Stored:
    """`rows`: the examples in the order in which they were made, mapped into memory, and the column `question_id`.

    `figures`: what `stored` was given beside them.
    """

    rows: Dataset
    figures: dict

    def split(self, held: Iterable[str]) -> tuple[Dataset, Dataset]:
        """(training, validation) rows without question ids; the questions in `held` validate."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        if not len(self.rows):
            return self.rows, self.rows
        inside = pc.is_in(self.rows.data["question_id"], pa.array(list(held), pa.string())).to_numpy()
        rows = self.rows.remove_columns("question_id")
        return rows.select(np.flatnonzero(~inside)), rows.select(np.flatnonzero(inside))


def stored(
    folder: Path, rank: int, examples: Iterable[tuple[str, Example | PrmExample]], figures: Callable[[], dict] = dict
) -> Stored:
    """Store (question id, example) in `folder`, or map what is stored there already.

    Rank 0 alone draws `examples` and then calls `figures` (JSON can hold what it returns); the others wait for the
    file that is written last. Raises TrainingError for a malformed example.
    """
    from datasets import Dataset

    table, about = folder / "rows.arrow", folder / "about.json"
    if rank == 0 and not about.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _write(table, iter(examples))
        write_json(about, figures())
    while not about.is_file():  # if rank 0 fails, its launch ends this process
        time.sleep(0.2)
    return Stored(Dataset.from_file(str(table)) if table.is_file() else Dataset.from_dict({}), read_json(about))


def _write(path: Path, examples: Iterator[tuple[str, Example | PrmExample]]) -> None:
    """Write the rows as an arrow stream, which `datasets` maps; no file if there are none."""
    import pyarrow as pa

    first = next(examples, None)
    if first is None:
        path.unlink(missing_ok=True)
        return
    ints = dict.fromkeys(("input_ids", "labels", "reads"), pa.list_(pa.int32()))
    kinds = {name: ints.get(name, pa.list_(pa.float64())) for name in first[1].row()}
    schema = pa.schema({"question_id": pa.string(), **kinds})
    examples = chain([first], examples)
    with replacing(path) as file, pa.ipc.new_stream(file, schema) as out:
        while part := list(islice(examples, BATCH)):
            out.write_table(pa.Table.from_pylist([_row(*item) for item in part], schema))


def _row(question: str, example: Example | PrmExample) -> dict:
    if fault := example.fault():
        raise TrainingError(f"example of question {question}: {fault}")
    return {"question_id": question, **example.row()}


def lengths(rows: Dataset, column: str = "input_ids") -> list[int]:
    """The length of each row's list in `column`; by default its number of tokens."""
    import pyarrow.compute as pc

    batches = rows.with_format("arrow").iter(BATCH) if len(rows) else ()
    return [length for batch in batches for length in pc.list_value_length(batch[column]).to_pylist()]


def contents(rows: Dataset) -> str:
    """sha256 of all rows; whole numbers count as such, whatever width they are stored in."""
    import pyarrow as pa
    import pyarrow.compute as pc

    seen = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(BATCH) if len(rows) else ():
        for name in batch.column_names:
            flat = pc.list_flatten(batch[name])
            flat = flat if pa.types.is_floating(flat.type) else flat.cast(pa.int64())
            for part in (pc.list_value_length(batch[name]), flat):
                seen.update(part.to_numpy().tobytes())
    return seen.hexdigest()
