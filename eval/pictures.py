"""The paper's figures 3, 4, 6, 7, 8 and 9 redrawn from a study, and accuracy against what is really paid."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(behind: dict, out: Path) -> list[Path]:
    """Write one PNG a figure into `out`; a figure whose strategies were not tried is left out."""
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
        figure = make(behind)
        if figure is not None:
            path = out / f"{title}.png"
            figure.tight_layout()
            figure.savefig(path, dpi=110)
            plt.close(figure)
            written.append(path)
    return written


def axes(title: str, x: str, y: str = "accuracy") -> tuple[Figure, Axes]:
    figure, ax = plt.subplots(figsize=(7, 4.5))
    ax.set(title=title, xlabel=x, ylabel=y)
    ax.grid(alpha=0.3)
    return figure, ax


def curve(behind: dict, starts: str, ends: str = "") -> tuple[list[int], list[float]]:
    """Budgets and accuracies of the strategies of this name, whatever stands for the budget."""
    rows = sorted(
        (r["budget"], r["accuracy"])
        for r in behind["strategies"]
        if r["strategy"].startswith(starts) and r["strategy"].endswith(ends)
    )
    return [b for b, _ in rows], [a for _, a in rows]


def best_of_n(behind: dict, ax: Axes, *selects: str) -> None:
    for how in selects:
        sizes = [int(n) for n in behind["best_of_n"][how]]
        ax.plot(sizes, list(behind["best_of_n"][how].values()), "--", marker=".", label=f"best-of-N, {how}")


def generations(ax: Axes) -> None:
    ax.set_xscale("log", base=2)
    ax.legend(fontsize=8)


def search(behind: dict) -> Figure:
    """Figure 3: the strategies against the budget, and by difficulty."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    best_of_n(behind, left, "weighted", "majority", "best")
    for width in (4, "sqrt"):
        rows = [r for r in behind["strategies"] if r["strategy"].startswith("beam") and "look" not in r["strategy"]]
        fits = lambda r, width=width: (
            int(r["strategy"].split(":")[2]) == (min(4, r["budget"]) if width == 4 else int(r["budget"] ** 0.5))
        )
        rows = sorted((r["budget"], r["accuracy"]) for r in rows if fits(r))
        left.plot(
            [b for b, _ in rows],
            [a for _, a in rows],
            marker="o",
            label=f"beam, width {'sqrt N' if width == 'sqrt' else width}",
        )
    for k in (1, 3):
        left.plot(*curve(behind, "beam", f"lookahead{k}"), marker="^", label=f"lookahead {k}")
    left.set(title="Search against the PRM", xlabel="generations", ylabel="accuracy")
    left.grid(alpha=0.3)
    generations(left)
    beams = sorted((r["budget"], r["by_bin"]) for r in behind["strategies"] if r["strategy"] == f"beam:{r['budget']}:4")
    for i, (budget, by_bin) in enumerate(beams):
        right.bar(
            [b + i * 0.2 for b in range(1, len(by_bin) + 1)], by_bin, width=0.18, label=f"beam of {budget}, width 4"
        )
    right.set(title="by oracle bin", xlabel="difficulty bin, 1 the easiest", ylabel="accuracy")
    right.legend(fontsize=8)
    return figure


def compute_optimal(behind: dict) -> Figure:
    """Figures 4 and 8: the plan by each grade of difficulty against best-of-N, in the paper's unit."""
    kinds = list(dict.fromkeys(r["of"] for r in behind["compute_optimal"]))
    figure, all_axes = plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 4.5), squeeze=False, sharey=True)
    for ax, kind in zip(all_axes[0], kinds):
        best_of_n(behind, ax, "weighted", "majority")
        for grade in dict.fromkeys(r["grade"] for r in behind["compute_optimal"]):
            rows = [r for r in behind["compute_optimal"] if (r["of"], r["grade"]) == (kind, grade)]
            ax.plot(
                [r["budget"] for r in rows],
                [r["accuracy"] for r in rows],
                marker="o",
                label=f"compute-optimal, {grade} bins",
            )
        ax.set(title=f"Compute-optimal: {kind}", xlabel="generations", ylabel="accuracy")
        ax.grid(alpha=0.3)
        generations(ax)
    return figure


