"""Read problem sets: your own JSON files, whatever the library `datasets` reads, and what reasoning-gym makes.

Every fault raises UserError with one line: file, line number, what is wrong, and the fix.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import astuple
from pathlib import Path

from flywheel.errors import UserError
from flywheel.problems import gym, tables
from flywheel.problems.extract import last_boxed
from flywheel.problems.overlap import NEAR, WORDS, near
from flywheel.problems.splits import Row, check_ids, distinct, draw_splits
from flywheel.recipe import ProblemSpec
from flywheel.records import Problem, Question, Split

FIELDS = ("question", "answer", "id", "split", "level")
REQUIRED = ("question", "answer")
SPLITS = {**{split: split for split in Split}, **dict.fromkeys(("dev", "val", "valid"), Split.VALIDATION)}
UNCUT = 0.1  # the fraction of rows without a gold answer from which on `problems.answer` is taken to be wrong
# What other data sets call our fields. The letters of `solution` are close to those of `question`.
USUAL = {"question": ("problem", "prompt", "query", "input"), "answer": ("gold", "target", "solution", "output")}


def load(spec: ProblemSpec, notes: list[str] | None = None) -> dict[Split, list[Problem]]:
    """All four splits, disjoint, each in the source's order and limited by `spec.limits`.

    A split that is not in the source is drawn from the training questions by a hash of each question, so adding rows
    does not move other questions. If `notes` is a list, lines are appended to it: what was dropped, drawn or limited,
    and how many test questions nearly repeat one of another split. Raises UserError for a faulty source.
    """
    look_for_near, notes = notes is not None, [] if notes is None else notes
    match spec.format:
        case "jsonl":
            rows = list(_rows(spec, _json_files(spec), notes))
        case "datasets":
            rows = list(_rows(spec, tables.rows(spec), notes))
        case "reasoning_gym":
            rows = list(gym.rows(spec))
    if not rows:
        raise UserError(f"{spec.path}: no questions in it")
    kept = distinct(rows, spec.format == "jsonl", notes)
    check_ids(rows)
    shares = {split: share for split, share in spec.splits.items() if not isinstance(share, str)}
    drawn = draw_splits(kept, spec.path or spec.format, notes, shares)
    problems: dict[Split, list[Problem]] = {split: [] for split in Split}
    for row in kept:
        split = drawn.get(row.key, row.split)
        question = Question(row.id or row.hash[:12], row.question, row.level)
        problems[split].append(Problem(question, row.answer, split, row.also))
    for name, limit in spec.limits.items():
        found = problems[Split(name)]
        if limit and limit < len(found):
            first, some = "the first ", found[:limit]
            if spec.format == "reasoning_gym":  # its tasks follow one another: some of each
                first, some = "", [found[i * len(found) // limit] for i in range(limit)]
            notes.append(f"{name}: {first}{limit} of {len(found)} (problems.limits)")
            found[:] = some
    if look_for_near and (pairs := near(problems)):
        notes.append(
            f"{len(pairs)} of {len(problems[Split.TEST])} test questions share at least {NEAR:.0%} of their runs of "
            f"{WORDS} words with a question of another split, {pairs[0].question_id} the most: {pairs[0].share:.0%} "
            f"with {pairs[0].other}; all are kept"
        )
    return problems


def digest(spec: ProblemSpec) -> str:
    """sha256 of all problems as `load` makes them, for a source that is no file."""
    rows = [astuple(problem) for found in load(spec).values() for problem in found]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# ---- rows ----


def _rows(spec: ProblemSpec, found: Iterable[tables.Read], notes: list[str]) -> Iterator[Row]:
    """Our rows of a source's. Those without a gold answer are dropped, with a word in `notes`."""
    for name in spec.fields:
        if name not in FIELDS:
            known = f"{_did_you_mean(name, FIELDS)}; known: {', '.join(FIELDS)}"
            raise UserError(f"problems.fields.{name}: unknown field{known}")
        if name != "answer" and isinstance(spec.fields[name], list):
            raise UserError(f"problems.fields.{name}: one column wanted; only `answer` takes a list of them")
    ours = {theirs: Split(split) for split, theirs in spec.splits.items() if isinstance(theirs, str)}
    count, uncut, unmapped = 0, [], set()
    for where, theirs, id, row in found:
        values = {name: _value(row, name, spec, where) for name in FIELDS if name != "answer"}
        theirs = _of_split(theirs, values["split"], where)
        if theirs is not None and Split.TRAIN in ours.values() and theirs not in ours:
            unmapped.add(theirs)
            continue
        count += 1
        answers = [_cut(spec.answer, answer) for answer in accepted(row, spec, where)]
        if None in answers:
            uncut.append(where)
            continue
        split = ours.get(theirs) or (_own_split(theirs, spec, where) if theirs and not ours else None)
        id = values["id"] or id
        yield Row(values["question"], answers[0], split, id, values["level"], where, tuple(answers[1:]))
    if unmapped and not count:
        had = ", ".join(sorted(unmapped))
        raise UserError(f"{spec.path}: problems.splits: no split {', '.join(ours)} in it; it has {had}")
    if len(uncut) > UNCUT * count:
        fault = f"no gold answer by problems.answer {spec.answer!r} in {len(uncut)} of {count} rows"
        raise UserError(f"{uncut[0]}: {fault}, this the first")
    if uncut:
        notes.append(f"{len(uncut)} questions with no gold answer by problems.answer dropped, the first at {uncut[0]}")


def _of_split(file: str | None, field: str, where: str) -> str | None:
    """The split that a row names, by its file or its field."""
    if file and field and SPLITS.get(field, field) != SPLITS.get(file, file):
        raise UserError(f"{where}: split {field} in the file of split {file}; move the row or drop its split")
    return field or file or None


