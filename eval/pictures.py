"""The paper's figures 3, 4, 6, 7, 8 and 9 from a run's tables, and accuracy against the full cost in tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Tables = dict  # the tables of `eval.claims.figures`, as JSON values


def draw(tables: Tables, out: Path) -> list[Path]:
    """Write one PNG per figure into `out`; figures whose strategies were not tried are left out."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for title, make in {
        "figure_3_search": search,
        "figure_4_8_compute_optimal": compute_optimal,
        "figure_6_revisions": revisions,
        "figure_7_ratio": ratio,
        "figure_9_parameters": parameters,
        "net_cost": net_cost,
    }.items():
        if figure := make(tables):
            written.append(out / f"{title}.png")
            figure.tight_layout()
            figure.savefig(written[-1], dpi=110)
            plt.close(figure)
    return written


def panels(count: int = 1, width: float = 6.5) -> tuple[Figure, Sequence[Axes]]:
    figure, axes = plt.subplots(1, count, figsize=(width * count, 4.5), squeeze=False)
    return figure, axes[0]


def finish(ax: Axes, title: str, x: str = "generations", y: str = "accuracy", log: int | None = 2) -> None:
    """Set title, axis labels, grid and legend; the x axis is logarithmic with base `log`, or linear if None."""
    ax.set(title=title, xlabel=x, ylabel=y)
    ax.grid(alpha=0.3)
    if log:
        ax.set_xscale("log", base=log)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8)


def curve(ax: Axes, points: Iterable[tuple[float, float]], label: str, style: str = "o-") -> None:
    """Plot a line through the (x, y) points in order of x; nothing if there are none."""
    if points := sorted(points):
        ax.plot(*zip(*points), style, label=label)


def of_strategies(tables: Tables, fits: Callable[[str, int], bool]) -> list[tuple[int, float]]:
    """(budget, accuracy) of the strategies for which `fits(name, budget)`."""
    return [(r["budget"], r["accuracy"]) for r in tables["strategies"] if fits(r["strategy"], r["budget"])]


def best_of_n(tables: Tables, ax: Axes, *selects: str) -> None:
    for how in selects:
        curve(ax, [(int(n), right) for n, right in tables["best_of_n"][how].items()], f"best-of-N, {how}", ".--")


def search(tables: Tables) -> Figure:
    """Figure 3: the strategies against the budget, and by difficulty."""
    figure, (left, right) = panels(2)
    best_of_n(tables, left, "weighted", "majority", "best")
    curve(left, of_strategies(tables, lambda name, b: name == f"beam:{b}:{min(4, b)}"), "beam, width 4")
    curve(left, of_strategies(tables, lambda name, b: name == f"beam:{b}:{int(b**0.5)}"), "beam, width sqrt N")
    for k in (1, 3):
        found = of_strategies(tables, lambda name, b, k=k: name.endswith(f":lookahead{k}"))
        curve(left, found, f"lookahead {k}", "^-")
    finish(left, "Search against the PRM")
    beams = sorted((r["budget"], r["by_bin"]) for r in tables["strategies"] if r["strategy"] == f"beam:{r['budget']}:4")
    for i, (budget, by_bin) in enumerate(beams):
        places = [b + i * 0.2 for b in range(1, len(by_bin) + 1)]
        right.bar(places, by_bin, width=0.18, label=f"beam of {budget}, width 4")
    finish(right, "by oracle bin", "difficulty bin, 1 the easiest", log=None)
    return figure


def compute_optimal(tables: Tables) -> Figure:
    """Figures 4 and 8: the plan by each estimate of difficulty against best-of-N, over generations as in the paper."""
    rows = tables["compute_optimal"]
    kinds = list(dict.fromkeys(r["of"] for r in rows))
    figure, axes = panels(len(kinds))
    for ax, kind in zip(axes, kinds):
        best_of_n(tables, ax, "weighted", "majority")
        for grade in dict.fromkeys(r["grade"] for r in rows):
            found = [(r["budget"], r["accuracy"]) for r in rows if (r["of"], r["grade"]) == (kind, grade)]
            curve(ax, found, f"compute-optimal, {grade} bins")
        finish(ax, f"Compute-optimal: {kind}")
    return figure


