"""The parts of a tidy text (`notation.py`): the items of a list, the value of `x=5`, the interval of an inequality."""

from __future__ import annotations

import re

MAX_DEPTH = 20  # brackets nested more deeply are compared as text

_NAMED = re.compile(r"[A-Za-z\\(|][^=<>+*^-]*(?:=|\\approx)(.+)")
_SUM = re.compile(r"[\d+\-*/(). ]+=([\d+\-*/(). =]+)")
_GROUP = re.compile(r"\d,\d{3}(?!\d)")
_BETWEEN = re.compile(r"(.+?)(<|\\le) ?([A-Za-z](?:\([A-Za-z]\))?)(<|\\le) ?(.+)")
_BEYOND = re.compile(r"([A-Za-z])(<|>|\\le|\\ge) ?(.+)")


def split(text: str, grouped: bool) -> list[str]:
    """`text` cut at commas, semicolons, "and", "or" outside of brackets. grouped: the comma of 1,080 cuts nothing."""
    if "\\begin" in text:
        return [text]
    text = re.sub(r"(?<![A-Za-z])(?:and|or)(?![a-z])", ";", re.sub(r"\\text\{([^{}]*)\}", _conjunctions, text))
    items, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth > MAX_DEPTH:
            return [text]
        cuts = c == ";" or (c == "," and not (grouped and _GROUP.match(text, max(i - 1, 0))))
        if cuts and depth == 0:
            items.append(text[start:i])
            start = i + 1
    items.append(text[start:])
    items = [item.strip() for item in items]
    return [item for item in items if item] or [""]


def _conjunctions(found: re.Match) -> str:
    """`\\text{apples and}` ends one item and begins another: the conjunction leaves the text."""
    return ";".join(
        f"\\text{{{part.strip()}}}" if part.strip(" ,") else "" for part in re.split(r"\b(?:and|or)\b|,", found[1])
    )


def closes(text: str) -> int | None:
    """Where the bracket that opens `text` closes; of an interval they may differ, [0, 1)."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:
            return i
    return None


def both_signs(item: str) -> list[str]:
    """`1\\pm 2` is two: `1+2` and `1-2`."""
    if item.count("\\pm") != 1:
        return [item]
    return [re.sub(r"\\pm ?", sign, item).removeprefix("+") for sign in "+-"]


def name_of(text: str) -> str:
    """What a text with one equals sign gives a value to: `x`, `y_1`, `f` of `f(x)`; empty if it does not."""
    found = re.fullmatch(r"([A-Za-z](?:_\w|_\{\w+\})?)(?:\([A-Za-z]\))?=[^=;]+", text)
    return found[1] if found else ""


def named(text: str) -> str:
    """The last value of `x=2+3=5`, the first of `x=1/3\\approx0.33`; an equation such as `x+y=5` as it is."""
    last = "=".join(text.split("=")[-2:])
    found = _NAMED.fullmatch(last) or _SUM.fullmatch(last)
    return (found[1].partition("\\approx")[0] or found[1]) if found else text


def interval(text: str) -> str:
    """`0<x<12.5` as `(0;12.5)`, `x\\ge 5` as `[5;\\infty)`; another text as it is."""
    if found := _BETWEEN.fullmatch(text):
        low, left, _, right, high = found.groups()
        if not re.search(r"[<>]|\\[lg]e(?![A-Za-z])", low + high):
            return f"{'(' if left == '<' else '['}{low};{high}{')' if right == '<' else ']'}"
    elif found := _BEYOND.fullmatch(text):
        _, sign, bound = found.groups()
        above = sign in (">", "\\ge")
        left, right = ("(" if ">" in sign else "["), (")" if "<" in sign else "]")
        return f"{left}{bound};\\infty)" if above else f"(-\\infty;{bound}{right}"
    return text
