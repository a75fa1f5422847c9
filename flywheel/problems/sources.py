"""Problem sets: JSON lines of one's own, GSM8K and MATH as they are published.

Every fault of a file is one line: the file, the line in it, and the mend.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flywheel.errors import UserError
from flywheel.problems.grading import last_boxed
from flywheel.problems.overlap import SHARE, WORDS, near
from flywheel.recipe import ProblemSpec
from flywheel.records import Problem, Question, Split

SHARES = {Split.TRAIN: 0.70, Split.CALIBRATE: 0.15, Split.VALIDATION: 0.05, Split.TEST: 0.10}
FIELDS = ("question", "answer", "id", "split", "level")
REQUIRED = ("question", "answer")
MATH_FOLDERS = {"train": Split.TRAIN, "val": Split.VALIDATION, "validation": Split.VALIDATION, "test": Split.TEST}
# Of a question that a published set holds in two splits, the copy that measures stays.
KEEPS = [Split.TEST, Split.VALIDATION, Split.CALIBRATE, Split.TRAIN, None]


@dataclass(slots=True)
class _Row:
    question: str
    answer: str
    split: Split | None  # None: to be drawn by hash
    id: str | None  # None: made from the text
    level: str
    where: str  # file:line, for messages

    @property
    def key(self) -> str:
        return " ".join(self.question.split())


def load(spec: ProblemSpec, notes: list[str] | None = None) -> dict[Split, list[Problem]]:
    """All four splits, each in file order and cut to `spec.limits`; no question is in two.

    A split that the files do not hold is drawn from the training questions by a hash of the
    text, so it stays the same when rows are added. What was dropped or drawn is appended to
    `notes`, one line each, and so are near duplicates across splits. Raises UserError (one line) for anything wrong with the files.
    """
    wanted = notes is not None
    notes = notes if wanted else []
    own = spec.format == "jsonl"
    match spec.format:
        case "jsonl":
            rows = list(_jsonl(spec))
        case "gsm8k":
            rows = list(_gsm8k(spec))
        case "math":
            rows = list(_math(spec, notes))
    if not rows:
        raise UserError(f"{spec.path}: no questions in it")
    kept = _distinct(rows, own, notes)
    _check_ids(rows)
    rows = kept
    _draw_splits(rows, spec.path, notes)
    problems: dict[Split, list[Problem]] = {split: [] for split in Split}
    for row in rows:
        problems[row.split].append(
            Problem(Question(row.id or _hash(row)[:12], row.question), row.answer, row.split, row.level)
        )
    for split, limit in spec.limits.items():
        if limit and limit < len(problems[Split(split)]):
            notes.append(f"{split}: the first {limit} of {len(problems[Split(split)])} (problems.limits)")
            problems[Split(split)] = problems[Split(split)][:limit]
    if wanted and (found := near(problems)):
        notes.append(
            f"{len(found)} of {len(problems[Split.TEST])} test questions are near duplicates of others' ({SHARE:.0%} of their runs of {WORDS} words),"
            f" the nearest {found[0].question_id} of {found[0].other} ({found[0].share:.0%}); kept"
        )
    return problems


def files(spec: ProblemSpec) -> list[Path]:
    """The files that `load` reads, in order. Raises UserError if there are none."""
    root = Path(spec.path)
    if not root.exists():
        raise UserError(f"{root}: no such file or folder (problems.path)")
    match spec.format:
        case "jsonl":
            found = (
                [root] if root.is_file() else [path for split in Split if (path := root / f"{split}.jsonl").is_file()]
            )
            wanted = "train.jsonl, calibrate.jsonl, validation.jsonl or test.jsonl"
        case "gsm8k":
            found = [root / "train.jsonl", root / "test.jsonl"]
            found = found if all(path.is_file() for path in found) else []
            wanted = "train.jsonl and test.jsonl, as in openai/grade-school-math"
        case "math":
            found = [path for name in MATH_FOLDERS for path in sorted((root / name).rglob("*.json"))]
            wanted = "train/*.json (and val/, test/), as in hendrycks/math"
    if not found:
        raise UserError(f"{root}: no problem files in it; {wanted} wanted for problems.format {spec.format}")
    return found


def _jsonl(spec: ProblemSpec) -> Iterator[_Row]:
    unknown = [name for name in spec.fields if name not in FIELDS]
    if unknown:
        raise UserError(
            f"problems.fields.{unknown[0]}: unknown field{_nearest(unknown[0], FIELDS)}; known: {', '.join(FIELDS)}"
        )
    folder = Path(spec.path).is_dir()
    for path in files(spec):
        for where, row in _lines(path):
            values = {name: _value(row, name, spec, where) for name in FIELDS}
            split = _split(values["split"], where) if values["split"] else None
            if folder:
                if split not in (None, Split(path.stem)):
                    raise UserError(
                        f"{where}: split {split} in the file of split {path.stem}; move the row or drop its split"
                    )
                split = Split(path.stem)
            yield _Row(values["question"], values["answer"], split, values["id"] or None, values["level"], where)


def _gsm8k(spec: ProblemSpec) -> Iterator[_Row]:
    for path in files(spec):
        for number, (where, row) in enumerate(_lines(path)):
            question, solution = (_value(row, name, spec, where) for name in REQUIRED)
            _, marker, gold = solution.rpartition("####")
            if not marker or not gold.strip():
                raise UserError(f"{where}: no gold answer after ####; is this GSM8K as published?")
            yield _Row(question, gold.strip().replace(",", ""), Split(path.stem), f"{path.stem}-{number}", "", where)


def _math(spec: ProblemSpec, notes: list[str]) -> Iterator[_Row]:
    unknown, empty = [], []  # faults of the published files, known or met
    for path in files(spec):
        name = path.relative_to(spec.path).with_suffix("")
        data = _parse(_text(path), str(path))
        many = isinstance(data, list)
        for number, row in enumerate(data if many else [data]):
            where = f"{path}[{number}]" if many else str(path)
            problem, solution, level = (_text_field(row, field, where) for field in ("problem", "solution", "level"))
            if level == "Level ?":
                unknown.append(where)
                continue
            gold = last_boxed(solution) or _short_boxed(solution)
            if gold is None:
                empty.append(where)
                continue
            id = "-".join([*name.parts, str(number)] if many else name.parts)
            yield _Row(problem, gold, MATH_FOLDERS[name.parts[0]], id, level, where)
    for what, places in (("of unknown level", unknown), ("with no answer in \\boxed{}", empty)):
        if places:
            notes.append(f"{len(places)} questions {what} dropped, the first at {places[0]}")


def _short_boxed(solution: str) -> str | None:
    """`\\boxed 9`, TeX's form for a single sign."""
    found = re.findall(r"\\boxed\s+([^\s{}$.]+)", solution)
    return found[-1] if found else None


