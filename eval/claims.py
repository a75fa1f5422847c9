"""The paper's claims on a finished run: python -m eval.claims RUN [--round 1] (after eval.study with the same sizes)

Snell et al. 2024, one row a claim: what the paper has, what this run has with its 95% interval,
and whether it holds. Writes eval/results/claims.json and CLAIMS.md. Intervals are a bootstrap
over test questions; a plan is always chosen on one half of the questions and scored on the other.

A claim `holds` if its whole interval is on the claim's side, `fails` if it is wholly on the other
side, and is `undecided` otherwise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from eval.study import Difficult, Drawn, Tried, arguments, parts, read
from flywheel.bins import quantile_bins
from flywheel.errors import UserError, explain
from flywheel.recipe import load
from flywheel.search.plan import Trial, held_out, most_right
from flywheel.search.select import argmax, majority, weighted
from flywheel.stats import bootstrap_mean

RESULTS = Path("eval/results")
BINS = 5
PROBE = 4  # samples
Select = Callable[[Sequence[Drawn]], str | None]
SELECT: dict[str, Select] = {
    "weighted": lambda group: weighted([d.answer for d in group], [d.score for d in group]),
    "majority": lambda group: majority([d.answer for d in group]),
    "best": lambda group: argmax([d.answer for d in group], [d.score for d in group]),
}


@dataclass(frozen=True)
class Claim:
    """`ours` with its interval [low, high]; `holds` where that is above 0 (or `above`)."""

    id: str
    claim: str
    paper: str
    ours: float
    low: float
    high: float
    verdict: str
    unit: str
    command: str


class Study:
    """The draws of one run as arrays over its questions, in one order."""

    def __init__(self, difficult: Sequence[Difficult], drawn: Sequence[Drawn], tried: Sequence[Tried], seed: int = 0):
        self.questions = sorted(d.question_id for d in difficult)
        self.difficult = {d.question_id: d for d in difficult}
        self.seed = seed
        pools: dict[str, list[Drawn]] = {q: [] for q in self.questions}
        for d in drawn:
            pools[d.question_id].append(d)
        sizes = {len(pool) for pool in pools.values()}
        if len(sizes) != 1 or {t.question_id for t in tried} != set(self.questions):
            raise UserError("the parts of this study are of different questions; draw them with the same --questions")
        self.pools, self.size = pools, sizes.pop()
        self.tried: dict[tuple[int, str], dict[str, Tried]] = {}
        for t in tried:
            self.tried.setdefault((t.budget, t.strategy), {})[t.question_id] = t
        self.budgets = sorted({budget for budget, _ in self.tried})

    # ---- best-of-N, from the pool ----

    @cached_property
    def sizes(self) -> list[int]:
        return [2**i for i in range(20) if 2**i <= self.size]

    def best_of_n(self, n: int, select: str) -> np.ndarray:
        """Accuracy of each question: the mean over the disjoint groups of n in its pool."""
        return self._curve[select][n]

    @cached_property
    def _curve(self) -> dict[str, dict[int, np.ndarray]]:
        out: dict[str, dict[int, np.ndarray]] = {}
        for how, select in SELECT.items():
            out[how] = {n: np.array([self._accuracy(self.pools[q], n, select) for q in self.questions]) for n in self.sizes}
        return out

    @staticmethod
    def _accuracy(pool: Sequence[Drawn], n: int, select: Select) -> float:
        rights = []
        for start in range(0, len(pool) - n + 1, n):
            group = pool[start : start + n]
            answer = select(group)
            rights.append(answer is not None and next(d.correct for d in group if d.answer == answer))
        return float(np.mean(rights))

    def best_of_n_tokens(self, n: int, select: str) -> np.ndarray:
        """Mean tokens of n samples of each question's pool, judged unless a majority decides."""
        judge = select != "majority"
        return np.array([n * np.mean([d.cost + judge * d.score_cost for d in self.pools[q]]) for q in self.questions])

    # ---- the other strategies ----

    def row(self, budget: int, strategy: str, what: str = "correct") -> np.ndarray:
        return np.array([float(getattr(self.tried[budget, strategy][q], what)) for q in self.questions])

    def names(self, budget: int, kind: str) -> list[str]:
        return [s for b, s in self.tried if b == budget and s.startswith(kind)]

    # ---- difficulty and plans ----

    def bins(self, grade: str) -> np.ndarray:
        rate = {"oracle": lambda d: d.right / d.samples, "predicted": lambda d: d.seen, "probe": lambda d: self.probe(d.question_id)}[grade]
        found = quantile_bins({q: rate(d) for q, d in self.difficult.items()}, BINS)
        return np.array([found[q] for q in self.questions])

    def probe(self, question: str) -> float:
        """The mean PRM score of the first samples of the pool."""
        return float(np.mean([d.score for d in self.pools[question][:PROBE]]))

    def grade_tokens(self, grade: str) -> np.ndarray:
        """What each question pays for its bin: never shared with others."""
        if grade == "probe":
            return np.array([sum(d.cost + d.score_cost for d in self.pools[q][:PROBE]) for q in self.questions], dtype=float)
        return np.array([float(d.tokens if grade == "oracle" else d.judged_tokens) for d in (self.difficult[q] for q in self.questions)])

    def compute_optimal(self, budget: int, kinds: Sequence[str], grade: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(accuracy, tokens, tokens with the bin paid for) of each question under the plan chosen without it.

        Best-of-N is always among the choices. It takes a probe's samples for its first ones, so
        they are paid once; what its vote does not need of them, the judging, is paid beside.
        """
        bins, trials = self.bins(grade), []
        rows = [(f"best_of_n:{budget}:{how}", self.best_of_n(budget, how), self.best_of_n_tokens(budget, how)) for how in ("weighted", "majority")]
        rows += [(s, self.row(budget, s), self.row(budget, s, "tokens")) for kind in kinds for s in self.names(budget, kind)]
        for strategy, correct, tokens in rows:
            trials += [Trial(q, int(b), budget, strategy, c, 0, t) for q, b, c, t in zip(self.questions, bins, correct, tokens)]
        served = {t.question_id: t for t in held_out(trials, partial(most_right, models={}, bins=BINS), seed=self.seed)[budget]}
        right, tokens = (np.array([float(getattr(served[q], what)) for q in self.questions]) for what in ("correct", "tokens"))
        paid = self.grade_tokens(grade)
        if grade == "probe":
            for i, q in enumerate(self.questions):
                if served[q].strategy.startswith("best_of_n"):
                    first = self.pools[q][: min(PROBE, budget)]
                    judged = not served[q].strategy.endswith("majority")
                    paid[i] -= sum(d.cost + judged * d.score_cost for d in first)
        return right, tokens, tokens + paid

    def at_tokens(self, tokens: float, select: str = "weighted") -> np.ndarray:
        """Best-of-N's accuracy of each question for a mean of so many tokens, between the measured N on a log scale."""
        grid = np.log([self.best_of_n_tokens(n, select).mean() for n in self.sizes])
        at = np.clip(np.log(tokens), grid[0], grid[-1])
        high = int(np.clip(np.searchsorted(grid, at), 1, len(grid) - 1))
        part = (at - grid[high - 1]) / (grid[high] - grid[high - 1])
        return (1 - part) * self.best_of_n(self.sizes[high - 1], select) + part * self.best_of_n(self.sizes[high], select)


def judge(low: float, high: float, zero: float = 0.0) -> str:
    return "holds" if low > zero else "fails" if high < zero else "undecided"


class Table:
    def __init__(self, study: Study, command: str):
        self.study, self.command, self.claims = study, command, []

    def add(self, id: str, claim: str, paper: str, values: np.ndarray, unit: str = "accuracy", zero: float = 0.0) -> None:
        """A claim that the mean of `values` over questions is above `zero`; NaN questions do not count."""
        values = np.asarray(values, dtype=float)
        values = values[~np.isnan(values)]
        if not len(values):
            return
        mean, low, high = bootstrap_mean(values, seed=self.study.seed)
        self.claims.append(Claim(id, claim, paper, mean, low, high, judge(low, high, zero), unit, self.command))


def measure(study: Study, command: str) -> tuple[list[Claim], dict]:
    """All claims that one run's study can speak to, and the tables behind them."""
    table, s = Table(study, command), study
    top, most = s.budgets[-1], s.sizes[-1]
    oracle = s.bins("oracle")
    only = lambda values, *bins: np.where(np.isin(oracle, bins), values, np.nan)  # noqa: E731
    behind: dict = {"best_of_n": {how: {n: s.best_of_n(n, how).mean() for n in s.sizes} for how in SELECT}, "strategies": [], "compute_optimal": []}

    for budget in s.budgets:
        for strategy in [name for b, name in s.tried if b == budget]:
            right, by_bin = s.row(budget, strategy), []
            by_bin = [float(right[oracle == b].mean()) for b in range(1, BINS + 1)]
            odd = [t.odd for t in s.tried[budget, strategy].values()]
            winners = [t.winner not in ("", "none") for t in s.tried[budget, strategy].values()]
            behind["strategies"].append(
                {"budget": budget, "strategy": strategy, "accuracy": right.mean(), "by_bin": by_bin, "tokens": s.row(budget, strategy, "tokens").mean(),
                 "odd_candidates": float(np.mean(odd)), "odd_winners": float(np.mean(winners))}
            )  # fmt: skip

    # 1, 2: compute-optimal against best-of-N; 3: predicted bins
    for number, title, kinds in (("1", "search", ["beam"]), ("2", "revisions", ["revise"])):
        if not s.names(top, kinds[0]):
            continue
        for budget in s.budgets:
            gross = {grade: s.compute_optimal(budget, kinds, grade) for grade in ("oracle", "predicted", "probe")}
            right = gross["oracle"][0]
            table.add(f"{number}.gross@{budget}", f"Compute-optimal {title} of {budget} is ahead of best-of-{budget} weighted (oracle bins, difficulty free)", "ahead",
                      right - s.best_of_n(budget, "weighted"))  # fmt: skip
            if 4 * budget in s.sizes:
                table.add(f"{number}.quarter@{budget}", f"Compute-optimal {title} of {budget} matches best-of-{4 * budget} weighted (within 0.02)", "16 against 64",
                          right - s.best_of_n(4 * budget, "weighted") + 0.02)  # fmt: skip
            for grade, (right, tokens, paid) in gross.items():
                table.add(f"{number}.net-{grade}@{budget}", f"The same, net of {grade} bins: ahead of best-of-N weighted at the same tokens", "not charged in the paper",
                          right - s.at_tokens(paid.mean()))  # fmt: skip
                behind["compute_optimal"].append({"of": title, "budget": budget, "grade": grade, "accuracy": right.mean(), "tokens": tokens.mean(),
                                                  "net_tokens": paid.mean(), "best_of_n_at_net": s.at_tokens(paid.mean()).mean()})  # fmt: skip
            table.add(f"3.{title}@{budget}", "Predicted bins give nearly what oracle bins give (within 0.02)", "largely overlapping",
                      gross["predicted"][0] - gross["oracle"][0] + 0.02)  # fmt: skip

    # 4, 5: beam against best-of-N
    for budget in s.budgets:
        for beam in [n for n in s.names(budget, "beam") if "lookahead" not in n]:
            ahead = s.row(budget, beam) - s.best_of_n(budget, "weighted")
            if budget == s.budgets[0]:
                table.add(f"4.low:{beam}", f"{beam} is ahead of best-of-{budget} weighted at low budget", "ahead", ahead)
            table.add(f"4.bins3-4:{beam}", f"{beam} is ahead of best-of-{budget} weighted in bins 3 and 4", "ahead", only(ahead, 3, 4))
    low = s.budgets[0]
    if len(s.budgets) > 1:
        beams = [(f"beam:{b}:4", b) for b in (low, top)]
        if all((b, name) in s.tried for name, b in beams):
            falls = s.row(low, beams[0][0]) - s.row(top, beams[1][0])
            table.add("5.beam", f"On easy bins (1, 2) beam degrades from a budget of {low} to {top}", "degrades", only(falls, 1, 2))
        rises = s.best_of_n(top, "weighted") - s.best_of_n(low, "weighted")
        table.add("5.best_of_n", f"On easy bins best-of-N does not degrade from {low} to {top} (within 0.02)", "does not", only(rises, 1, 2) + 0.02)

    # 6: lookahead
    for budget in s.budgets:
        beams, looks = [n for n in s.names(budget, "beam") if "look" not in n], [n for n in s.names(budget, "beam") if "look" in n]
        for look in looks:
            best = max(beams, key=lambda n: s.row(budget, n).mean())
            table.add(f"6.{look}", f"{look} loses to {best} at equal cost ({budget})", "loses", s.row(budget, best) - s.row(budget, look))

    # 7 - 10: revisions
    for budget in s.budgets:
        chain = f"revise:{budget}x1"
        if (budget, f"{chain}:weighted") not in s.tried:
            continue
        attempts = np.array([s.tried[budget, f"{chain}:weighted"][q].by_attempt for q in s.questions], dtype=float)
        if budget == max(b for b in s.budgets if (b, f"revise:{b}x1:weighted") in s.tried):
            behind["pass@1_by_attempt"] = attempts.mean(axis=0).tolist()
            if budget > 4:
                table.add("7.slope", f"The reviser's pass@1 rises: attempts 5 to {budget} over attempt 1", "rises", attempts[:, 4:].mean(axis=1) - attempts[:, 0])
            before, after = attempts[:, :-1], attempts[:, 1:]
            lost = ((before == 1) & (after == 0)).sum(axis=1) / np.where(before.sum(axis=1), before.sum(axis=1), np.nan)
            table.add("8.lost", "Share of right attempts that the next revision makes wrong", "0.38", lost, "share of right attempts")
            last = s.row(budget, f"{chain}:last")
            table.add("8.selection", "Selection over the chain recovers: weighted over the last attempt", "recovers", s.row(budget, f"{chain}:weighted") - last)
        for how in ("weighted", "majority"):
            parallel = f"revise:1x{budget}:{how}"
            if (budget, parallel) in s.tried:
                table.add(f"9.{how}@{budget}", f"Sequential beats parallel at {budget}, selected by {how}", "beats", s.row(budget, f"{chain}:{how}") - s.row(budget, parallel))
        ratios = [n for n in s.names(budget, "revise") if n.endswith(":weighted")]
        best = [max(ratios, key=lambda n: s.row(budget, n)[oracle == b].mean()) for b in range(1, BINS + 1)]
        behind.setdefault("best_ratio_by_bin", {})[budget] = best
        if f"revise:1x{budget}:weighted" in ratios:
            gain = s.row(budget, f"{chain}:weighted") - s.row(budget, f"revise:1x{budget}:weighted")
            table.add(f"10.easy@{budget}", "On the easiest two bins all sequential is at least as good as all parallel (within 0.02)", "all sequential", only(gain, 1, 2) + 0.02)

    # 14: the hardest bin
    at_most = {f"best_of_n:{most}:weighted": s.best_of_n(most, "weighted"), **{n: s.row(b, n) for b, n in s.tried if b == top}}
    best = max(at_most, key=lambda n: at_most[n][oracle == BINS].mean())
    table.add("14.hardest", f"In bin 5 even the best method ({best}) stays below 0.1", "no meaningful progress", 0.1 - only(at_most[best], BINS))
    behind["bins"] = {grade: s.bins(grade).tolist() for grade in ("oracle", "predicted", "probe")}
    behind["agreement"] = {grade: float(np.corrcoef(s.bins(grade), oracle)[0, 1]) for grade in ("predicted", "probe")}
    return table.claims, behind


def markdown(claims: Sequence[Claim], behind: dict, about: str) -> str:
    lines = ["# The paper's claims, measured", "", about, "", "| claim | paper | ours [95% interval] | verdict |", "|---|---|---|---|"]
    lines += [f"| {c.id}: {c.claim} | {c.paper} | {c.ours:+.3f} [{c.low:+.3f}, {c.high:+.3f}] {c.unit} | **{c.verdict}** |" for c in claims]
    lines += ["", "## Strategies at each budget", "", "| budget | strategy | accuracy | by bin, easy to hard | tokens | odd candidates | odd winners |", "|---|---|---|---|---|---|---|"]
    for r in behind["strategies"]:
        by_bin = " ".join(f"{x:.2f}" for x in r["by_bin"])
        lines.append(f"| {r['budget']} | {r['strategy']} | {r['accuracy']:.3f} | {by_bin} | {r['tokens']:,.0f} | {r['odd_candidates']:.2f} | {r['odd_winners']:.2f} |")
    lines += ["", "## Best-of-N", "", "| N | " + " | ".join(behind["best_of_n"]) + " |", "|---" * (1 + len(behind["best_of_n"])) + "|"]
    for n in next(iter(behind["best_of_n"].values())):
        lines.append(f"| {n} | " + " | ".join(f"{curve[n]:.3f}" for curve in behind["best_of_n"].values()) + " |")
    lines += ["", "## Compute-optimal, gross and net of difficulty", "", "| of | budget | bins | accuracy | tokens | net tokens | best-of-N weighted at net tokens |", "|---|---|---|---|---|---|---|"]
    lines += [f"| {r['of']} | {r['budget']} | {r['grade']} | {r['accuracy']:.3f} | {r['tokens']:,.0f} | {r['net_tokens']:,.0f} | {r['best_of_n_at_net']:.3f} |" for r in behind["compute_optimal"]]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = arguments(argv, "python -m eval.claims", __doc__.split("\n\n")[0])
    command = f"python -m eval.study {' '.join(argv)} && python -m eval.claims {' '.join(argv)}"
    try:
        rows = [read(args.run, args.round, title, kind) for title, (kind, _) in parts(args).items()]
        study = Study(*rows, seed=load(args.run / "recipe.yaml").seed)
        claims, behind = measure(study, command)
    except UserError as error:
        print(explain(error), file=sys.stderr)
        return 1
    about = f"{len(study.questions)} test questions, one training seed, round {args.round} of `{args.run}`. Written by `{command}`."
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "claims.json").write_text(json.dumps([asdict(c) for c in claims], indent=1) + "\n", encoding="utf-8")
    (RESULTS / "behind.json").write_text(json.dumps(behind, indent=1) + "\n", encoding="utf-8")
    text = markdown(claims, behind, about)
    (RESULTS / "CLAIMS.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
