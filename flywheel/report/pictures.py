"""The run in pictures: `runs/NAME/pictures/*.png`, drawn again after every round.

Figures are made without pyplot: no global state, no display, nothing left in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flywheel.ledger import total
from flywheel.runs.run import Run

# easy to hard; readable for the colour-blind and in grey
BINS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb")
PURPOSES = 8  # the largest ones by name, the rest together


def draw(run: Run) -> list[Path]:
    """Draw every picture that the finished stages have figures for; returns the paths."""
    folder = run.root / "pictures"
    folder.mkdir(exist_ok=True)
    paths = []
    for name, figure in _figures(run):
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=130, bbox_inches="tight")
    return paths


def _figures(run: Run) -> Iterator[tuple[str, object]]:
    evaluated = [(r, run.figures("evaluate", r)) for r in run.rounds]
    if any(e.get("fixed_bins") for _, e in evaluated):
        yield "pass_by_bin", _by_bin(evaluated)
    if any(e.get("policy") for _, e in evaluated):
        yield "policy", _policy(evaluated)
    if run.ledger_rows:
        yield "tokens", _tokens(run.ledger_rows)
    for r, e in evaluated:
        matrices = [(title, e[key]) for key, title in _MATRICES if e.get(key)]
        if matrices:
            yield f"migration_{r}", _migration(r, matrices)
        plans = [(kind, plan) for kind, plan in run.figures("calibrate", r).items() if _is_plan(plan)]
        if plans:
            yield f"plan_{r}", _plans(r, plans)
        curves = [(s, c) for s in ("train_prm", "train_reviser", "distill") if (c := run.figures(s, r).get("curve"))]
        if curves:
            yield f"training_{r}", _training(r, curves)


def _figure(width: float, height: float, panels: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _points(axis, rounds: list[int], figures: list[dict], key: str, *, shift: float = 0.0, **style) -> None:
    """A line through the rounds that have `key`, with the intervals of `key`_ci where there are any."""
    found = [(r, f) for r, f in zip(rounds, figures) if f.get(key) is not None]
    if not found:
        return
    xs, ys = [r + shift for r, _ in found], [f[key] for _, f in found]
    intervals = [f.get(f"{key}_ci") or (f[key], f[key]) for _, f in found]
    below = [max(0.0, y - lo) for y, (lo, _) in zip(ys, intervals)]
    above = [max(0.0, hi - y) for y, (_, hi) in zip(ys, intervals)]
    axis.errorbar(
        xs, ys, yerr=(below, above), marker="o", markersize=5, capsize=3, linewidth=1.8, elinewidth=1, **style
    )


def _rounds_axis(axis, rounds: list[int], title: str) -> None:
    axis.set_xticks(rounds)
    axis.set_xlim(min(rounds) - 0.3, max(rounds) + 0.3)
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("round (0: the base)")
    axis.set_title(title, loc="left")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _by_bin(evaluated: list[tuple[int, dict]]):
    figure, (axis,) = _figure(8, 4.8)
    rounds = [r for r, _ in evaluated]
    bins = sorted({b["bin"] for _, e in evaluated for b in e.get("fixed_bins", [])})
    for place, number in enumerate(bins):
        rows = [next((b for b in e.get("fixed_bins", []) if b["bin"] == number), {}) for _, e in evaluated]
        n = next((row["n"] for row in rows if "n" in row), None)
        word = {bins[0]: "easiest", bins[-1]: "hardest"}.get(number, "")
        label = f"bin {number}" + (f", {word}" if word else "") + (f" ({n} questions)" if n is not None else "")
        shift = (place - (len(bins) - 1) / 2) * 0.03  # intervals side by side
        _points(axis, rounds, rows, "pass@1", shift=shift, color=BINS[place % len(BINS)], label=label)
    _rounds_axis(axis, rounds, "pass@1 on test questions, by fixed bin (95% intervals)")
    axis.set_ylabel("pass@1")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def _policy(evaluated: list[tuple[int, dict]]):
    figure, (axis,) = _figure(8, 4.8)
    rounds, policies = [r for r, _ in evaluated], [e.get("policy") or {} for _, e in evaluated]
    keys = dict.fromkeys(k for p in policies for k, v in p.items() if "@" in k and isinstance(v, (int, float)))
    for place, key in enumerate(keys):
        _points(
            axis,
            rounds,
            policies,
            key,
            shift=(place - (len(keys) - 1) / 2) * 0.03,
            color=BINS[place % len(BINS)],
            label=key,
        )
    _rounds_axis(axis, rounds, "the policy after each round, test questions (95% intervals)")
    axis.set_xticks(rounds, [f"{r}\n{p.get('name', '')}" for r, p in zip(rounds, policies)])
    axis.set_ylabel("share of questions")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure


_MATRICES = (
    ("migration", "since round 0"),
    ("migration_last", "since the last round"),
    ("migration_null", "chance alone: round 0, drawn twice"),
)


def _migration(r: int, matrices: list[tuple[str, list]]):
    """Rows: the bin before; columns: the bin now. Colour is the share of the row, the number a count."""
    figure, axes = _figure(4 * len(matrices), 4.8, len(matrices))
    for axis, (title, matrix) in zip(axes, matrices):
        size = len(matrix)
        shares = [[cell / sum(row) if sum(row) else 0.0 for cell in row] for row in matrix]
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for i, row in enumerate(matrix):
            for j, cell in enumerate(row):
                axis.text(
                    j, i, f"{cell:g}", ha="center", va="center", color="white" if shares[i][j] > 0.55 else "black"
                )
        axis.set_xticks(range(size), range(1, size + 1))
        axis.set_yticks(range(size), range(1, size + 1))
        axis.set_xlabel("fixed bin now")
        axis.set_ylabel("fixed bin before")
        axis.set_title(title, fontsize=11)
    figure.suptitle(f"round {r}: questions between fixed bins (1 easiest, {len(matrices[0][1])} hardest)")
    return figure


def _tokens(ledger: list[dict]):
    from matplotlib.ticker import EngFormatter

    figure, (axis,) = _figure(8, 4.8)
    sizes = {purpose: spent.tokens for (purpose,), spent in total(ledger, "purpose")}
    large = sorted(sizes, key=sizes.get, reverse=True)[:PURPOSES]
    stacks: dict[str, dict[int, int]] = {}
    for (r, purpose), spent in total(ledger, "round", "purpose"):
        stack = stacks.setdefault(purpose if purpose in large else "other", {})
        stack[int(r)] = stack.get(int(r), 0) + spent.tokens
    rounds = sorted({r for stack in stacks.values() for r in stack})
    bottom = dict.fromkeys(rounds, 0)
    colours = (*BINS[:6], "#999933", "#882255", "#bbbbbb")
    for colour, purpose in zip(colours, [p for p in (*large, "other") if p in stacks]):
        heights = [stacks[purpose].get(r, 0) for r in rounds]
        axis.bar(rounds, heights, bottom=[bottom[r] for r in rounds], width=0.6, color=colour, label=purpose)
        bottom = {r: bottom[r] + height for r, height in zip(rounds, heights)}
    for r in rounds:
        axis.annotate(
            EngFormatter(places=1, sep="")(bottom[r]),
            (r, bottom[r]),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axis.set_xticks(rounds)
    axis.margins(y=0.1)
    axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel("round")
    axis.set_ylabel("tokens (prompt, generated, scored, trained)")
    axis.set_title("tokens by purpose", loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=9)
    return figure


def _is_plan(plan) -> bool:
    return isinstance(plan, dict) and bool(plan.get("entries"))


def strategy_label(strategy: dict) -> str:
    """Two short lines for a cell of the plan, e.g. `beam of 16 / width 4`."""
    match strategy:
        case {"kind": "best_of_n", "n": n}:
            return f"best of {n}\n{strategy.get('select', '')}".rstrip()
        case {"kind": "beam", "n": n}:
            return f"beam of {n}\nwidth {strategy.get('width', '?')}"
        case {"kind": "revise", "length": length}:
            return f"revise {length} x {strategy.get('chains', 1)}\n{strategy.get('select', '')}".rstrip()
        case {"kind": "adaptive", "n": n}:
            return f"adaptive to {n}\n{strategy.get('maker', '')} {strategy.get('sure', '')}".rstrip()
        case _:
            return str(strategy.get("kind", "?"))


def _plans(r: int, plans: list[tuple[str, dict]]):
    """One panel a plan. Each has its own scale: to serve is accuracy, to harvest is coverage."""
    budgets = [sorted({e["budget"] for e in plan["entries"]}) for _, plan in plans]
    figure, axes = _figure(2.6 + 1.7 * sum(map(len, budgets)), 4.6, len(plans))
    for axis, columns, (kind, plan) in zip(axes, budgets, plans):
        bins = sorted({e["bin"] for e in plan["entries"]})
        cells = {(e["bin"], e["budget"]): e for e in plan["entries"]}
        scores = [[_score(cells.get((b, c))) for c in columns] for b in bins]
        image = axis.imshow(scores, cmap="YlGn", aspect="auto")
        low, high = image.get_clim()
        for i, b in enumerate(bins):
            for j, c in enumerate(columns):
                if entry := cells.get((b, c)):
                    dark = high > low and (scores[i][j] - low) / (high - low) > 0.6
                    text = f"{strategy_label(entry['strategy'])}\n{scores[i][j]:.3g}"
                    axis.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(bins)), bins)
        axis.set_xlabel("budget (generations)")
        axis.set_ylabel("quantile bin (1: easiest)")
        axis.set_title(f"to {kind}", fontsize=11)
    figure.suptitle(f"round {r}: the plan, strategy and its score")
    return figure


def _score(entry: dict | None) -> float:
    return float("nan") if entry is None or entry.get("score") is None else float(entry["score"])


def _training(r: int, curves: list[tuple[str, list[dict]]]):
    figure, axes = _figure(4 * len(curves), 3.8, len(curves))
    for axis, (stage, curve) in zip(axes, curves):
        for key, label, colour in (("loss", "training", BINS[0]), ("eval_loss", "validation", BINS[4])):
            points = [(p["step"], p[key]) for p in curve if p.get(key) is not None]
            if points:
                axis.plot(*zip(*points), color=colour, label=label, marker="o", markersize=3)
        axis.set_title(stage.replace("_", " "), fontsize=11)
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"round {r}: training")
    return figure
