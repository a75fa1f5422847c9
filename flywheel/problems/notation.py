"""One spelling for what a mathematician reads as the same: the step before any comparison of answers.

`tidy` changes notation only (fonts, spaces, signs, delimiters, the ways to write a fraction), never a value.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from flywheel.problems.extract import closing, unboxed

# Unicode that NFKC would change in meaning (x² to x2) or leave: what it is in LaTeX
SIGNS = {
    **dict.fromkeys("−–—‐‑", "-"),
    "×": "\\times ",
    "·": "\\cdot ",
    "⋅": "\\cdot ",
    "÷": "/",
    "⁄": "/",
    "≤": "\\le ",
    "≥": "\\ge ",
    "≠": "\\ne ",
    "≈": "\\approx ",
    "±": "\\pm ",
    "∞": "\\infty ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∈": "\\in ",
    "ℝ": "(-\\infty,\\infty)",
    "π": "\\pi ",
    "θ": "\\theta ",
    "º": "°",
    "，": ", ",
    "；": "; ",
    "\u200b": "",
    "\u2061": "",
}
# (pattern, replacement), in this order. Each line is one habit of models or of LaTeX.
HABITS = [
    (r"\\\\(?=[A-Za-z])", r"\\"),  # a backslash escaped twice; `tidy` leaves it out where rows end in two
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|!)(?![A-Za-z])\s*", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:mbox|textbf|textit|textrm|textnormal|mathrm|operatorname)\s*\{", r"\\text{"),
    (r"\{\s*,\s*\}", ","),  # 115{,}000
    (r"(?<=\d)(?:\\[,;: ]|~)(?=\d{3}(?!\d))", ""),  # 10\,000
    (r"(?<!\\)\\[,;: ]|~|\\q?quad", " "),
    (r"\\[()\[\]]|\\?\$", ""),  # math delimiters, and the dollar, which no delimiter tells apart
    (r"<=|\\leq(?:slant)?(?![A-Za-z])", r"\\le "),
    (r">=|\\geq(?:slant)?(?![A-Za-z])", r"\\ge "),
    (r"!=|\\neq(?![A-Za-z])", r"\\ne "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\mathbb\s*\{?R\}?", r"(-\\infty,\\infty)"),
    (r"\^\s*\{\s*\\circ\s*\}|\^?\s*\\circ(?![A-Za-z])|\\degrees?(?![A-Za-z])", "°"),
    (r"(?<=[\d}])\s*(?:degrees?\b|\\text\{\s*degrees?\s*\})", "°"),
    (r"\\%|(?<=[\d}])\s*(?:(?:percent(?:age)?|pct)\b|\\text\{\s*percent\s*\})", "%"),
    (r"\*\*(?=[^*]+\*\*$)|(?<=[^*])\*\*$|^\*\*", ""),  # **73**
    (r"\*\*", "^"),
    (r"√\s*\(([^()]*)\)|(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1\2}"),
    (r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}"),
    (r"(?<![A-Za-z\\])(pi|infty|alpha|theta)(?![A-Za-z])", r"\\\1 "),
    (r"(?<![A-Za-z\\])(?:infinity|inf)(?![A-Za-z])", r"\\infty "),
    (r"(\d)\s*[eE]([+-]?\d{1,3})(?![\d.])", r"\1\\times 10^{\2}"),  # 3e8
    (r"\\times(?![A-Za-z])|\\cdot(?![A-Za-z])", "*"),
]
_HABITS = [(re.compile(pattern), new) for pattern, new in HABITS]
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_WRAPPERS = ("\\text", "")  # the last: plain braces
DEPTH = 20  # fractions and wrappers nested more deeply stay as they are written
_ARGUMENTS = {"\\frac": 2, "\\sqrt": 1}
_COMMAND = re.compile(r"\\frac(?![A-Za-z])|\\sqrt(?![A-Za-z])")
_ARGUMENT = re.compile(r"\\[A-Za-z]+|.", re.S)


@lru_cache(maxsize=4096)  # a gold answer meets many answers, and an answer many keys
def tidy(text: str) -> str:
    """`text` in one spelling and on one line, without what encloses it: dollars, boxes, `\\text{}`, a final stop.

    Special tokens (`<|...|>`) end it. `m²` after a number is a unit, while `m^2` may be a variable's square.
    A comma or semicolon with a space after it becomes `; `, so that `1, 200` (two numbers) stays apart from `1,200`.
    """
    text = re.sub(r"(?<=\d) ?([kcmd]?m|ft|in)([²³])", r"\\text{\1}\2", text.partition("<|")[0])
    text = _RAISED.sub(lambda found: "^{" + unicodedata.normalize("NFKC", found[0]) + "}", text)
    text = _LOWERED.sub(lambda found: "_{" + unicodedata.normalize("NFKC", found[0]) + "}", text)
    text = _VULGAR.sub(_vulgar, unboxed(text))
    text = unicodedata.normalize("NFKC", "".join(SIGNS.get(c, c) for c in text)).replace("\u2212", "-")
    rows = "\\begin" in text  # a matrix or array, whose rows end in two backslashes
    for pattern, new in _HABITS[rows:]:
        text = pattern.sub(new, text)
    text = unwrap(" ".join(text.split()))
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", _braced(text))
    text = re.sub(r"[,;] +", "; ", text)
    return re.sub(r"(?<!;) *([^\w\s;\\]) *| *(?=[;\\])", r"\1", text).strip()


def unwrap(text: str) -> str:
    """`text` without a final full stop and without the wrappers (`\\text{}`, braces) around all of it."""
    for _ in range(DEPTH):
        before = text
        text = text.strip()
        if text.endswith(".") and not text.endswith("..."):
            text = text[:-1].rstrip()
        for wrapper in _WRAPPERS:
            opening = len(wrapper) + text[len(wrapper) :].find("{") if text.startswith(wrapper) else -1
            if opening >= 0 and not text[len(wrapper) : opening].strip() and closing(text, opening) == len(text) - 1:
                text = text[opening + 1 : -1]
                break
        if text == before:
            break
    return text


def flat(text: str) -> str:
    """A tidy text without `\\text{}` and without the spaces that separate no two digits and no two letters."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip()
    return re.sub(
        r"(?<=\d)\s+(?=\d)|(?<=[^\W\d])\s+(?=[^\W\d])|\s+", lambda found: " " if _between(found) else "", text
    )


