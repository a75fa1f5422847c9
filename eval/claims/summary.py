"""One row per claim of the paper: the claim, a summary of its detailed rows, a short verdict."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eval.claims.figures import Figures
from eval.claims.results import Claim
from eval.claims.rows import DATA

ASIDE = ("not charged in the paper", "not said")  # rows with such a `paper` go beyond the claim and do not decide it
FEW = 9  # the most groups of rows that are listed in one cell


@dataclass(frozen=True)
class Summary:
    """One claim of claims.yaml."""

    number: str
    claim: str
    paper: str
    rows: str = ""
    flaw: str = ""

    def of(self, claims: Sequence[Claim]) -> list[Claim]:
        """The detailed rows that decide the claim, those with a flaw aside."""
        pattern = self.rows or rf"{re.escape(self.number)}\."
        return [c for c in claims if re.match(pattern, c.id) and c.paper not in ASIDE and not flaw(c)]


def flaw(claim: Claim) -> str:
    """Why this detailed row gives no verdict; empty if it does."""
    return DATA["rows"].get(claim.id, {}).get("flaw", "")


def summaries() -> list[Summary]:
    return [Summary(**row) for row in DATA["claims"]]


def ours(found: Sequence[Claim]) -> str:
    """The figures of the detailed rows; their range if there are more than FEW groups."""
    if not found:
        return "not measured"
    groups: dict[str, list[str]] = {}
    for c in found:
        name, _, budget = re.sub(r"^[\w+]+\.", "", c.id).partition("@")
        groups.setdefault(name, []).append(f"{c.ours:+.3f}" + (f" at {budget}" if budget else ""))
    if len(groups) > FEW:
        return f"{min(c.ours for c in found):+.3f} to {max(c.ours for c in found):+.3f} ({len(found)} rows)"
    return "; ".join(f"{name} {', '.join(values)}" for name, values in groups.items())


VERDICTS = ("holds", "no difference", "undecided", "fails")


def counted(found: Sequence[Claim]) -> str:
    """The verdict if all rows agree, else the number of rows with each verdict."""
    counts = Counter(c.verdict for c in found)
    if len(counts) == 1:
        return found[0].verdict
    return "mixed: " + ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v])


def verdict(summary: Summary, found: Sequence[Claim]) -> str:
    """The verdict in words; only rows over several runs of a claim without a flaw give one."""
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
    """(ours, verdict) of claim 16, which has no rows but a table of one run."""
    rows = figures.get("routing") or []
    if not rows:
        return "not measured", "no verdict"
    easy, hard = (two([added(row)[bin] for row in rows], "+") for bin in (0, -1))
    return (
        f"by round, search adds {easy} in bin 1, {hard} in bin {len(rows[0]['single'])}",
        "one run, no interval, no verdict",
    )


def added(row: dict) -> list[float | None]:
    """Accuracy of search minus pass@1 of single samples by fixed bin; None for an empty bin."""
    return [None if None in (a, b) else b - a for a, b in zip(row["single"], row["searched"])]


def two(values: Iterable[float | None], sign: str = "") -> str:
    """The values with two decimals each, separated by spaces; `-` for None."""
    return " ".join("-" if value is None else f"{value:{sign}.2f}" for value in values)


def lines(claims: Sequence[Claim], figures: Figures) -> list[str]:
    """The Markdown lines of the summary in CLAIMS.md: the paper's claims, then claims beyond the paper."""
    head = ["| | claim | the paper (section) | ours | verdict |", "|---|---|---|---|---|"]
    out, beyond = list(head), ["", "Beyond the paper:", "", *head]
    for summary in summaries():
        found = summary.of(claims)
        figure, decided = routed(figures) if summary.number == "16" else (ours(found), verdict(summary, found))
        row = f"| {summary.number} | {summary.claim} | {summary.paper} | {figure} | {decided} |"
        (out if summary.number.isdigit() else beyond).append(row)
    return out + beyond
