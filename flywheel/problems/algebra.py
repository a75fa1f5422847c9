"""The comparisons that take algebra, by math-verify and sympy. Any of them may hang or crash: call them in a worker."""

from __future__ import annotations

import logging
import re

from flywheel.problems.quantity import measured

MARKS = re.compile(r"\$|\\boxed|\\\(|\\\[")  # of mathematics within a text


def algebra(a: str, b: str) -> bool:
    """Whether two tidy expressions are equal. No time limit here: its own uses signals, which C loops do not notice."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    (a, unit), (b, other) = measured(a), measured(b)
    if unit and other and unit != other:
        return False
    if "°" in (unit, other) and unit != other and "\\pi" in a + b:
        a, b = (f"({text})*\\frac{{\\pi}}{{180}}" if u == "°" else text for text, u in ((a, unit), (b, other)))
    found = []
    for text in (a, b):
        latex = text.replace("*", "\\cdot ").replace(";", ",").replace("%", "\\%").replace("°", "^\\circ ")
        found.append(parse(f"${latex}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=None))
    if not all(found) or not verify(*found, timeout_seconds=None):
        return False
    return not _differ(found[0][0], found[1][0])


def solution(gold: str, answer: str) -> bool:
    """math-verify's verdict on whole solutions, in which it looks for the answer."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    found = [parse(text if MARKS.search(text) else f"${text}$", parsing_timeout=None) for text in (gold, answer)]
    return verify(*found, timeout_seconds=None)


def _differ(x: object, y: object) -> bool:
    """Whether two expressions differ in value. math-verify compares 15 places, so to it 2**-99 is 2**-98."""
    from sympy import Expr, Rational

    if not (isinstance(x, Expr) and isinstance(y, Expr)):
        return False
    symbols = sorted(x.free_symbols | y.free_symbols, key=str)
    point = {symbol: Rational(17 + 6 * i, 13) for i, symbol in enumerate(symbols)}
    left, right = (expression.subs(point).evalf(30) for expression in (x, y))
    if not (left.is_number and right.is_number and left.is_finite and right.is_finite):
        return False
    return bool(abs(left - right) > 1e-5 * max(abs(left), abs(right)))
