"""Pictures of a run: `runs/NAME/pictures/*.png`, drawn again after every round.

Does not use pyplot, which needs global state and keeps figures in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from flywheel.ledger import total
from flywheel.runs.run import Run
from flywheel.search.plan import Plan

# from easy to hard; distinguishable for colour-blind readers and in grey
COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#999933", "#882255", "#bbbbbb")
PURPOSES = 8  # number of purposes shown by name; the rest are summed as "other"
MIGRATIONS = {
    "migration": "since round 0",
    "migration_last": "since the last round",
    "migration_null": "chance alone: round 0, drawn twice",
}
Point = tuple[float, float, float]  # value, low, high


def draw(run: Run) -> list[Path]:
    """Draw every picture that the finished rounds have figures for; returns the paths."""
    folder = run.root / "pictures"
    folder.mkdir(exist_ok=True)
    paths = []
    for name, figure in figures(run):
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=130, bbox_inches="tight")
    return paths


def figures(run: Run) -> Iterator[tuple[str, object]]:
    evaluated = {r: run.figures("evaluate", r) for r in run.rounds}
    if evaluated:
        yield "pass_by_bin", _by_bin(evaluated)
        yield "policy", _policy(evaluated)
    if run.ledger_rows:
        yield "tokens", _tokens(run.ledger_rows)
    for r, figures in evaluated.items():
        if "migration" in figures:
            yield f"migration_{r}", _migrations(r, figures)
        calibrated = run.figures("calibrate", r)
        if plans := [Plan.from_dict(calibrated[kind]) for kind in ("serve", "harvest") if kind in calibrated]:
            yield f"plan_{r}", _plans(r, plans)
        curves = {s: run.figures(s, r).get("curve") for s in ("train_prm", "train_reviser", "train_head", "distill")}
        if curves := {stage: curve for stage, curve in curves.items() if curve}:
            yield f"training_{r}", _training(r, curves)


def _figure(width: float, height: float, panels: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _legend(figure, axis, *, reverse: bool = False) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False, reverse=reverse)
    axis.spines[["top", "right"]].set_visible(False)


# ---- over the rounds ---------------------------------------------------------------------


def _by_bin(evaluated: dict[int, dict]):
    lines: dict[str, list[Point | None]] = {}
    first = evaluated[min(evaluated)]["fixed_bins"]
    for place, row in enumerate(first):
        end = {0: ", easiest", len(first) - 1: ", hardest"}.get(place, "")
        name = f"bin {row['bin']}{end} ({row['n']} questions)"
        lines[name] = [_point(figures["fixed_bins"][place], "pass@1") for figures in evaluated.values()]
    title = "pass@1 on test questions, by fixed bin (95% intervals)"
    return _over_rounds(evaluated, title, "pass@1", lines)


def _policy(evaluated: dict[int, dict]):
    policies = [figures["policy"] for figures in evaluated.values()]
    keys = [key for key in policies[0] if "@" in key and not key.endswith("_ci")]
    lines = {key: [_point(policy, key) for policy in policies] for key in keys}
    title = "the policy after each round, test questions (95% intervals)"
    return _over_rounds(evaluated, title, "fraction of questions", lines)


def _point(figures: dict, key: str) -> Point | None:
    """(value, low, high); None if the figure is missing, as for an empty bin."""
    return (figures[key], *figures[f"{key}_ci"]) if key in figures else None


def _over_rounds(evaluated: dict[int, dict], title: str, ylabel: str, lines: dict[str, list[Point | None]]):
    """One curve with error bars per entry of `lines`, which have one point per round."""
    figure, (axis,) = _figure(8, 4.8)
    for place, (label, points) in enumerate(lines.items()):
        shift = (place - (len(lines) - 1) / 2) * 0.03  # so that error bars do not overlap
        if found := [(r + shift, *point) for r, point in zip(evaluated, points) if point]:
            x, y, low, high = np.transpose(found)
            bars = np.maximum(0, (y - low, high - y))
            style = {"marker": "o", "markersize": 5, "capsize": 3, "elinewidth": 1}
            axis.errorbar(x, y, bars, color=COLOURS[place % len(COLOURS)], label=label, **style)
    axis.set_xticks(list(evaluated), [f"{r}\n{figures['policy']['name']}" for r, figures in evaluated.items()])
    axis.set_xlim(min(evaluated) - 0.3, max(evaluated) + 0.3)
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("round (0: the base) and its policy")
    axis.set_ylabel(ylabel)
    axis.set_title(title, loc="left")
    axis.grid(alpha=0.3)
    _legend(figure, axis)
    return figure


def _tokens(ledger: list[dict]):
    from matplotlib.ticker import EngFormatter

    figure, (axis,) = _figure(8, 4.8)
    spent = {(int(r), purpose): s.tokens for (r, purpose), s in total(ledger, "round", "purpose")}
    rounds = sorted({r for r, _ in spent})
    sizes: Counter[str] = Counter()
    for (_, purpose), tokens in spent.items():
        sizes[purpose] += tokens
    stacks = {purpose: np.zeros(len(rounds)) for purpose, _ in sizes.most_common(PURPOSES)}
    for (r, purpose), tokens in spent.items():
        stacks.setdefault(purpose if purpose in stacks else "other", np.zeros(len(rounds)))[rounds.index(r)] += tokens
    bottom = np.zeros(len(rounds))
    for colour, (purpose, heights) in zip(COLOURS, stacks.items()):
        bars = axis.bar(rounds, heights, bottom=bottom, width=0.6, color=colour, label=purpose)
        bottom = bottom + heights
    axis.bar_label(bars, map(EngFormatter(places=1, sep=""), bottom), padding=3, fontsize=9)
    axis.set_xticks(rounds)
    axis.margins(y=0.1)
    axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel("round")
    axis.set_ylabel("tokens (prompt, generated, scored, trained)")
    axis.set_title("tokens by purpose", loc="left")
    _legend(figure, axis, reverse=True)
    return figure


# ---- of one round ------------------------------------------------------------------------


def _heat_map(axis, values: np.ndarray, texts: Sequence[Sequence[str]], colours: str, **scale) -> None:
    """Cells coloured by `values` (rows, columns) and labelled with `texts`; rows and columns count from 1."""
    image = axis.imshow(values, cmap=colours, aspect="auto", **scale)
    for (i, j), shade in np.ndenumerate(image.norm(values)):
        axis.text(j, i, texts[i][j], ha="center", va="center", fontsize=8, color="white" if shade > 0.6 else "black")
    rows, columns = values.shape
    axis.set_yticks(range(rows), range(1, rows + 1))
    axis.set_xticks(range(columns), range(1, columns + 1))


def _migrations(r: int, figures: dict):
    figure, axes = _figure(4 * len(MIGRATIONS), 4.8, len(MIGRATIONS))
    for axis, (key, title) in zip(axes, MIGRATIONS.items()):
        counts = np.array(figures[key])
        fractions = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))  # of the row
        _heat_map(axis, fractions, counts.astype(str), "Blues", vmin=0, vmax=1)
        axis.set_xlabel("fixed bin now")
        axis.set_ylabel("fixed bin before")
        axis.set_title(title, fontsize=11)
    figure.suptitle(f"round {r}: questions between fixed bins (1 easiest, {len(figures['migration'])} hardest)")
    return figure


def _plans(r: int, plans: list[Plan]):
    """One panel per plan, each with its own scale: accuracy (serve) or new solutions per question (harvest)."""
    budgets = [sorted({e.budget for e in plan.entries}) for plan in plans]
    figure, axes = _figure(2.6 + 1.7 * sum(map(len, budgets)), 4.6, len(plans))
    for axis, columns, plan in zip(axes, budgets, plans):
        bins = max(e.bin for e in plan.entries)
        scores, texts = np.full((bins, len(columns)), np.nan), [[""] * len(columns) for _ in range(bins)]
        for e in plan.entries:
            at = columns.index(e.budget)
            scores[e.bin - 1, at], texts[e.bin - 1][at] = e.score, f"{e.strategy.label}\n{e.score:.3g}"
        _heat_map(axis, scores, texts, "YlGn")
        axis.set_xticks(range(len(columns)), columns)
        axis.set_xlabel("budget (generations)")
        axis.set_ylabel("quantile bin (1: easiest)")
        axis.set_title(f"to {plan.kind}", fontsize=11)
    figure.suptitle(f"round {r}: the plan, strategy and its score")
    return figure


def _training(r: int, curves: dict[str, list[dict]]):
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(4 * len(curves), 3.8, len(curves))
    for axis, (stage, curve) in zip(axes, curves.items()):
        for key, label, colour in (("loss", "training", COLOURS[0]), ("eval_loss", "validation", COLOURS[4])):
            if points := [(p["step"], p[key]) for p in curve if p.get(key) is not None]:
                axis.plot(*zip(*points), color=colour, label=label, marker="o", markersize=3)
        axis.set_title(stage.replace("_", " "), fontsize=11)
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"round {r}: training")
    return figure
