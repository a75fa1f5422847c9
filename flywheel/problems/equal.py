"""The rules by which an answer equals the gold answer. `equal` and `decide` try them in this order:

- exact: the same text once both are tidy (`notation.py`), whatever their spaces;
- words: words equal words whatever their case, and never products of letters; `A`, `(A)` and `A) 12` are one choice;
- list: lists and sets compare as multisets, points and intervals in order with their brackets. A list equals no number;
- number: integers and fractions exactly, decimals to 6 places and 5 significant digits. A unit, a currency, a base or
  a percent sign may be missing on one side; where both name one, it must be the same. 40% equals 40 and 0.4;
- math-verify: everything else that can be an expression, in one piece: nothing is searched for in a bare text. What it
  takes for equal must also agree in value at 5 significant digits.

A text of whole sentences with mathematics in dollars or boxes is a solution, no answer: math-verify looks for its
answer. A longer text, or other words around a number, equals no number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain

from flywheel.problems.algebra import MARKS, algebra, solution
from flywheel.problems.notation import flat, tidy, unwrap
from flywheel.problems.parts import both_signs, closes, interval, name_of, named, split
from flywheel.problems.quantity import SIZES, close, measured, quantity

MAX_CHARS = 20_000  # a longer answer is wrong unless it equals the gold text
HEAD = 5000  # how far the kind of a long text is looked for
MAX_ITEMS = 100  # a longer list is compared as text

Same = Callable[[str, str], bool]  # of two tidy texts; `decide` passes one that raises _Hard

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_INTEGER = re.compile(r"\$?(-?(?:\d{1,15}|[1-9]\d{0,2}(?:,\d{3}){1,4}))\.?\$?")
_DECIMAL_COMMA = re.compile(r"-?\d+,(?!\d{3}$)\d\d+")  # not 1,234, which is a thousand and more
_MATHS = re.compile(r"\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+(?:\{[^{}]*\})?", re.S)
# What may stand before an answer: "The answer is", "x is 3, which is", "Thus it is". What hedges (8 or 9?) is none
_LEAD = re.compile(
    r"(?:(?!.*(?:\bor\b|\?)).*\b(?:which is|it's)|.*\b(?:therefore|thus|hence)\b[A-Za-z',;: ]*\b(?:is|are|equals?)"
    r"|[A-Za-z',:* ]*\b(?:is|are|equals?|that|answer|solution)|[A-Za-z',* ]*[A-Za-z]{3}(?=:))\b[*: ]*(?=\S)",
    re.I,
)
# What an expression without variables is made of; e and i are numbers
_ARITHMETIC = re.compile(
    r"(?:\\(?:frac|sqrt|pi|sin|cos|tan|sec|csc|cot|log|ln|binom|[lr]floor|[lr]ceil|infty|arc(?:sin|cos|tan))(?![A-Za-z])"
    r"|[\d.,+\-*/^(){}\[\]!|%°ei ])++"
)
_TOWER = re.compile(r"\^[{(]*\d+\^|\^[{(]*-?\d{5,}|(?<!\d)\d{5,}+\)?!|!!")  # what would take sympy minutes
_FUNCTIONS = {"sin", "cos", "tan", "log", "ln", "exp", "lim", "max", "min", "mod"}
_CHOICE = re.compile(r"(?:\(([A-Z])\)|([A-Z])(?=$|[).:]))(?!.*\([A-Z]\))[).:]?(.*)")


class _Hard(Exception):
    """A comparison that takes algebra."""


def _hard(a: str, b: str) -> bool:
    raise _Hard


def equal(gold: str, answer: str) -> tuple[bool, str]:
    """(whether `answer` equals `gold`, the rule that says so). May take long or crash: call it in a worker."""
    return _judge(gold, answer, algebra, solution)


def decide(gold: str, answer: str) -> tuple[bool, str] | None:
    """What `equal` returns if that takes no algebra, else None. Fast and safe on any text."""
    try:
        return _judge(gold, answer, _hard, _hard)
    except _Hard:
        return None


def rule_of(gold: str, answer: str) -> str:
    """The rule by which a pair falls that takes algebra: `list` if its items do, else `math-verify`."""
    a, b = _bare(tidy(gold), tidy(answer))
    return "list" if not _sentences(gold + answer) and _items(a) and _items(b) else "math-verify"


def key(answer: str) -> str:
    """A normal form: answers with the same key are one in a vote. Knows no gold answer and no algebra.

    It is `decide` as far as a normal form can be: a measured unit (`5 km`, not `5 eggs`), a name (`x=5`) and rounding
    (0.333333 and 1/3) keep answers apart that the rules take for equal.
    """
    text = tidy(answer)
    if found := _items(text):
        brackets, items = found
        keys = [key(item) for item in items]
        return f"{brackets[0]}{','.join(keys if brackets != '{}' else sorted(keys))}{brackets[1]}"
    if number := quantity(text):
        return f"{number.value}{number.unit if re.split('[ ^/*-]', number.unit)[0] in SIZES else ''}"
    if letter := _choice(text):
        return letter[0] if not letter[1] else flat(text)
    return flat(text).casefold() if _words(text) else flat(text)


# ---- the rules ----


def _judge(gold: str, answer: str, same: Same, same_solution: Same) -> tuple[bool, str]:
    if len(answer) > max(MAX_CHARS, 10 * len(gold)):
        return False, "exact"  # before `tidy`, which takes a second for a million characters
    if gold.strip() == answer.strip():
        return bool(gold.strip()), "exact"
    if len(answer) > MAX_CHARS or _CONTROL.search(answer):
        return False, "exact"  # math-verify drops control characters, so it would read "4\x002" as 42
    integers = [found[1] for text in (gold, answer) if (found := _INTEGER.fullmatch(text.strip()))]
    if len(integers) == 2:  # most pairs of word problems: twenty times faster than what follows
        ours, theirs = (int(text.replace(",", "")) for text in integers)
        return ours == theirs, "exact" if integers[0] == integers[1] else "number"
    a, b = tidy(gold), tidy(answer)
    if flat(a) == flat(b):
        return bool(a), "exact"
    if _sentences(gold) or _sentences(answer):
        return same_solution(gold, answer), "math-verify"
    led = _LEAD.match(b)
    return _compare(a, unwrap(b[led.end() :]) if led else b, same)


def _compare(a: str, b: str, same: Same) -> tuple[bool, str]:
    """(verdict, rule) on two tidy texts."""
    a, b = _bare(a, b)
    if flat(a) == flat(b):
        return bool(a), "exact"
    for name, rule in (("words", _by_words), ("list", _by_items), ("number", _by_number)):
        verdict = rule(a, b, same)
        if verdict is not None:
            return verdict, name
    return _possible(a, b) and same(a, b), "math-verify"


def _by_words(a: str, b: str, same: Same) -> bool | None:
    first, second = _choice(a), _choice(b)
    if first and second and not (first[1] and second[1]):  # at least one is a letter alone
        return first[0] == second[0]
    if len(a) == len(b) == 1 and a.isalpha() and b.isalpha():
        return a == b
    if _words(a) and _words(b):
        return flat(a).casefold() == flat(b).casefold()
    return False if _words(a) or _words(b) else None


def _by_items(a: str, b: str, same: Same) -> bool | None:
    decimals = [text.replace(",", ".") for text in (a, b) if _DECIMAL_COMMA.fullmatch(text)]
    if len(decimals) == 1 and decimals[0] in (a, b):
        return True  # 1,22 and 1.22: a decimal comma
    first, second = _items(a), _items(b)
    if not first and not second:
        return None
    first, second = first or _items(a, whole=True), second or _items(b, whole=True)
    (kind, ours), (other, theirs) = first, second
    if len(ours) != len(theirs) or len(ours) > MAX_ITEMS:
        return False
    if kind == other == "{}":
        rest = list(theirs)
        for item in ours:
            found = next((i for i, their in enumerate(rest) if _compare(item, their, same)[0]), None)
            if found is None:
                return False
            del rest[found]
        return True
    brackets = {kind, other}
    if len(brackets) == 2 and brackets != {"()", "{}"}:
        return False  # (1, 2] is not [1, 2); the point (1, 2) may be written 1, 2
    return all(_compare(item, their, same)[0] for item, their in zip(ours, theirs))


def _by_number(a: str, b: str, same: Same) -> bool | None:
    if ":" in a + b and ("/" in a + b or "\\frac" in a + b):
        a, b = a.replace(":", "/"), b.replace(":", "/")  # 1:3 is 1/3, but not 3:1 is 3
    first, second = quantity(a), quantity(b)
    if first and second:
        if first.unit and second.unit and first.unit != second.unit:
            return False
        if close(first, second):
            return True
        percent = "%" in (first.unit, second.unit) and first.unit != second.unit
        return percent and close(*(q.hundredth() if q.unit == "%" else q for q in (first, second)))
    if first or second:
        other = measured(b if first else a)[0]
        return None if _ARITHMETIC.fullmatch(other) and not _TOWER.search(other) else False
    return None


def _possible(a: str, b: str) -> bool:
    """Whether `b` may be an expression equal to `a`: what a look at its length and characters can tell."""
    if len(b) > 20 * len(a) + 200 or (_TOWER.search(b) and not _TOWER.search(a)) or "?" in b:
        return False
    if (
        (name := name_of(a))
        and (other := name_of(b))
        and name != other
        and not re.search("[A-Za-z]", a[len(name) :] + b[len(other) :])
    ):
        return False  # x=2, y=2
    bare = re.sub(r"\\[A-Za-z]+(?:\{[A-Za-z ]*\})?", " ", b)
    return len(re.findall(r"[A-Za-z]{3,}", bare)) < 3


# ---- what a tidy text is ----


def _words(text: str) -> bool:
    """Whether `text` is words: at least one of two letters that is no function and no product of variables (`xy`)."""
    text = flat(text)
    if not re.fullmatch(r"[^\W\d_][\w' .&-]*", text) or "_" in text or not re.search(r"[^\W\d_]{2}", text):
        return False
    if re.fullmatch(r"[b-df-hj-np-tv-z]{2,3}", text) or ("-" in text and not re.search(r"[A-Za-z]{3}", text)):
        return False
    return not _FUNCTIONS & set(text.split())


def _choice(text: str) -> tuple[str, str] | None:
    """The letter of a multiple choice and what follows it: `A`, `(A)`, `A) 12`."""
    found = _CHOICE.fullmatch(flat(text))
    return (found[1] or found[2], found[3]) if found else None


def _items(text: str, whole: bool = False) -> tuple[str, list[str]] | None:
    """(brackets, items) of a list (`{}`, as a set), point or interval; None if `text` is none of these.

    whole: a text that is none is a list of one, and a number with commas a list.
    """
    inner, brackets = text, "{}"
    if text.startswith("\\{") and text.endswith("\\}") and "\\{" not in text[2:]:
        inner = text[2:-2]
        items = split(inner, grouped=True)
    elif text[:1] in ("(", "[") and closes(text) == len(text) - 1 and len(items := split(text[1:-1], ";" in text)) > 1:
        return text[0] + text[-1], items
    elif not whole and quantity(text):
        return None
    else:
        items = split(inner, grouped=not (whole and quantity(text)))
    groups = [split(group, grouped=True) for group in inner.split(";")] if "=" in inner else []
    if len(groups) > 1 and all(len(group) > 1 and all(map(name_of, group)) for group in groups):
        items = [f"({';'.join(map(named, group))})" for group in groups]  # p=5,q=2;p=7,q=2
    items = list(chain.from_iterable(both_signs(item) for item in items))
    if len(items) > 1 and all(item.startswith("(") for item in items):
        items = list({key(item): item for item in items}.values())  # a point named twice is one point
    return (brackets, items) if len(items) > 1 or whole or inner != text else None


def _bare(a: str, b: str) -> tuple[str, str]:
    """Both without what only one of them says, or both say alike: `x=`, `x\\in`; an inequality as an interval."""
    names = [name_of(text) for text in (a, b)]
    if all(names) and names[0] == names[1]:
        return named(a), named(b)
    out = []
    for text, other in ((a, b), (b, a)):
        if "=" not in other and "\\approx" not in other and not _items(text):
            text = named(text)
        if "\\in" not in other.replace("\\inf", ""):
            text = re.sub(r"^[A-Za-z]\\in(?![A-Za-z]) ?", "", text)
        if not re.search(r"[<>]|\\[lg]e(?![A-Za-z])", other):
            text = interval(text)
        out.append(text)
    return out[0], out[1]


def _sentences(text: str) -> bool:
    """Whether `text` is a solution rather than an answer: mathematics within at least four words."""
    return bool(MARKS.search(text)) and len(re.findall(r"[A-Za-z]{2,}", _MATHS.sub(" ", text[:HEAD]))) >= 4
