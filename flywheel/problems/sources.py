"""Read problem sets: your own JSON lines, and GSM8K and MATH as published.

Every fault in a file raises UserError with one line: file, line number, what is wrong, and the fix.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from flywheel.errors import UserError
from flywheel.problems import gym
from flywheel.problems.grading import last_boxed
from flywheel.problems.overlap import NEAR, WORDS, near
from flywheel.problems.splits import Row, check_ids, distinct, draw_splits
from flywheel.recipe import ProblemSpec
from flywheel.records import Problem, Question, Split

FIELDS = ("question", "answer", "id", "split", "level")
REQUIRED = ("question", "answer")
MATH_FOLDERS = {"train": Split.TRAIN, "val": Split.VALIDATION, "validation": Split.VALIDATION, "test": Split.TEST}


def load(spec: ProblemSpec, notes: list[str] | None = None) -> dict[Split, list[Problem]]:
    """All four splits, disjoint, each in file order and limited by `spec.limits`.

    A split that is not in the files is drawn from the training questions by a hash of each question, so adding rows
    does not move other questions. If `notes` is a list, lines are appended to it: what was dropped, drawn or limited,
    and how many test questions nearly repeat one of another split. Raises UserError for faulty files.
    """
    look_for_near, notes = notes is not None, [] if notes is None else notes
    match spec.format:
        case "jsonl":
            rows = list(_jsonl(spec))
        case "gsm8k":
            rows = list(_gsm8k(spec))
        case "math":
            rows = list(_math(spec, notes))
        case "reasoning_gym":
            rows = list(gym.rows(spec))
    if not rows:
        raise UserError(f"{spec.path}: no questions in it")
    kept = distinct(rows, spec.format == "jsonl", notes)
    check_ids(rows)
    drawn = draw_splits(kept, spec.path or spec.format, notes)
    problems: dict[Split, list[Problem]] = {split: [] for split in Split}
    for row in kept:
        split = drawn.get(row.key, row.split)
        problems[split].append(Problem(Question(row.id or row.hash[:12], row.question, row.level), row.answer, split))
    for name, limit in spec.limits.items():
        found = problems[Split(name)]
        if limit and limit < len(found):
            notes.append(f"{name}: the first {limit} of {len(found)} (problems.limits)")
            del found[limit:]
    if look_for_near and (pairs := near(problems)):
        notes.append(
            f"{len(pairs)} of {len(problems[Split.TEST])} test questions share at least {NEAR:.0%} of their runs of "
            f"{WORDS} words with a question of another split, {pairs[0].question_id} the most: {pairs[0].share:.0%} "
            f"with {pairs[0].other}; all are kept"
        )
    return problems


def files(spec: ProblemSpec) -> list[Path]:
    """The files that `load` reads, in order. Raises UserError if there are none."""
    if spec.format == "reasoning_gym":
        return []
    root = Path(spec.path)
    if not root.exists():
        raise UserError(f"{root}: no such file or folder (problems.path)")
    match spec.format:
        case "jsonl":
            found = [root] if root.is_file() else [root / f"{split}.jsonl" for split in Split]
            found = [path for path in found if path.is_file()]
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


def _jsonl(spec: ProblemSpec) -> Iterator[Row]:
    for name in spec.fields:
        if name not in FIELDS:
            known = f"{_did_you_mean(name, FIELDS)}; known: {', '.join(FIELDS)}"
            raise UserError(f"problems.fields.{name}: unknown field{known}")
    folder = Path(spec.path).is_dir()
    for path in files(spec):
        for where, row in _lines(path):
            values = {name: _value(row, name, spec, where) for name in FIELDS}
            split = _split(values["split"], where) if values["split"] else None
            if folder and split not in (None, Split(path.stem)):
                mend = "move the row or drop its split"
                raise UserError(f"{where}: split {split} in the file of split {path.stem}; {mend}")
            if folder:
                split = Split(path.stem)
            yield Row(values["question"], values["answer"], split, values["id"] or None, values["level"], where)


def _gsm8k(spec: ProblemSpec) -> Iterator[Row]:
    for path in files(spec):
        for number, (where, row) in enumerate(_lines(path)):
            question, solution = (_value(row, name, spec, where) for name in REQUIRED)
            _, marker, gold = solution.rpartition("####")
            if not marker or not gold.strip():
                raise UserError(f"{where}: no gold answer after ####; is this GSM8K as published?")
            yield Row(question, gold.strip().replace(",", ""), Split(path.stem), f"{path.stem}-{number}", "", where)


def _math(spec: ProblemSpec, notes: list[str]) -> Iterator[Row]:
    unknown, empty = [], []  # rows to drop: the published files contain a few of each kind
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
            yield Row(problem, gold, MATH_FOLDERS[name.parts[0]], id, level, where)
    for what, places in (("of unknown level", unknown), ("with no answer in \\boxed{}", empty)):
        if places:
            notes.append(f"{len(places)} questions {what} dropped, the first at {places[0]}")


def _short_boxed(solution: str) -> str | None:
    """The answer in `\\boxed 9`: TeX allows a single token without braces."""
    found = re.findall(r"\\boxed\s+([^\s{}$.]+)", solution)
    return found[-1] if found else None


# ---- one file ----


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _lines(path: Path) -> Iterator[tuple[str, dict]]:
    """(file:line, JSON object) of each line that is not blank."""
    text = _text(path)
    if not text.strip():
        raise UserError(f"{path}: empty; one JSON object a line wanted")
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
    """The stripped text of one field; empty if an optional field is absent."""
    column = spec.fields.get(name, name)
    value = row.get(column)
    if column not in row and (name in REQUIRED or name in spec.fields):
        close = _closest(column, map(str, row))
        mend = f"it has {', '.join(row) or 'nothing'}"
        if close is not None:
            mend = f"did you mean {close!r}? Then set problems.fields.{name}={close}"
        raise UserError(f"{where}: no field {column!r}; {mend}")
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise UserError(f"{where}: {column}: text or a number wanted, got {json.dumps(value)[:40]}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        fault = "half a character (a lone surrogate, \\ud800 to \\udfff); write the whole one"
        raise UserError(f"{where}: {column}: {fault}") from None
    if not text and name in REQUIRED:
        fault = "a question with no answer" if name == "answer" else "the question is empty"
        raise UserError(f"{where}: {fault}")
    return text


def _split(name: str, where: str) -> Split:
    try:
        return Split(name)
    except ValueError:
        known = f"{_did_you_mean(name, list(Split))}; known: {', '.join(Split)}"
        raise UserError(f"{where}: unknown split {name!r}{known}") from None


def _closest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name.lower(), list(known), 1, 0.5)), None)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = _closest(name, known)
    return f" (did you mean {close}?)" if close else ""
