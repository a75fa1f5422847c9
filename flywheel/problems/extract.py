"""Find the final answer in a solution's text, by named rules or by a regular expression.

`boxed` is what MATH and most chat models write, `hashes` (`#### 18`) is GSM8K's form, `answer_is` reads
"The answer is 18." and "**Answer:** 18", `code` is a program in a fenced block.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

THOUGHT, ANSWERED = "<think>", "</think>"
BOXES = 3  # a text with so many different boxes names no one answer

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_TOKEN = re.compile(r"[-+]?\d[^\s{}$.]*(?:\.\d+)?|[A-Za-z](?![A-Za-z])|\\[A-Za-z]+(?![A-Za-z{\d])")
_HASHES = re.compile(r"####(?!#)[^\S\n]*(.*)")
# A number that ends there: its sentence, its line, or whatever a model wrote after it without a digit
_FIRST_NUMBER = re.compile(
    r"\**\s*(\\?\$?\s*-?\s*\\?\$?\d(?:[\d,]*\d)?(?:\.\d+)?)(?=\s*(?:$|\.(?!\d)|[#<|]|\*\*)|\s+[A-Z])"
)
_ANSWER_IS = re.compile(r"\banswer\b[^\S\n]*(?:\*\*)?[^\S\n]*(?:is|:|=)[^\S\n]*:?[^\S\n]*(?:\*\*)?[^\S\n]*(.+)", re.I)
_FENCED = re.compile(r"```[^\S\n]*(\w*)[^\n`]*\n(.*?)```", re.S)
_SENTENCE_END = re.compile(r"\.(?:\s.*|\**\s*)$", re.S)


def find(text: str, rules: Sequence[str]) -> str | None:
    """The final answer by the first of `rules` that finds one, stripped; None if none does.

    A rule is a key of `NAMED`, or a regular expression whose one group, in its last match, is the answer. What a model
    thinks, up to `</think>`, holds no answer, not even a box; nor does a thought that never ends.
    """
    text = after_thought(text)
    for rule in rules:
        if found := NAMED[rule](text) if rule in NAMED else _last(re.findall(rule, text)):
            return found
    return None


def after_thought(text: str) -> str:
    """`text` after its last `</think>`; empty if a `<think>` after that is still open."""
    text = text.rpartition(ANSWERED)[2]
    return "" if THOUGHT in text else text


def boxes(text: str) -> list[str]:
    """The stripped contents of the outermost boxes: `\\boxed{42}`, `\\fbox{42}`, `\\boxed {42}`, `\\boxed 9`.

    A box that is not balanced counts as an empty one.
    """
    return [content for content, _, _ in _boxes(text)]


def unboxed(text: str) -> str:
    """`text` from its first box on, its boxes replaced by their contents: `so \\boxed{1} and \\boxed{2}` is `1; 2`."""
    out, place = [], None
    for content, start, end in _boxes(text):
        if place is not None:
            between = text[place:start]
            joins = not re.search(r"\d", between) and re.search(r"\b(?:and|or)\b|^[^A-Za-z]*$", between)
            out.append("; " if joins else between)
        open_box = not content and not text[start:end].endswith("}")  # it never closes: the rest of the text is in it
        out.append(text[start:end].partition("{")[2] if open_box else content)
        place = end
    return text if place is None else "".join(out) + text[place:]


def _boxes(text: str) -> Iterator[tuple[str, int, int]]:
    """(content, start, end) of each outermost box."""
    place = 0
    while box := _BOX.search(text, place):
        place = box.end()
        if text[place : place + 1] == "{":
            end = closing(text, place)
            content = "" if end is None else text[place + 1 : end].strip()
            place = len(text) if end is None else end + 1
        else:  # TeX takes a single token without braces
            token = _TOKEN.match(text, place)
            content, place = (token[0], token.end()) if token else ("", place)
        yield content, box.start(), place


def closing(text: str, start: int) -> int | None:
    """The place of the brace that closes the one at `start`; None if none does."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return None


def last_boxed(text: str) -> str | None:
    """The content of the last box; None if there is none, or it is empty or not balanced."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))  # so that a text of a thousand boxes is cheap
    found = boxes(text[start:]) if start >= 0 else []
    return found[-1] or None if found else None


def _boxed(text: str) -> str | None:
    """The last box, unless so many different ones are there that the model cannot have meant one of them."""
    last = last_boxed(text)
    several = text.count("\\boxed") + text.count("\\fbox") >= BOXES
    if last and several and len({"".join(box.split()) for box in boxes(text)}) >= BOXES:
        return None
    return last


def _hashes(text: str) -> str | None:
    """What follows the last `####` on its line: its leading number if a sentence follows, else all of it."""
    line = _last(_HASHES.findall(text))
    number = _FIRST_NUMBER.match(line) if line else None
    return number[1] if number else line


def _answer_is(text: str) -> str | None:
    """What follows the last "answer is", "answer:" on its line, up to the end of the sentence."""
    line = _last(_ANSWER_IS.findall(text))
    return (_SENTENCE_END.sub("", line).strip() or None) if line else None


def last_code(text: str) -> str | None:
    """The last fenced block that says it is Python, else the last that says nothing; None if there is none."""
    blocks = [(language.lower(), textwrap.dedent(code)) for language, code in _FENCED.findall(text)]
    named = [code for language, code in blocks if language in ("python", "python3", "py")]
    return _last(named or [code for language, code in blocks if not language])


def _last(found: list[str]) -> str | None:
    return found[-1].strip() or None if found else None


NAMED = {"boxed": _boxed, "hashes": _hashes, "answer_is": _answer_is, "code": last_code}