def _cut(pattern: str | None, text: str) -> str | None:
    """The gold answer in `text`; None if there is none."""
    if pattern is None:
        return text
    if pattern == "boxed":
        return last_boxed(text)
    return next((found.strip() for found in reversed(re.findall(pattern, text)) if found.strip()), None)


def _json_files(spec: ProblemSpec) -> Iterator[tables.Read]:
    folder = Path(spec.path).is_dir()
    for path in _files(spec):
        for where, row in _json_rows(path):
            yield where, path.stem if folder else None, None, row


def _files(spec: ProblemSpec) -> list[Path]:
    """The JSON files of a problem set, in order. Raises UserError if there are none."""
    root = Path(spec.path)
    if not root.exists():
        raise UserError(f"{root}: no such file or folder (problems.path)")
    found = [root] if root.is_file() else [path for name in SPLITS if (path := root / f"{name}.jsonl").is_file()]
    if not found:
        wanted = "train.jsonl, calibrate.jsonl, validation.jsonl or test.jsonl"
        raise UserError(f"{root}: no {wanted} in it; for other files set problems.format=datasets")
    return found


# ---- one file ----


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if data.startswith(b"PAR1"):
        raise UserError(f"{path}: a parquet file; set problems.format=datasets")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None


def _json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(file:line, JSON object) of each line that is not blank, or (file[number], object) of one array."""
    text = _text(path)
    if not text.strip():
        raise UserError(f"{path}: empty; one JSON object a line wanted")
    if text.lstrip().startswith("["):
        for number, row in enumerate(_parse(text, str(path))):
            if not isinstance(row, dict):
                raise UserError(f"{path}[{number}]: a JSON object wanted, got {type(row).__name__}")
            yield f"{path}[{number}]", row
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split at U+2028 inside a string
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
        return json.loads(text, parse_constant=refuse, parse_float=str)  # 1e-7 stays as written
    except json.JSONDecodeError as error:
        at = f"{where}:{error.lineno}" if "\n" in text else where
        raise UserError(f"{at}: not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{where}: not JSON that can be read: nested too deeply") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise UserError(f"{where}: a number of too many digits; write it as text") from None


def _value(row: dict, name: str, spec: ProblemSpec, where: str) -> str:
    """The stripped text of one field; empty if an optional field is absent."""
    column = spec.fields.get(name, name)
    if "{" in column and column not in row:
        text = re.sub(r"\{([^{}]+)\}", lambda found: _scalar(_cell(row, found[1], name, spec, where), where), column)
    else:
        text = _scalar(_column(row, column, name, spec, where), f"{where}: {column}")
    if not text and name in REQUIRED:
        raise UserError(f"{where}: the question is empty")
    return text.strip()


def _cell(row: dict, name: str, field: str, spec: ProblemSpec, where: str) -> object:
    """The value of a column, or for `name[2]` of one item of it."""
    column, number = name, None
    if name not in row and (found := re.fullmatch(r"(.+)\[(\d+)\]", name)):
        column, number = found[1], int(found[2])
    value = _column(row, column, field, spec, where)
    if number is None:
        return value
    if not isinstance(value, list) or number >= len(value):
        raise UserError(f"{where}: {column}: a list of more than {number} items wanted, got {_shown(value)}")
    return value[number]


def accepted(row: dict, spec: ProblemSpec, where: str) -> list[str]:
    """The texts of the answer field: one, or all that are accepted."""
    column = spec.fields.get("answer", "answer")
    if isinstance(column, list):
        values = {key: _column(row, key, "answer", spec, where) for key in column}
        return [_scalar(json.dumps(values, ensure_ascii=False, default=str), where)]
    value = _column(row, column, "answer", spec, where)
    values = value if isinstance(value, list) else [value]
    texts = list(dict.fromkeys(_scalar(value, f"{where}: {column}") for value in values))
    if not all(texts) or not texts:
        raise UserError(f"{where}: a question with no answer")
    return texts


def _column(row: dict, column: str, name: str, spec: ProblemSpec, where: str) -> object:
    if column not in row and (name in REQUIRED or name in spec.fields):
        known = {str(key).lower(): str(key) for key in row}
        close = next((known[usual] for usual in USUAL.get(name, ()) if usual in known), None)
        close = close or known.get(_closest(column, known, 0.7))
        mend = f"it has {', '.join(map(str, row)) or 'nothing'}"
        if close is not None:
            mend = f"did you mean {close!r}? Then set problems.fields.{name}={close}"
        raise UserError(f"{where}: no field {column!r}; {mend}")
    return row.get(column)


def _scalar(value: object, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise UserError(f"{where}: text or a number wanted, got {_shown(value)}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        fault = "half a character (a lone surrogate, \\ud800 to \\udfff); write the whole one"
        raise UserError(f"{where}: {fault}") from None
    return text


def _shown(value: object) -> str:
    return json.dumps(value, default=str)[:40]


def _own_split(name: str, spec: ProblemSpec, where: str) -> Split | None:
    """The split that the row itself names; None, to be drawn, if `problems.splits` has a share for it or others'."""
    if spec.splits and (name not in SPLITS or SPLITS[name] in spec.splits):
        return None
    return _split(name, where)


def _split(name: str, where: str) -> Split:
    try:
        return SPLITS[name]
    except KeyError:
        known = f"{_did_you_mean(name, list(Split))}; known: {', '.join(Split)}"
        raise UserError(f"{where}: unknown split {name!r}{known}") from None


def _closest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    return next(iter(difflib.get_close_matches(name.lower(), list(known), 1, cutoff)), None)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = _closest(name, known)
    return f" (did you mean {close}?)" if close else ""
