"""Write CLAIMS.md from claims.json and figures.json: one row per claim, all detailed rows, the tables behind them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from eval.claims import summary
from eval.claims.figures import SERVED, Figures
from eval.claims.results import Claim
from eval.claims.summary import added, two


def markdown(claims: Sequence[Claim], figures: Sequence[Figures]) -> str:
    """The whole page. `figures`: one dict per run, as JSON values; the tables shown are of the first run."""
    first = figures[0]
    runs = ", ".join(f"`{f['run']}` on {f['questions']}" for f in figures)
    seeds = f"{len(figures)} training {'seed' if len(figures) == 1 else 'seeds'}"
    lines = [
        "# The paper's claims, measured",
        "",
        f"Test questions of {seeds} ({runs}), round {first['round']}; `eval/runs.yaml` says how they were made. "
        "Written by `python -m eval claims --from-results` from `claims.json` and `figures.json`.",
        "",
        "A row `holds` if its whole interval is above zero (8.lost: above 0.1; rows that allow 0.02: above -0.02;",
        "14.hardest: below 0.1; goal.tokens: below 0.25), `fails` if it is wholly on the other side, else it is",
        "`undecided`; an interval of exactly zero is `no difference`.",
        "Figures are differences in accuracy, where the row below says nothing else; what a row says stands below",
        "under its id.",
        "",
        *summary.lines(claims, first),
        "",
        "## Every row",
        "",
        *table("claim | paper | ours [95% interval] | each run | verdict", map(detailed, claims)),
        "",
        "The tables below are of the first run.",
        *tables(first),
    ]
    return "\n".join(lines) + "\n"


def table(head: str, rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table; `head`: the column names, separated by |."""
    ruler = "|---" * (head.count("|") + 1) + "|"
    return [f"| {head} |", ruler, *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def detailed(c: Claim) -> list[str]:
    runs = " ".join(f"{value:+.3f}" for value in c.runs)
    ours = f"{c.ours:+.3f} [{c.low:+.3f}, {c.high:+.3f}] {c.unit}"
    if flaw := summary.flaw(c):
        decided = f"no verdict: {flaw}"
    else:
        decided = f"**{c.verdict}**" if len(c.runs) > 1 else f"one run: {c.verdict}"
    return [f"{c.id}: {c.claim}", c.paper, ours, runs, decided]


def number(value: float | None) -> str:
    return "never" if value is None else f"{value:,.0f}"


def planned(row: dict) -> list[str]:
    needs = row["best_of_n_needs"]  # None: no number of samples that was drawn is as accurate
    served = [number(row["net_by_served"][str(count)]) for count in SERVED]
    rest = ["not reached", "-", "-", *served, "-"]
    if needs is not None:
        ratios = [f"{needs / row[paid]:.2f}" for paid in ("tokens", "net_tokens")]
        rest = [number(needs), *ratios, *served, number(row["break_even"])]
    start = [row["of"], row["budget"], row["grade"], f"{row['accuracy']:.3f}"]
    return [*start, number(row["tokens"]), number(row["net_tokens"]), *rest]


def tables(f: Figures) -> list[str]:
    lines = ["", "## Difficulty", ""]
    lines += table(
        "grade | Spearman with oracle | same bin | tokens a question | confusion (row: oracle bin)",
        (
            [
                r["grade"],
                f"{r['spearman']:.3f}",
                f"{r['same_bin']:.2f}",
                number(r["tokens"]),
                " / ".join(" ".join(map(str, row)) for row in r["confusion"]),
            ]
            for r in f["difficulty"]
        ),
    )
    lines += ["", "## Strategies at each budget", ""]
    lines += table(
        "budget | strategy | accuracy | by bin, easy to hard | tokens | of them computed | odd candidates "
        "| odd winners",
        (
            [
                r["budget"],
                r["strategy"],
                f"{r['accuracy']:.3f}",
                two(r["by_bin"]),
                number(r["tokens"]),
                number(r["computed"]),
                f"{r['odd_candidates']:.2f}",
                f"{r['odd_winners']:.2f}",
            ]
            for r in f["strategies"]
        ),
    )
    lines += ["", "## Best-of-N", ""]
    lines += table(
        " | ".join(["N", *f["best_of_n"], "tokens (weighted)"]),
        (
            [n, *(f"{curve[n]:.3f}" for curve in f["best_of_n"].values()), number(tokens)]
            for n, tokens in f["best_of_n_tokens"].items()
        ),
    )
    lines += [
        "",
        "## Compute-optimal, gross and net of difficulty",
        "",
        "Tokens a question. `needs`: what parallel samples spend for the same accuracy, if any number that was drawn",
        "reaches it: the policy's, for revisions the reviser's, for all strategies the cheaper maker's. Net of its bin",
        "for every question; calibration is shared by the questions served.",
        "`break-even`: served questions from which the plan is cheaper than best-of-N.",
        "",
    ]
    lines += table(
        "of | budget | bins | accuracy | gross | net | needs | ratio, gross | ratio, net | net at 10^2 | 10^4 | 10^6 "
        "| break-even",
        (planned(row) for row in f["compute_optimal"]),
    )
    fixed = ", ".join(f"{part} {tokens:,.0f}" for part, tokens in f["fixed"].items())
    lines += ["", "## Paid once", "", f"In tokens of inference of the same FLOPs: {fixed}."]
    if goal := f.get("goal"):
        lines += [
            "",
            f"Best-of-64 weighted's accuracy at {goal['share']:.3f} of its tokens, by "
            f"{' and '.join(goal['strategies'])} (chosen on the other half of the questions).",
        ]
    if best := f.get("best_ratio_by_bin"):
        rows = ([budget, " ".join(name.split(":")[1] for name in names)] for budget, names in best.items())
        lines += ["", "## Sequential to parallel", "", *table("budget | best ratio by oracle bin, easy to hard", rows)]
    if attempts := f.get("pass@1_by_attempt"):
        lines += ["", f"pass@1 along the longest chain: {two(attempts)}"]
    lines += ["", "## Routing and capability, by round (claim 16)", ""]
    lines += table(
        "round | single samples, by fixed bin | compute-optimal (oracle bins) | added | plan, easiest bin first",
        (
            [r["round"], two(r["single"]), two(r["searched"]), two(added(r), "+"), ", ".join(r["plan"])]
            for r in f["routing"]
        ),
    )
    return lines
