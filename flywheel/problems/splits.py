"""Make four disjoint splits of the rows that were read: check ids, drop duplicates, draw missing splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flywheel.errors import UserError
from flywheel.records import Split

FRACTIONS = {Split.TRAIN: 0.70, Split.CALIBRATE: 0.15, Split.VALIDATION: 0.05, Split.TEST: 0.10}
# A question that occurs in two splits of a published set is kept in the first of these.
KEEPS = [Split.TEST, Split.VALIDATION, Split.CALIBRATE, Split.TRAIN, None]


@dataclass(frozen=True, slots=True)
class Row:
    """One question as read from a file."""

    question: str
    answer: str
    split: Split | None  # None: not named by the file
    id: str | None  # None: derived from the question's hash
    level: str
    where: str  # file:line, for messages
    also: tuple[str, ...] = ()  # other accepted answers

    @property
    def key(self) -> str:
        """The question with normalised whitespace; rows with equal keys are duplicates."""
        return " ".join(self.question.split())

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.key.encode()).hexdigest()


def check_ids(rows: Sequence[Row]) -> None:
    """Raises UserError if two rows have the same id."""
    first: dict[str, Row] = {}
    for row in rows:
        if row.id is not None and (other := first.setdefault(row.id, row)) is not row:
            raise UserError(f"{row.where}: id {row.id!r} is already used at {other.where}; ids must be unique")


def distinct(rows: Sequence[Row], own: bool, notes: list[str]) -> list[Row]:
    """Drop duplicate questions. In your own files (`own`) contradicting duplicates raise UserError."""
    kept: dict[str, Row] = {}
    for row in rows:
        other = kept.setdefault(row.key, row)
        if other is row:
            continue
        if own and row.split != other.split:
            here, there = f"is in split {row.split or 'unset'}", f"in {other.split or 'unset'}"
            raise _contradiction(row, here, other, there)
        if own and (row.answer, row.also) != (other.answer, other.also):
            raise _contradiction(row, f"has answer {row.answer[:40]!r}", other, f"{other.answer[:40]!r}")
        if KEEPS.index(row.split) < KEEPS.index(other.split):
            kept[row.key] = row
    dropped = [row for row in rows if kept[row.key] is not row]
    if dropped:
        notes.append(f"{len(dropped)} duplicate questions dropped, the first at {dropped[0].where}")
    return [row for row in rows if kept[row.key] is row]


def _contradiction(row: Row, here: str, other: Row, there: str) -> UserError:
    return UserError(f"{row.where}: this question {here} and, at {other.where}, {there}; keep one of the two")


def draw_splits(
    rows: Sequence[Row], source: str, notes: list[str], shares: Mapping[str, float] = {}
) -> dict[str, Split]:
    """Row key -> split, for the rows whose split is None or TRAIN.

    Splits that no row names get their `shares` of these rows, or FRACTIONS, scaled to sum to 1; with shares but none
    for TRAIN, it gets the rest. Each gets a row at least (UserError if there are too few). A line on what was drawn
    is added to `notes`.
    """
    given = {row.split for row in rows} - {None, Split.TRAIN}
    missing = [split for split in Split if split not in given]
    pool = [row for row in rows if row.split in (None, Split.TRAIN)]
    if len(pool) < len(missing):
        mend = "add questions or a `split` field"
        raise UserError(f"{source}: {len(pool)} questions cannot be cut into {', '.join(missing)}; {mend}")
    place = {row.key: int(row.hash[:16], 16) / 2**64 for row in pool}  # in [0, 1)
    wanted = {**FRACTIONS, **shares}
    if shares and Split.TRAIN not in shares:
        wanted[Split.TRAIN] = 1 - sum(wanted[split] for split in missing if split is not Split.TRAIN)
        if wanted[Split.TRAIN] <= 0:
            raise UserError(f"{source}: problems.splits: the shares leave no question for train")
    drawn = {key: _split_at(at, missing, wanted) for key, at in place.items()}
    for split in missing:  # in a small file, an empty split takes a question from the largest
        sizes = Counter(drawn.values())
        if not sizes[split]:
            largest = max(missing, key=lambda name: sizes[name])
            drawn[min((key for key in drawn if drawn[key] is largest), key=place.__getitem__)] = split
    if named := [split for split in missing if split is not Split.TRAIN]:
        sizes = Counter(drawn.values())
        counts = ", ".join(f"{sizes[split]} {split}" for split in named)
        notes.append(f"{source}: no {', '.join(named)} questions in it: {counts} drawn by hash from {len(pool)}")
    return drawn


def _split_at(place: float, splits: Sequence[Split], shares: Mapping[str, float]) -> Split:
    """The split at `place` if [0, 1) is divided among `splits` in proportion to `shares`."""
    at = place * sum(shares[split] for split in splits)
    for split in splits:
        at -= shares[split]
        if at < 0:
            return split
    return splits[-1]