# ---- one file -------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _lines(path: Path) -> Iterator[tuple[str, dict]]:
    """(file:line, object) of each line that is not blank."""
    text = _text(path)
    if not text.strip():
        raise UserError(f"{path}: empty; one JSON object a line wanted")
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut at U+2028 inside a string
        if line.strip():
            where = f"{path}:{number}"
            row = _parse(line, where)
            if not isinstance(row, dict):
                raise UserError(f"{where}: a JSON object wanted, got {type(row).__name__}")
            yield where, row


def _parse(text: str, where: str) -> object:
    def refuse(constant: str) -> None:
        raise UserError(f"{where}: {constant} is not JSON, and no answer")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        at = f"{where}:{error.lineno}" if "\n" in text else where
        raise UserError(f"{at}: not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{where}: not JSON that can be read: nested too deeply") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise UserError(f"{where}: a number of too many digits; write it as text") from None


def _text_field(row: object, name: str, where: str) -> str:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: no {name}; is this MATH as published?")
    return value.strip()


def _value(row: dict, name: str, spec: ProblemSpec, where: str) -> str:
    """The text of one field, stripped; empty where an optional one is absent."""
    column = spec.fields.get(name, name)
    value = row.get(column)
    if column not in row and (name in REQUIRED or name in spec.fields):
        near = difflib.get_close_matches(column.lower(), [str(key) for key in row], 1, 0.5)
        mend = (
            f"; did you mean {near[0]!r}? Then set problems.fields.{name}={near[0]}"
            if near
            else f"; it has {', '.join(row) or 'nothing'}"
        )
        raise UserError(f"{where}: no field {column!r}{mend}")
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise UserError(f"{where}: {column}: text or a number wanted, got {json.dumps(value)[:40]}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    if not text.isprintable() and any("\ud800" <= sign <= "\udfff" for sign in text):
        raise UserError(
            f"{where}: {column}: half a character (a lone surrogate, \\ud800 to \\udfff); write the whole one"
        )
    if not text and name in REQUIRED:
        raise UserError(
            f"{where}: a question with no answer" if name == "answer" else f"{where}: the question is empty"
        )
    return text


def _split(name: str, where: str) -> Split:
    try:
        return Split(name)
    except ValueError:
        raise UserError(
            f"{where}: unknown split {name!r}{_nearest(name, list(Split))}; known: {', '.join(Split)}"
        ) from None


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower(), list(known), 1, 0.5)
    return f" (did you mean {near[0]}?)" if near else ""


