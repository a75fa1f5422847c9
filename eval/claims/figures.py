"""The tables behind one run's claims: strategies, plans, difficulty, one-time costs, routing by round."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import spearmanr

from eval.claims.rows import attempts, goal_makers, goal_share, study_cases
from eval.claims.study import BINS, GRADES, Study
from eval.curves import SELECT
from eval.shared import answers
from flywheel.measure.bins import fixed_bins
from flywheel.models.weights import parameters
from flywheel.records import ModelRef
from flywheel.runs.run import Run
from flywheel.search.plan import Plan
from flywheel.search.revise import Revise
from flywheel.stages.shared import test_rates

SERVED = (100, 10_000, 1_000_000)  # questions
Figures = dict[str, Any]  # JSON values


def figures(s: Study) -> Figures:
    """All tables that a study's data allows."""
    cases = study_cases(s)
    out: Figures = {
        "questions": len(s.questions),
        "best_of_n": {how: {n: s.best_of_n(n, how).mean() for n in s.sizes} for how in SELECT},
        "best_of_n_tokens": {n: s.best_of_n_tokens(n, "weighted").mean() for n in s.sizes},
        "strategies": strategies(s),
        "compute_optimal": compute_optimal(s),
        "difficulty": difficulty(s),
    }
    if 64 in s.sizes:
        chosen = s.cheapest(s.best_parallel(64, goal_makers(s))[0])[2]
        out["goal"] = {"strategies": [strategy.name for strategy in chosen], "share": goal_share(s).mean()}
    for case in cases["ratios"]:
        out.setdefault("best_ratio_by_bin", {})[case["budget"]] = best_ratios(s, case["budget"])
    for case in cases["longest chain"]:
        out["pass@1_by_attempt"] = attempts(s, case["budget"]).mean(axis=0)
    return out


def strategies(s: Study) -> list[dict]:
    oracle = s.bins("oracle")
    return [
        {
            "budget": budget,
            "strategy": strategy.name,
            "accuracy": (right := s.row(budget, strategy)).mean(),
            "by_bin": [right[oracle == b].mean() for b in range(1, BINS + 1)],
            "tokens": s.row(budget, strategy, "tokens").mean(),
            "computed": s.computed(budget, strategy),
            "odd_candidates": s.row(budget, strategy, "odd").mean(),
            "odd_winners": np.mean([tried.winner not in ("", "none") for tried in s.tried[budget, strategy]]),
        }
        for budget, strategy in sorted(s.tried, key=lambda key: key[0])
    ]


def compute_optimal(s: Study) -> list[dict]:
    return [
        {
            "of": case["title"],
            "budget": case["budget"],
            "grade": grade,
            "accuracy": (plan := s.plan(case["budget"], case["kinds"], grade)).right.mean(),
            "tokens": plan.tokens.mean(),
            "net_tokens": plan.net.mean(),
            "best_of_n_needs": s.tokens_for(plan.right.mean(), case["makers"]),
        }
        for case in study_cases(s)["predicted"]
        for grade in GRADES
    ]


def difficulty(s: Study) -> list[dict]:
    oracle, each = s.bins("oracle"), range(1, BINS + 1)
    return [
        {
            "grade": grade,
            "spearman": spearmanr(s.ease(grade), s.ease("oracle")).statistic,
            "same_bin": (s.bins(grade) == oracle).mean(),
            "tokens": s.grade_tokens(grade).mean(),
            "confusion": [[int(((oracle == a) & (s.bins(grade) == b)).sum()) for b in each] for a in each],
        }
        for grade in GRADES
    ]


def best_ratios(s: Study, budget: int) -> list[str]:
    """By oracle bin, the name of the strategy whose ratio of sequential to parallel has the highest accuracy."""
    oracle, tried = s.bins("oracle"), [r for r in s.strategies(budget, Revise) if r.select == "weighted"]
    return [max(tried, key=lambda r: s.row(budget, r)[oracle == b].mean()).name for b in range(1, BINS + 1)]


# ---- one-time costs and figures by round ---------------------------------------------------


def fixed_tokens(run: Run, round: int) -> dict[str, float]:
    """A round's one-time costs in inference tokens (FLOPs / 2N), by what they are for."""
    each = 2 * parameters(ModelRef("base", run.recipe.model.base))
    parts = {
        "sample": ("sample",),
        "prm": ("label", "train_prm"),
        "reviser": ("train_reviser", "choose_reviser"),
        "calibrate": ("calibrate",),
        "prompt_head": ("train_head",),
    }
    rows = [row for row in run.ledger_rows if row["round"] == round]
    return {part: sum(row["flops"] for row in rows if row["stage"] in stages) / each for part, stages in parts.items()}


def amortise(rows: list[dict], fixed: dict[str, float]) -> None:
    """Add to each row of `compute_optimal` its net tokens by number of questions served, and its break-even number.

    The baseline is best-of-N weighted of the policy or of the reviser, which needs the same models, so the extra
    one-time cost is calibration. Each question pays in full for the estimate of its own difficulty.
    """
    for row in rows:
        once = fixed["calibrate"]
        once += fixed["prompt_head"] if row["grade"] == "prompt" else 0.0
        row["net_by_served"] = {str(served): row["net_tokens"] + once / served for served in SERVED}
        saved = row["best_of_n_needs"] - row["net_tokens"]
        is_saving = saved > 1e-6 * row["net_tokens"]  # a plan of only best-of-N differs by rounding errors
        row["break_even"] = 0.0 if saved == float("inf") else once / saved if is_saving else float("inf")


def routing(run: Run) -> list[dict]:
    """Claim 16: by round, accuracy by fixed bin of single samples and of the plan at the search budget; the plan."""
    edges, out = run.recipe.calibrate.edges, []
    start = fixed_bins(test_rates(run, 0, "bin"), edges)
    for r in range(1, max(run.rounds) + 1):
        single, found = test_rates(run, r - 1), answers(run, r)
        method = next(m for m in found if m.startswith("compute_optimal") and m.endswith("oracle"))
        budget = int(method.partition("@")[2].partition("_")[0])
        plan = Plan.from_dict(run.figures("calibrate", r)["serve"])
        inside = [[q for q in found[method] if start[q] == b] for b in range(1, len(edges) + 2)]
        out.append(
            {
                "round": r,
                "single": [np.mean([single[q] for q in group] or [np.nan]) for group in inside],
                "searched": [np.mean([found[method][q] for q in group] or [np.nan]) for group in inside],
                "plan": [entry.strategy.name for entry in plan.entries if entry.budget == budget],
            }
        )
    return out


def of_run(run: Run, study: Study, round: int) -> Figures:
    """All tables of one run, with its name and round."""
    out = {
        "run": run.root.name,
        "round": round,
        **figures(study),
        "fixed": fixed_tokens(run, round),
        "routing": routing(run),
    }
    amortise(out["compute_optimal"], out["fixed"])
    return out
