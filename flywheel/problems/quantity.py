"""Numbers with units: what a tidy text (`notation.py`) is worth, exactly, and what it is measured in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

# One unit a line: its canonical name, then its other names. A plural s is dropped before the table is asked.
_TABLE = """
m meter metre
km kilometer kilometre
cm centimeter centimetre
mm millimeter millimetre
in inch inche
ft foot feet
yd yard
mi mile
g gram
kg kilogram kilo
mg milligram
lb pound £ gbp
oz ounce
l L liter litre
ml mL milliliter millilitre
s sec second
min minute
h hr hour
mph
N newton
J joule
W watt
V volt
K kelvin
C celsius
F fahrenheit
dollar usd buck
cent ¢
€ euro eur
¥ yen
₹ rupee
% percent
° degree
"""
UNITS = {name: row.split()[0] for row in _TABLE.strip().splitlines() for name in row.split()}
KNOWN = set(UNITS.values())
SIZES = KNOWN - {"dollar", "cent", "€", "¥", "₹", "%", "°"} | {"base"}  # whose change is a change of the answer
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
MAX_DIGITS = 1000  # a longer number is compared as text (Python converts at most 4300 digits)
PLACES, DIGITS = Fraction(1, 2 * 10**6), Fraction(1, 10**5)  # how far apart equal decimals may be, and relatively
WORDS = 6  # a longer unit is a sentence
# Words that change a number, or say that it is none
_NO_UNIT = """
or and not no to of plus minus times over mod choose squared cubed root power is are was half
least most than maybe but wrong factorial sin cos tan log ln
"""
NO_UNIT = set(_NO_UNIT.split())

_CURRENCY = re.compile(r"([+-]?)(?:US|A|C)?([€£¥₹]) ?(.+)")
_WORD = re.compile(r"([^\W\d_]+)(\^-?\d)?")
_PLAIN_UNIT = re.compile(r"(.*[\d})!.]) +([^\W\d_].*)|(.*[\d})])([A-Za-z]{2,}.*)")
_PLAIN = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|\d+|(?=\.\d))(?:\.\d*)?"
_POWER = r"10\^(-?\d|\{[+-]?\d{1,3}\})"
_NUMBER = re.compile(rf"([+-]?)(?:({_PLAIN})(?:\*{_POWER})?|{_POWER})")
_FRACTION = re.compile(rf"([+-]?)(?:(\d+) ?)??(?:\\frac\{{([+-]?{_PLAIN})\}}\{{({_PLAIN})\}}|({_PLAIN})/({_PLAIN}))")
_BASED = re.compile(r"(-?[0-9A-F]+)_(\d|\{\d+\})")
_SIGN = re.compile(r"(.*[^\\ ]) ?([%°€£¥₹¢])")


@dataclass(frozen=True)
class Quantity:
    value: Fraction
    place: Fraction  # what 1 in the last decimal is worth, for a number with a decimal point; else 0
    unit: str  # canonical; empty if there is none

    def hundredth(self) -> Quantity:
        return Quantity(self.value / 100, self.place / 100, "")


def close(x: Quantity, y: Quantity) -> bool:
    """Whether two numbers are equal, exactly or as far as decimals go.

    A decimal equals a number at 6 places and 5 significant digits, and a fraction that it rounds to at least 5 digits.
    """
    apart, size = abs(x.value - y.value), max(abs(x.value), abs(y.value))
    if apart == 0 or not (x.place or y.place):
        return apart == 0
    rounded = x.place or y.place if not (x.place and y.place) else 0
    return apart <= min(PLACES, DIGITS * size) or (2 * apart <= rounded and size >= rounded / DIGITS / 10)


def quantity(text: str) -> Quantity | None:
    """The number that a tidy text is, with its unit."""
    body, unit = measured(text)
    based = _BASED.fullmatch(body)
    if based and not unit:
        body, unit = based[1], "base " + based[2].strip("{}")
    first, _, rest = unit.partition(" ")
    scale, unit = (SCALES[first], rest) if first in SCALES else (1, unit)
    if len(body) > MAX_DIGITS:
        return None
    if found := _NUMBER.fullmatch(body):
        sign, plain, *powers = found.groups()
        power = int(next((p for p in powers if p), "0").strip("{}"))
        value = _plain(plain or "1") * Fraction(10) ** power
        place = scale * Fraction(10) ** (power - len(body.partition("*")[0].partition(".")[2])) if "." in body else 0
    elif found := _FRACTION.fullmatch(body):
        sign, whole, *parts = found.groups()
        top, bottom = [_plain(part) for part in parts if part]
        if bottom == 0 or (whole and top < 0):
            return None
        value, place = int(whole or 0) + top / bottom, 0
    else:
        return None
    return Quantity(scale * (-value if sign == "-" else value), Fraction(place), unit)


def _plain(number: str) -> Fraction:
    return Fraction(number.replace(",", "").replace(" ", "").removesuffix("."))


def measured(text: str) -> tuple[str, str]:
    """(a tidy text without its unit, the canonical unit), the unit empty if there is none.

    A unit is a currency sign, `%`, `°`, `\\text{...}` at the end, words after a space, or a known unit of at least two
    letters (`5km`). A letter right after a number is a variable: `2m`.
    """
    if found := _CURRENCY.fullmatch(text):
        return found[1] + found[3], UNITS[found[2]]
    if found := _SIGN.fullmatch(text):
        return found[1], UNITS[found[2]]
    body, tab, unit = re.sub(r"\\text\{([^{}]*)\}", "\t\\1", text).partition("\t")
    if tab and body.strip():
        unit = canonical(unit.replace("\t", " "))
        return (body.strip(), unit) if unit is not None else (text, "")
    found = _PLAIN_UNIT.fullmatch(text)
    if not found:
        return text, ""
    body, words = (found[1], found[2]) if found[1] else (found[3], found[4])
    unit = canonical(words)
    known = unit is not None and all(part.rstrip("^0123456789-") in KNOWN for part in re.split("[ /*]", unit))
    word = re.match(r"[A-Za-z]{4}" if found[3] else r".*[A-Za-z]{3}", words)  # else it may be variables: 2ab, 10 x
    return (body, unit) if unit is not None and (known or word) else (text, "")


def canonical(unit: str) -> str | None:
    """The unit in one spelling (`square feet` and `sq. ft` are `ft^2`); None if the words are no unit.

    Units without a size (`units`, `square units`) are one.
    """
    power, parts, glue, place = "", [], "", 0
    unit = re.sub(r" *\bper\b *", "/", re.sub(r" *([/*]) *", r"\1", " ".join(unit.replace(".", "").split())))
    while place < len(unit):
        found = _WORD.match(unit, place)
        if not found or len(parts) == WORDS or found[1].lower() in NO_UNIT:
            return None
        place = found.end()
        word = found[1].lower() if len(found[1]) > 2 else found[1]
        if word in ("square", "sq", "cubic", "cu"):
            power = "^2" if word.startswith("s") else "^3"
        else:
            singular = word if word in UNITS or len(word) < 3 else word.removesuffix("s")
            parts.append(glue + UNITS.get(singular, singular) + (found[2] or power) * (singular != "unit"))
            power = ""
        glue = unit[place : place + 1]
        if glue and glue not in " /*-":
            return None
        place += bool(glue)
    return "".join(parts).strip()