def revisions(behind: dict) -> Figure | None:
    """Figure 6: pass@1 along the chain; sequential against parallel."""
    if "pass@1_by_attempt" not in behind:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    attempts = behind["pass@1_by_attempt"]
    left.plot(range(1, len(attempts) + 1), attempts, marker=".")
    left.set(title="pass@1 along the chain", xlabel="attempt", ylabel="pass@1", ylim=(0, None))
    left.grid(alpha=0.3)
    for how in ("weighted", "majority"):
        for title, chains in (
            ("sequential", lambda r: r["strategy"] == f"revise:{r['budget']}x1:{how}"),
            ("parallel", lambda r: r["strategy"] == f"revise:1x{r['budget']}:{how}"),
        ):
            rows = sorted((r["budget"], r["accuracy"]) for r in behind["strategies"] if chains(r))
            right.plot(
                [b for b, _ in rows],
                [a for _, a in rows],
                marker="o",
                linestyle="-" if title == "sequential" else "--",
                label=f"{title}, {how}",
            )
    best_of_n(behind, right, "weighted")
    right.set(title="Sequential against parallel", xlabel="generations", ylabel="accuracy")
    right.grid(alpha=0.3)
    generations(right)
    return figure


def ratio(behind: dict) -> Figure | None:
    """Figure 7: the ratio of sequential to parallel by bin, at the largest budget."""
    rows = [
        r for r in behind["strategies"] if r["strategy"].startswith("revise") and r["strategy"].endswith(":weighted")
    ]
    if not rows:
        return None
    top = max(r["budget"] for r in rows)
    points = sorted(
        (int(r["strategy"].split(":")[1].split("x")[0]), r["by_bin"], r["accuracy"]) for r in rows if r["budget"] == top
    )
    figure, ax = axes(f"Sequential to parallel, {top} generations", "attempts in a chain")
    for b in range(len(points[0][1])):
        ax.plot(
            [length for length, _, _ in points],
            [by_bin[b] for _, by_bin, _ in points],
            marker="o",
            label=f"bin {b + 1}",
        )
    ax.plot([length for length, _, _ in points], [mean for _, _, mean in points], "k--", label="all")
    generations(ax)
    return figure


def parameters(behind: dict) -> Figure | None:
    """Figure 9: test-time compute of a small model against a larger one's parameters, at equal FLOPs, by bin."""
    if not (found := behind.get("flops_matched")):
        return None
    figure, ax = axes(
        f"Test-time compute less a model of {found['M']:.1f} times the parameters, equal FLOPs",
        "difficulty bin (1: easiest)",
        "lead in accuracy",
    )
    for at, row in enumerate(found["by_ratio"]):
        x = [part["bin"] + 0.1 * (at - 1) for part in row["by_bin"]]
        lead = [part["lead"] for part in row["by_bin"]]
        spread = [[m - low for m, low, _ in lead], [high - m for m, _, high in lead]]
        ax.errorbar(
            x,
            [m for m, _, _ in lead],
            yerr=spread,
            fmt="o",
            capsize=3,
            label=f"R = {row['R']:g}: {row['multiplier']:.0f} times the inference",
        )
    ax.axhline(0, color="black", linewidth=0.8)
    ax.legend(fontsize=8)
    return figure


def net_cost(behind: dict) -> Figure:
    """Accuracy against tokens with each question's difficulty paid for."""
    figure, ax = axes("Net of difficulty", "tokens a question")
    ax.plot(
        list(behind["best_of_n_tokens"].values()),
        list(behind["best_of_n"]["weighted"].values()),
        "k--",
        marker=".",
        label="best-of-N weighted",
    )
    for grade in dict.fromkeys(r["grade"] for r in behind["compute_optimal"]):
        rows = [
            r
            for r in behind["compute_optimal"]
            if r["grade"] == grade and r["of"] == behind["compute_optimal"][-1]["of"]
        ]
        ax.plot(
            [r["net_tokens"] for r in rows],
            [r["accuracy"] for r in rows],
            marker="o",
            label=f"compute-optimal, {grade} bins",
        )
    for maker in ("policy", "reviser"):
        rows = sorted(
            (r["tokens"], r["accuracy"])
            for r in behind["strategies"]
            if r["strategy"].startswith("adaptive") and f":{maker}" in r["strategy"]
        )
        if rows:
            ax.plot([t for t, _ in rows], [a for _, a in rows], "x", label=f"adaptive, {maker}")
    generations(ax)
    ax.set_xscale("log", base=10)
    return figure
