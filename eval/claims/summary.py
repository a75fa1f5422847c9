"""One row a claim of the paper: what it says, what the detailed rows came to, a verdict in a few words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eval.claims.figures import Figures
from eval.claims.results import Claim
from eval.claims.rows import DATA

ASIDE = ("not charged in the paper", "not said")  # `paper` of rows that go beyond a claim: they do not decide it
FEW = 9  # kinds of rows that one cell can name


@dataclass(frozen=True)
class Summary:
    """One claim; see claims.yaml."""

    number: str
    claim: str
    paper: str
    rows: str = ""
    flaw: str = ""

    def of(self, claims: Sequence[Claim]) -> list[Claim]:
        """The detailed rows that decide it."""
        pattern = self.rows or rf"{re.escape(self.number)}\."
        return [c for c in claims if re.match(pattern, c.id) and c.paper not in ASIDE]


def summaries() -> list[Summary]:
    return [Summary(**row) for row in DATA["claims"]]


def ours(found: Sequence[Claim]) -> str:
    """The figures of the detailed rows; of many, how far they reach."""
    if not found:
        return "not measured"
    groups: dict[str, list[str]] = {}
    for c in found:
        name, _, budget = re.sub(r"^[\w+]+\.", "", c.id).partition("@")
        groups.setdefault(name, []).append(f"{c.ours:+.3f}" + (f" at {budget}" if budget else ""))
    if len(groups) > FEW:
        return f"{min(c.ours for c in found):+.3f} to {max(c.ours for c in found):+.3f} ({len(found)} rows)"
    return "; ".join(f"{name} {', '.join(values)}" for name, values in groups.items())


def counted(found: Sequence[Claim]) -> str:
    """`holds` if all rows do, else how many of each verdict."""
    counts = Counter(c.verdict for c in found)
    if len(counts) == 1:
        return found[0].verdict
    return "mixed: " + ", ".join(f"{counts[v]} {v}" for v in ("holds", "undecided", "fails") if counts[v])


def verdict(summary: Summary, found: Sequence[Claim]) -> str:
    """A verdict only from rows without a flaw that speak of several runs."""
    several = [c for c in found if len(c.runs) > 1]
    alone = len(found) - len(several)
    if not found:
        return "no verdict"
    if summary.flaw:
        return f"no verdict: {summary.flaw}"
    if not several:
        return "one run, no verdict"
    return f"**{counted(several)}**" + (f"; {alone} rows of one run, no verdict" if alone else "")


def routed(figures: Figures) -> tuple[str, str]:
    """Claim 16 has no row, but a table of one run: (ours, verdict)."""
    rows = figures.get("routing") or []
    if not rows:
        return "not measured", "no verdict"
    easy, hard = (two([added(row)[bin] for row in rows], "+") for bin in (0, -1))
    return (
        f"by round, search adds {easy} in bin 1, {hard} in bin {len(rows[0]['single'])}",
        "one run, no interval, no verdict",
    )


def added(row: dict) -> list[float | None]:
    """What search adds to single samples in each fixed bin; None for an empty one."""
    return [None if None in (a, b) else b - a for a, b in zip(row["single"], row["searched"])]


def two(values: Iterable[float | None], sign: str = "") -> str:
    """Two decimals each."""
    return " ".join("-" if value is None else f"{value:{sign}.2f}" for value in values)


def lines(claims: Sequence[Claim], figures: Figures) -> list[str]:
    """The head of CLAIMS.md as Markdown: the paper's claims, then what goes beyond it."""
    head = ["| | claim | the paper (section) | ours | verdict |", "|---|---|---|---|---|"]
    out, beyond = list(head), ["", "Beyond the paper:", "", *head]
    for summary in summaries():
        found = summary.of(claims)
        figure, decided = routed(figures) if summary.number == "16" else (ours(found), verdict(summary, found))
        row = f"| {summary.number} | {summary.claim} | {summary.paper} | {figure} | {decided} |"
        (out if summary.number.isdigit() else beyond).append(row)
    return out + beyond