# ---- the set as a whole ------------------------------------------------------------------


def _hash(row: _Row) -> str:
    return hashlib.sha256(row.key.encode()).hexdigest()


def _check_ids(rows: list[_Row]) -> None:
    first: dict[str, _Row] = {}
    for row in rows:
        if row.id is not None and (other := first.setdefault(row.id, row)) is not row:
            raise UserError(f"{row.where}: id {row.id!r} is already used at {other.where}; ids must be unique")


def _distinct(rows: list[_Row], own: bool, notes: list[str]) -> list[_Row]:
    """Each question once. In files of one's own a contradiction is an error; published sets are known to hold some."""
    kept: dict[str, _Row] = {}
    for row in rows:
        other = kept.setdefault(row.key, row)
        if other is row:
            continue
        if own and row.split != other.split:
            raise UserError(
                f"{row.where}: this question is in split {row.split or 'unset'} and, at {other.where}, in {other.split or 'unset'}; keep one of the two"
            )
        if own and row.answer != other.answer:
            raise UserError(
                f"{row.where}: this question has answer {row.answer[:40]!r} and, at {other.where}, {other.answer[:40]!r}; keep one of the two"
            )
        if KEEPS.index(row.split) < KEEPS.index(other.split):
            kept[row.key] = row
    chosen = {id(row) for row in kept.values()}
    dropped = [row for row in rows if id(row) not in chosen]
    if dropped:
        notes.append(f"{len(dropped)} duplicate questions dropped, the first at {dropped[0].where}")
    return [row for row in rows if id(row) in chosen]


def _draw_splits(rows: list[_Row], source: str, notes: list[str]) -> None:
    """Fill the splits that no row names from the training (or unnamed) rows, at least one question each."""
    given = {row.split for row in rows} - {None, Split.TRAIN}
    missing = [split for split in Split if split not in given]  # TRAIN among them: it gets the rest
    pool = [row for row in rows if row.split in (None, Split.TRAIN)]
    if len(pool) < len(missing):
        raise UserError(
            f"{source}: {len(pool)} questions cannot be cut into {', '.join(missing)}; add questions or a `split` field"
        )
    place = {row.key: int(_hash(row)[:16], 16) / 2**64 for row in pool}
    total = sum(SHARES[split] for split in missing)
    for row in pool:
        at, row.split = place[row.key] * total, missing[-1]
        for split in missing:
            at -= SHARES[split]
            if at < 0:
                row.split = split
                break
    for split in missing:  # a small file: take from the largest, in the order of the hash
        if not any(row.split is split for row in pool):
            sizes = {name: sum(row.split is name for row in pool) for name in missing}
            largest = max(missing, key=sizes.__getitem__)
            min((row for row in pool if row.split is largest), key=lambda row: place[row.key]).split = split
    drawn = [split for split in missing if split is not Split.TRAIN]
    if drawn:
        sizes = ", ".join(f"{sum(row.split is split for row in pool)} {split}" for split in drawn)
        notes.append(f"{source}: no {', '.join(drawn)} questions in it: {sizes} drawn by hash from {len(pool)}")