def revisions(tables: Tables) -> Figure | None:
    """Figure 6: pass@1 along the chain; sequential against parallel."""
    if not (attempts := tables.get("pass@1_by_attempt")):
        return None
    figure, (left, right) = panels(2)
    curve(left, enumerate(attempts, 1), "", ".-")
    left.set_ylim(0, None)
    finish(left, "pass@1 along the chain", "attempt", "pass@1", log=None)
    for how in ("weighted", "majority"):
        chains = of_strategies(tables, lambda name, b, how=how: name == f"revise:{b}x1:{how}")
        curve(right, chains, f"sequential, {how}")
        samples = of_strategies(tables, lambda name, b, how=how: name == f"revise:1x{b}:{how}")
        curve(right, samples, f"parallel, {how}", "o--")
    best_of_n(tables, right, "weighted")
    finish(right, "Sequential against parallel")
    return figure


def ratio(tables: Tables) -> Figure | None:
    """Figure 7: the ratio of sequential to parallel by bin, at the largest budget."""
    rows = [
        r for r in tables["strategies"] if r["strategy"].startswith("revise") and r["strategy"].endswith(":weighted")
    ]
    if not rows:
        return None
    top = max(r["budget"] for r in rows)
    by_length = {int(r["strategy"].split(":")[1].split("x")[0]): r for r in rows if r["budget"] == top}
    figure, (ax,) = panels()
    for b in range(len(rows[0]["by_bin"])):
        curve(ax, [(length, r["by_bin"][b]) for length, r in by_length.items()], f"bin {b + 1}")
    curve(ax, [(length, r["accuracy"]) for length, r in by_length.items()], "all", "k--")
    finish(ax, f"Sequential to parallel, {top} generations", "attempts in a chain")
    return figure


def parameters(tables: Tables) -> Figure | None:
    """Figure 9: a small model with test-time compute against a larger model at equal FLOPs, by bin."""
    if not (found := tables.get("flops_matched")):
        return None
    figure, (ax,) = panels()
    for place, row in enumerate(found["by_ratio"], -1):
        at, leads = [part["bin"] + 0.1 * place for part in row["by_bin"]], [part["lead"] for part in row["by_bin"]]
        means, lows, highs = zip(*leads)
        reach = [[m - low for m, low in zip(means, lows)], [high - m for m, high in zip(means, highs)]]
        label = f"R = {row['R']:g}: {row['multiplier']:.0f} times the inference"
        ax.errorbar(at, means, yerr=reach, fmt="o", capsize=3, label=label)
    ax.axhline(0, color="black", linewidth=0.8)
    title = f"Test-time compute less a model of {found['M']:.1f} times the parameters, equal FLOPs"
    finish(ax, title, "difficulty bin, 1 the easiest", "lead in accuracy", log=None)
    return figure


def net_cost(tables: Tables) -> Figure:
    """Accuracy against tokens, including the cost of estimating each question's difficulty."""
    figure, (ax,) = panels()
    known = zip(tables["best_of_n_tokens"].values(), tables["best_of_n"]["weighted"].values())
    curve(ax, known, "best-of-N weighted", "k.--")
    rows = [r for r in tables["compute_optimal"] if r["of"] == tables["compute_optimal"][-1]["of"]]
    for grade in dict.fromkeys(r["grade"] for r in rows):
        found = [(r["net_tokens"], r["accuracy"]) for r in rows if r["grade"] == grade]
        curve(ax, found, f"compute-optimal, {grade} bins")
    for maker in ("policy", "reviser"):
        adaptive = [r for r in tables["strategies"] if r["strategy"].startswith("adaptive") and maker in r["strategy"]]
        curve(ax, [(r["tokens"], r["accuracy"]) for r in adaptive], f"adaptive, {maker}", "x")
    finish(ax, "Net of difficulty", "tokens a question", log=10)
    return figure