def _between(found: re.Match) -> bool:
    """Whether the spaces separate two digits, or two letters."""
    left, right = found.string[found.start() - 1 : found.start()], found.string[found.end() : found.end() + 1]
    return (left.isdigit() and right.isdigit()) or (left.isalpha() and right.isalpha())


def _vulgar(found: re.Match) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", found[0]).partition("⁄")
    return f"\\frac{{{top}}}{{{bottom}}}"


def _braced(text: str, depth: int = 0) -> str:
    """Braces around each argument of \\frac and \\sqrt, which TeX leaves out around a single token."""
    if depth > DEPTH:
        return text
    out, place = [], 0
    while found := _COMMAND.search(text, place):
        out.append(text[place : found.start()] + found[0])
        place = found.end()
        for _ in range(_ARGUMENTS[found[0]]):
            place += len(text[place:]) - len(text[place:].lstrip())
            end = None
            if text[place : place + 1] == "[" and found[0] == "\\sqrt":  # the degree of a root
                index = text.find("]", place) + 1 or place
                out.append(text[place:index])
                place = index
            if text[place : place + 1] == "{":
                end = closing(text, place)
                inner, place = (text[place + 1 :], len(text)) if end is None else (text[place + 1 : end], end + 1)
            elif token := _ARGUMENT.match(text, place):
                inner, place = token[0], token.end()
            else:
                inner = ""
            out.append("{" + (_braced(inner, depth + 1) if "\\" in inner else inner).strip() + "}")
    return "".join(out) + text[place:]
