"""The paper's claims on finished runs: python -m eval.claims RUN [RUN ...] [--round 1] (after eval.study of each, same sizes but for --questions)

Snell et al. 2024, one row a claim: what the paper has, what these runs (seeds) have with the 95%
interval, and whether it holds. Writes eval/results/claims.json, CLAIMS.md and pictures (of other
--budgets than the usual ones into a folder of their own). A figure is the mean of the runs' own, and
its interval a bootstrap over questions and runs; a run counts with the most questions that were drawn
of it. A plan is always chosen on one half of the questions and scored on the other.

A claim `holds` if its whole interval is on the claim's side, `fails` if it is wholly on the other
side, and is `undecided` otherwise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from eval import elsewhere, pictures, prompt_head, seeds
from eval.study import BUDGETS, Difficult, Drawn, Tried, arguments, largest, read_all
from flywheel.errors import UserError, explain
from flywheel.measure.bins import fixed_bins, quantile_bins
from flywheel.measure.stats import bootstrap_runs
from flywheel.models.weights import parameters
from flywheel.recipe import load
from flywheel.records import ModelRef
from flywheel.runs.files import plain
from flywheel.runs.history import History
from flywheel.search.plan import KINDS, Trial, held_out, most_right, name
from flywheel.search.select import argmax, majority, weighted

RESULTS = Path("eval/results")
BINS = 5
PROBE = 4  # samples
LOW = 16  # generations
SERVED = (100, 10_000, 1_000_000)  # questions
Select = Callable[[Sequence[Drawn]], str | None]
GRADES = ("oracle", "predicted", "probe", "prompt", "label")  # of difficulty, by falling cost
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
    runs: list[float]  # each run alone
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
            out[how] = {
                n: np.array([self._accuracy(self.pools[q], n, select) for q in self.questions]) for n in self.sizes
            }
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
        """Mean tokens of n samples of each question, over the disjoint groups of its pool; judged unless a majority decides."""
        return self._cost[select != "majority", False][n]

    @cached_property
    def _cost(self) -> dict[tuple[bool, bool], dict[int, np.ndarray]]:
        """(judged, without what a cache served) -> n -> tokens of each question."""
        cases = [(judge, computed) for judge in (False, True) for computed in (False, True)]
        return {
            case: {n: np.array([self._spent(self.pools[q], n, *case) for q in self.questions]) for n in self.sizes}
            for case in cases
        }

    @staticmethod
    def _spent(pool: Sequence[Drawn], n: int, judge: bool, computed: bool) -> float:
        """A pool judges equal solutions once, and so does each group of n by itself: equal are those of one answer and one score."""
        first: dict[tuple, Drawn] = {}
        for d in pool:
            if d.score_cost:
                first.setdefault((d.answer, d.score), d)
        cached = lambda d: min(d.cached, d.cost) if computed else 0
        groups = [pool[start : start + n] for start in range(0, len(pool) - n + 1, n)]
        sampled = np.mean([sum(d.cost - cached(d) for d in group) for group in groups])
        keys = [{(d.answer, d.score) for d in group if d.answer is not None} for group in groups]
        return float(
            sampled + judge * np.mean([sum(first[key].score_cost for key in group if key in first) for group in keys])
        )

    def best_of_n_computed(self, n: int) -> float:
        """Mean tokens of n judged samples without what the prefix cache served."""
        return float(self._cost[True, True][n].mean())

    # ---- the other strategies ----

    def row(self, budget: int, strategy: str, what: str = "correct") -> np.ndarray:
        return np.array([float(getattr(self.tried[budget, strategy][q], what)) for q in self.questions])

    def computed(self, budget: int, strategy: str) -> float:
        """Mean tokens without what the prefix cache served."""
        return float((self.row(budget, strategy, "tokens") - self.row(budget, strategy, "cached")).mean())

    def names(self, budget: int, kind: str) -> list[str]:
        return [s for b, s in self.tried if b == budget and s.startswith(kind)]

    # ---- difficulty and plans ----

    def ease(self, grade: str) -> dict[str, float]:
        """What the grade says of each question: more is easier."""
        rate = {
            "oracle": lambda d: d.right / d.samples,
            "predicted": lambda d: d.seen,
            "probe": lambda d: self.probe(d.question_id),
            "prompt": lambda d: -d.said,
            "label": lambda d: -d.level,
        }[grade]
        return {q: float(rate(d)) for q, d in self.difficult.items()}

    def bins(self, grade: str) -> np.ndarray:
        """Quantile bins, 1 the easiest; the prompt's own bins as they were said."""
        if grade == "prompt":
            return np.array([self.difficult[q].said for q in self.questions])
        found = quantile_bins(self.ease(grade), BINS)
        return np.array([found[q] for q in self.questions])

    def probe(self, question: str) -> float:
        """The mean PRM score of the first samples of the pool."""
        return float(np.mean([d.score for d in self.pools[question][:PROBE]]))

    def grade_tokens(self, grade: str) -> np.ndarray:
        """What each question pays for its bin: never shared with others."""
        if grade == "probe":
            return np.array(
                [sum(d.cost + d.score_cost for d in self.pools[q][:PROBE]) for q in self.questions], dtype=float
            )
        paid = {
            "oracle": lambda d: d.tokens,
            "predicted": lambda d: d.judged_tokens,
            "prompt": lambda d: d.said_tokens,
            "label": lambda d: 0,
        }[grade]
        return np.array([float(paid(self.difficult[q])) for q in self.questions])

    def compute_optimal(
        self, budget: int, kinds: Sequence[str], grade: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(accuracy, tokens, tokens with the bin paid for) of each question under the plan chosen without it.

        Best-of-N is always among the choices. It takes a probe's samples for its first ones, so
        they are paid once; what its vote does not need of them, the judging, is paid beside.
        """
        bins, trials = self.bins(grade), []
        rows = [
            (f"best_of_n:{budget}:{how}", self.best_of_n(budget, how), self.best_of_n_tokens(budget, how))
            for how in ("weighted", "majority")
        ]
        rows += [
            (s, self.row(budget, s), self.row(budget, s, "tokens")) for kind in kinds for s in self.names(budget, kind)
        ]
        for strategy, correct, tokens in rows:
            trials += [
                Trial(q, int(b), budget, strategy, c, 0, t) for q, b, c, t in zip(self.questions, bins, correct, tokens)
            ]
        served = {
            t.question_id: t
            for t in held_out(trials, partial(most_right, models={}, bins=BINS), seed=self.seed)[budget]
        }
        right, tokens = (
            np.array([float(getattr(served[q], what)) for q in self.questions]) for what in ("correct", "tokens")
        )
        paid = self.grade_tokens(grade)
        if grade == "probe":
            for i, q in enumerate(self.questions):
                if served[q].strategy.startswith("best_of_n"):
                    first = self.pools[q][: min(PROBE, budget)]
                    judged = not served[q].strategy.endswith("majority")
                    paid[i] -= sum(d.cost + judged * d.score_cost for d in first)
        return right, tokens, tokens + paid

    def at_tokens(self, tokens: float, select: str = "weighted", computed: bool = False) -> np.ndarray:
        """Best-of-N's accuracy of each question for a mean of so many tokens (`computed`: of those that no cache served).

        Between the measured N on a log scale; NaN beyond the pool, where nothing is known.
        """
        grid = np.log(
            [self.best_of_n_computed(n) if computed else self.best_of_n_tokens(n, select).mean() for n in self.sizes]
        )
        if np.log(tokens) > grid[-1]:
            return np.full(len(self.questions), np.nan)
        at = np.clip(np.log(tokens), grid[0], grid[-1])
        high = int(np.clip(np.searchsorted(grid, at), 1, len(grid) - 1))
        part = (at - grid[high - 1]) / (grid[high] - grid[high - 1])
        return (1 - part) * self.best_of_n(self.sizes[high - 1], select) + part * self.best_of_n(
            self.sizes[high], select
        )

    def tokens_for(self, accuracy: float, select: str = "weighted") -> float:
        """Mean tokens at which best-of-N first reaches this mean accuracy, on a log scale; infinity if it does not within the pool."""
        cost = [self.best_of_n_tokens(n, select).mean() for n in self.sizes]
        right = [self.best_of_n(n, select).mean() for n in self.sizes]
        for i, reached in enumerate(right):
            if reached >= accuracy:
                if i == 0:
                    return cost[0]
                part = (accuracy - right[i - 1]) / (reached - right[i - 1])
                return float(np.exp(np.log(cost[i - 1]) + part * (np.log(cost[i]) - np.log(cost[i - 1]))))
        return float("inf")

    def best_of(self, names: Sequence[str], budget: int) -> np.ndarray:
        """Accuracy of each question by the strategy of `names` that did best on the other half of the questions."""
        rows, out = [self.row(budget, name) for name in names], np.zeros(len(self.questions))
        order = np.random.default_rng(self.seed).permutation(len(out))
        for fit, use in ((order[::2], order[1::2]), (order[1::2], order[::2])):
            out[use] = max(rows, key=lambda row: row[fit].mean())[use]
        return out

    def cheapest(self, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """(accuracy less `target`'s, tokens) of each question, by the cheapest strategy whose accuracy reaches it on the other half."""
        options = {
            f"best_of_n:{n}:{how}": (self.best_of_n(n, how), self.best_of_n_tokens(n, how))
            for n in self.sizes
            for how in ("weighted", "majority")
        }
        options |= {name: (self.row(b, name), self.row(b, name, "tokens")) for b, name in self.tried}
        ahead, tokens, chosen = np.zeros(len(target)), np.zeros(len(target)), []
        order = np.random.default_rng(self.seed).permutation(len(target))
        for fit, use in ((order[::2], order[1::2]), (order[1::2], order[::2])):
            fitting = {
                name: t[fit].mean() for name, (right, t) in options.items() if right[fit].mean() >= target[fit].mean()
            }
            name = min(fitting, key=fitting.__getitem__)
            right, spent = options[name]
            ahead[use], tokens[use] = right[use] - target[use], spent[use]
            chosen.append(name)
        return ahead, tokens, chosen


def judge(low: float, high: float, zero: float = 0.0) -> str:
    return "holds" if low > zero else "fails" if high < zero else "undecided"


@dataclass(frozen=True)
class Row:
    """A claim that the mean of `values` over questions is above `zero`; NaN questions do not count."""

    claim: str
    paper: str
    values: np.ndarray
    unit: str
    zero: float


class Table:
    """One run's rows by claim id."""

    def __init__(self):
        self.rows: dict[str, Row] = {}

    def over(self, own: Sequence[str], every: Sequence[str]) -> Table:
        """The rows of the questions `own` as rows of `every`: silent about the others."""
        place, out = [every.index(question) for question in own], Table()
        for id, row in self.rows.items():
            values = np.full(len(every), np.nan)
            values[place] = row.values
            out.rows[id] = replace(row, values=values)
        return out

    def add(
        self, id: str, claim: str, paper: str, values: np.ndarray, unit: str = "accuracy", zero: float = 0.0
    ) -> None:
        self.rows[id] = Row(claim, paper, np.asarray(values, dtype=float), unit, zero)


def combine(tables: Sequence[Table], command: str, seed: int = 0) -> list[Claim]:
    """Each claim over all runs that speak of it; their rows are of the same questions in one order."""
    claims = []
    for id in dict.fromkeys(id for table in tables for id in table.rows):
        rows = [row for table in tables if (row := table.rows.get(id)) and not np.isnan(row.values).all()]
        if not rows:
            continue
        first, runs = rows[0], [float(np.nanmean(row.values)) for row in rows]
        mean, low, high = bootstrap_runs([row.values for row in rows], seed=seed)
        claims.append(
            Claim(
                id, first.claim, first.paper, mean, low, high, judge(low, high, first.zero), first.unit, runs, command
            )
        )
    return claims


def measure(study: Study) -> tuple[Table, dict]:
    """All claims that one run's study can speak to, and the tables behind them."""
    table, s = Table(), study
    top, most = s.budgets[-1], s.sizes[-1]
    oracle = s.bins("oracle")
    only = lambda values, *bins: np.where(np.isin(oracle, bins), values, np.nan)
    behind: dict = {
        "best_of_n": {how: {n: s.best_of_n(n, how).mean() for n in s.sizes} for how in SELECT},
        "strategies": [],
        "compute_optimal": [],
    }
    behind["best_of_n_tokens"] = {n: s.best_of_n_tokens(n, "weighted").mean() for n in s.sizes}

    for budget in s.budgets:
        for strategy in [tried for b, tried in s.tried if b == budget]:
            right, by_bin = s.row(budget, strategy), []
            by_bin = [float(right[oracle == b].mean()) for b in range(1, BINS + 1)]
            odd = [t.odd for t in s.tried[budget, strategy].values()]
            winners = [t.winner not in ("", "none") for t in s.tried[budget, strategy].values()]
            behind["strategies"].append(
                {
                    "budget": budget,
                    "strategy": strategy,
                    "accuracy": right.mean(),
                    "by_bin": by_bin,
                    "tokens": s.row(budget, strategy, "tokens").mean(),
                    "computed": s.computed(budget, strategy),
                    "odd_candidates": float(np.mean(odd)),
                    "odd_winners": float(np.mean(winners)),
                }
            )

    # 1, 2: compute-optimal against best-of-N; 3: predicted bins
    for number, title, kinds in (
        ("1", "search", ["beam"]),
        ("2", "revisions", ["revise"]),
        ("1+2", "of all strategies", ["beam", "revise", "adaptive"]),
    ):
        if not s.names(top, kinds[0]) or (number == "1+2" and not s.names(top, "revise")):
            continue
        reached = {}
        for budget in s.budgets:
            gross = {grade: s.compute_optimal(budget, kinds, grade) for grade in GRADES}
            right = reached[budget] = gross["oracle"][0]
            table.add(
                f"{number}.gross@{budget}",
                f"Compute-optimal {title} of {budget} is ahead of best-of-{budget} weighted (oracle bins, difficulty free)",
                "ahead",
                right - s.best_of_n(budget, "weighted"),
            )
            if 4 * budget in s.sizes:
                table.add(
                    f"{number}.quarter@{budget}",
                    f"Compute-optimal {title} of {budget} matches best-of-{4 * budget} weighted (within 0.02)",
                    "16 against 64",
                    right - s.best_of_n(4 * budget, "weighted") + 0.02,
                )
            for grade, (right, tokens, paid) in gross.items():
                table.add(
                    f"{number}.net-{grade}@{budget}",
                    f"The same, net of {grade} bins: ahead of best-of-N weighted at the same tokens",
                    "not charged in the paper",
                    right - s.at_tokens(paid.mean()),
                )
                behind["compute_optimal"].append(
                    {
                        "of": title,
                        "budget": budget,
                        "grade": grade,
                        "accuracy": right.mean(),
                        "tokens": tokens.mean(),
                        "net_tokens": paid.mean(),
                        "best_of_n_at_net": s.at_tokens(paid.mean()).mean(),
                        "best_of_n_needs": s.tokens_for(right.mean()),
                    }
                )
            table.add(
                f"3.{title}@{budget}",
                "Predicted bins give nearly what oracle bins give (within 0.02)",
                "largely overlapping",
                gross["predicted"][0] - gross["oracle"][0] + 0.02,
            )

        for fewer, more in pairwise(s.budgets) if number == "2" else ():
            table.add(
                f"2.goes_on@{more}",
                f"Compute-optimal revisions gain more from {fewer} to {more} than best-of-N weighted does",
                "goes on where parallel plateaus",
                reached[more] - reached[fewer] - s.best_of_n(more, "weighted") + s.best_of_n(fewer, "weighted"),
            )

    # adaptive sampling bins nothing: what it spends is all it costs
    for budget in s.budgets:
        for tried in s.names(budget, "adaptive"):
            spent = s.row(budget, tried, "tokens").mean()
            table.add(
                f"adaptive:{tried}",
                f"{tried}: ahead of best-of-N weighted at the same tokens",
                "left open",
                s.row(budget, tried) - s.at_tokens(spent),
            )
    if 64 in s.sizes:
        target = s.best_of_n(64, "weighted")
        ahead, tokens, chosen = s.cheapest(target)
        share = tokens / s.best_of_n_tokens(64, "weighted").mean()
        table.add(
            "goal.accuracy",
            "The cheapest strategy that reaches best-of-64 weighted on one half of the questions matches it on the other (within 0.02)",
            "our goal",
            ahead + 0.02,
        )
        table.add(
            "goal.tokens",
            "and costs at most a quarter of its tokens (a quarter less its share)",
            "our goal",
            0.25 - share,
            "share of tokens",
        )
        behind["goal"] = {"strategies": chosen, "share": float(share.mean())}

    # 4, 5: beam against best-of-N
    for budget in s.budgets:
        for beam in [n for n in s.names(budget, "beam") if "lookahead" not in n]:
            ahead = s.row(budget, beam) - s.best_of_n(budget, "weighted")
            if budget == s.budgets[0] and budget <= LOW:
                table.add(
                    f"4.low:{beam}", f"{beam} is ahead of best-of-{budget} weighted at low budget", "ahead", ahead
                )
            spent = s.row(budget, beam, "tokens").mean()
            table.add(
                f"4.tokens:{beam}",
                f"{beam} is ahead of best-of-N weighted at the same tokens",
                "not charged in the paper",
                s.row(budget, beam) - s.at_tokens(spent),
            )
            spent = s.computed(budget, beam)
            table.add(
                f"4.computed:{beam}",
                "and at the same tokens that no prefix cache served",
                "not charged in the paper",
                s.row(budget, beam) - s.at_tokens(spent, computed=True),
            )
            table.add(
                f"4.bins3-4:{beam}",
                f"{beam} is ahead of best-of-{budget} weighted in bins 3 and 4",
                "ahead",
                only(ahead, 3, 4),
            )
    low = s.budgets[0]
    if len(s.budgets) > 1:
        beams = [(f"beam:{b}:4", b) for b in (low, top)]
        if all((b, name) in s.tried for name, b in beams):
            falls = s.row(low, beams[0][0]) - s.row(top, beams[1][0])
            table.add(
                "5.beam",
                f"On easy bins (1, 2) beam degrades from a budget of {low} to {top}",
                "degrades",
                only(falls, 1, 2),
            )
        rises = s.best_of_n(top, "weighted") - s.best_of_n(low, "weighted")
        table.add(
            "5.best_of_n",
            f"On easy bins best-of-N does not degrade from {low} to {top} (within 0.02)",
            "does not",
            only(rises, 1, 2) + 0.02,
        )

    # 6: lookahead
    for budget in s.budgets:
        plain_beam = f"beam:{budget}:{min(4, budget)}"
        for look in [n for n in s.names(budget, "beam") if "look" in n]:
            table.add(
                f"6.{look}",
                f"{look} loses to {plain_beam} at equal cost ({budget})",
                "loses",
                s.row(budget, plain_beam) - s.row(budget, look),
            )

    # 7 - 10: revisions
    for budget in s.budgets:
        chain = f"revise:{budget}x1"
        if (budget, f"{chain}:weighted") not in s.tried:
            continue
        attempts = np.array([s.tried[budget, f"{chain}:weighted"][q].by_attempt for q in s.questions], dtype=float)
        if budget == max(b for b in s.budgets if (b, f"revise:{b}x1:weighted") in s.tried):
            behind["pass@1_by_attempt"] = attempts.mean(axis=0).tolist()
            if budget > 4:
                table.add(
                    "7.slope",
                    f"The reviser's pass@1 rises: attempts 5 to {budget} over attempt 1",
                    "rises",
                    attempts[:, 4:].mean(axis=1) - attempts[:, 0],
                )
            before, after = attempts[:, :-1], attempts[:, 1:]
            lost = ((before == 1) & (after == 0)).sum(axis=1) / np.where(before.sum(axis=1), before.sum(axis=1), np.nan)
            table.add(
                "8.lost",
                "Right attempts are revised into wrong ones, in more than a tenth of cases",
                "0.38",
                lost,
                "share of right attempts",
                zero=0.1,
            )
            last = s.row(budget, f"{chain}:last")
            table.add(
                "8.selection",
                "Selection over the chain recovers: weighted over the last attempt",
                "recovers",
                s.row(budget, f"{chain}:weighted") - last,
            )
        for how in ("weighted", "majority"):
            parallel = f"revise:1x{budget}:{how}"
            if (budget, parallel) in s.tried:
                table.add(
                    f"9.{how}@{budget}",
                    f"Sequential beats parallel at {budget}, selected by {how}",
                    "beats",
                    s.row(budget, f"{chain}:{how}") - s.row(budget, parallel),
                )
        ratios = [n for n in s.names(budget, "revise") if n.endswith(":weighted")]
        best = [max(ratios, key=lambda n: s.row(budget, n)[oracle == b].mean()) for b in range(1, BINS + 1)]
        behind.setdefault("best_ratio_by_bin", {})[budget] = best
        if f"revise:1x{budget}:weighted" in ratios:
            table.add(
                f"10.ratio@{budget}",
                f"The best ratio of sequential to parallel at {budget} is ahead of all parallel",
                "ahead",
                s.best_of(ratios, budget) - s.row(budget, f"revise:1x{budget}:weighted"),
            )
            gain = s.row(budget, f"{chain}:weighted") - s.row(budget, f"revise:1x{budget}:weighted")
            table.add(
                f"10.easy@{budget}",
                "On the easiest two bins all sequential is at least as good as all parallel (within 0.02)",
                "all sequential",
                only(gain, 1, 2) + 0.02,
            )

    # 14: the hardest bin
    at_most = {
        f"best_of_n:{most}:weighted": s.best_of_n(most, "weighted"),
        **{n: s.row(b, n) for b, n in s.tried if b == top},
    }
    best = max(at_most, key=lambda n: at_most[n][oracle == BINS].mean())
    table.add(
        "14.hardest",
        f"In bin 5 even the best method ({best}) stays below 0.1",
        "no meaningful progress",
        0.1 - only(at_most[best], BINS),
    )
    truth = [s.ease("oracle")[q] for q in s.questions]
    behind["difficulty"] = [
        {
            "grade": grade,
            "spearman": float(spearmanr([s.ease(grade)[q] for q in s.questions], truth).statistic),
            "same_bin": float((s.bins(grade) == oracle).mean()),
            "tokens": float(s.grade_tokens(grade).mean()),
            "confusion": [
                [int(((oracle == a) & (s.bins(grade) == b)).sum()) for b in range(1, BINS + 1)]
                for a in range(1, BINS + 1)
            ],
        }
        for grade in GRADES
    ]
    return table, behind


# ---- what is paid once, and what rounds change ---------------------------------------------


def fixed_tokens(run: Path, round: int) -> dict[str, float]:
    """What a round pays once, in tokens of inference (FLOPs over 2N): the PRM, the reviser, the calibration, the prompt's head."""
    recipe = load(run / "recipe.yaml")
    each = 2 * parameters(ModelRef("base", recipe.model.base))
    parts = {"prm": ("label", "train_prm"), "reviser": ("train_reviser", "choose_reviser"), "calibrate": ("calibrate",)}
    rows = [row for row in History.of(run).ledger if row["round"] == round]
    found = {part: sum(row["flops"] for row in rows if row["stage"] in stages) / each for part, stages in parts.items()}
    head = json.loads((prompt_head.folder(run, round) / "report.json").read_text(encoding="utf-8"))
    return {**found, "prompt_head": 6 * head["parameters"] * head["tokens"] / each}  # training: 6 N a token


def amortise(behind: dict, fixed: dict[str, float]) -> None:
    """Net tokens a question at 10^2, 10^4 and 10^6 questions served, and where a plan breaks even.

    Compared with best-of-N weighted, which needs a PRM too: what comes on top is the calibration, and
    the reviser where a plan may use it. A question's own difficulty is paid in full by each.
    """
    for row in behind["compute_optimal"]:
        once = (
            fixed["calibrate"]
            + (fixed["reviser"] if row["of"] != "search" else 0.0)
            + (fixed["prompt_head"] if row["grade"] == "prompt" else 0.0)
        )
        row["net_by_served"] = {str(served): row["net_tokens"] + once / served for served in SERVED}
        saved = row["best_of_n_needs"] - row["net_tokens"]
        row["break_even"] = (
            0.0 if saved == float("inf") else once / saved if saved > 1e-6 * row["net_tokens"] else float("inf")
        )  # a plan of best-of-N saves a rounding error


def routing(run: Path) -> list[dict]:
    """Claim 16: by round, what the plan at the search budget adds to single samples in each fixed bin of round 0, and the plan."""
    history, out = History.of(run), []
    edges = load(run / "recipe.yaml").calibrate.edges
    last = max(history.rounds)
    reader = seeds.context(run, last)
    start = fixed_bins(seeds.test_rates(reader, 0, "bin"), edges)
    for r in range(1, last + 1):
        single, found = seeds.test_rates(reader, r - 1), seeds.answers(reader, r)
        method = next(m for m in found if m.startswith("compute_optimal") and m.endswith("oracle"))
        inside = [[q for q in found[method] if start[q] == b] for b in range(1, len(edges) + 2)]
        mean = lambda values, questions: float(np.mean([values[q] for q in questions] or [np.nan]))
        plan = {
            e["bin"]: name(KINDS[e["strategy"]["kind"]](**{k: v for k, v in e["strategy"].items() if k != "kind"}))
            for e in history.figures("calibrate", r)["serve"]["entries"]
            if e["budget"] == int(method.split("@")[1].split("_")[0])
        }
        out.append(
            {
                "round": r,
                "single": [mean(single, q) for q in inside],
                "searched": [mean(found[method], q) for q in inside],
                "plan": list(plan.values()),
            }
        )
    return out


def over_rounds(run: Path) -> Table:
    """Claims 14 and 15: what the rounds before and after are to each other, question by question."""
    table, last = Table(), max(History.of(run).rounds)
    reader = seeds.context(run, last)
    questions = sorted(seeds.test_rates(reader, 0))
    at = {(r, draw): seeds.test_rates(reader, r, draw) for r, draw in ((0, "bin"), (0, "score"), (last, "score"))}
    rates = lambda r, draw="score": np.array([at[r, draw][q] for q in questions])
    of = f"{len(questions)} evaluated questions"
    hardest = (
        np.array(
            list(fixed_bins(dict(zip(questions, rates(0, "bin"))), load(run / "recipe.yaml").calibrate.edges).values())
        )
        == BINS
    )
    table.add(
        "14.rounds",
        f"Over {last} rounds single samples gain in fixed bin 5 of round 0 (against round 0 sampled anew; {of})",
        "named only",
        np.where(hardest, rates(last) - rates(0), np.nan),
        "pass@1",
    )
    found = seeds.answers(reader, 1)
    search = max(
        (m for m in found if m.startswith("best_of_n_weighted@") and m.count("@") == 1 and "verifier" not in m),
        key=lambda m: int(m.split("@")[1]),
    )
    table.add(
        "15.singles",
        f"Single samples after round {last} are ahead of round 1's search ({search}; {of})",
        "named only",
        rates(last) - np.array([found[search][q] for q in questions]),
    )
    return table


def multiplier(times: float, ratio: float) -> float:
    """How many times the inference FLOPs a small model may spend to match a model `times` its size (Snell et al., 7).

    A model of M N parameters costs 6 M N D_pre + 2 M N D_inf; the small one, 6 N D_pre + m 2 N D_inf. With
    R = D_inf / D_pre = `ratio`, m = M + 3 (M - 1) / R.
    """
    return times + 3 * (times - 1) / ratio


# ---- what a person reads -------------------------------------------------------------------


def number(value: float) -> str:
    return "never" if value == float("inf") else f"{value:,.0f}"


def markdown(claims: Sequence[Claim], behind: Sequence[dict], about: str) -> str:
    """The claims over all runs; the tables behind them are the first run's."""
    first = behind[0]
    lines = [
        "# The paper's claims, measured",
        "",
        about,
        "",
        "| claim | paper | ours [95% interval] | each run | verdict |",
        "|---|---|---|---|---|",
    ]
    for c in claims:
        runs = " ".join(f"{x:+.3f}" for x in c.runs)
        lines.append(
            f"| {c.id}: {c.claim} | {c.paper} | {c.ours:+.3f} [{c.low:+.3f}, {c.high:+.3f}] {c.unit} | {runs} | **{c.verdict}** |"
        )
    lines += [
        "",
        "The tables below are of the first run.",
        "",
        "## Difficulty",
        "",
        "| grade | Spearman with oracle | same bin | tokens a question | confusion (row: oracle bin) |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['grade']} | {r['spearman']:.3f} | {r['same_bin']:.2f} | {r['tokens']:,.0f} | {' / '.join(' '.join(map(str, row)) for row in r['confusion'])} |"
        for r in first["difficulty"]
    ]
    lines += [
        "",
        "## Strategies at each budget",
        "",
        "| budget | strategy | accuracy | by bin, easy to hard | tokens | of them computed | odd candidates | odd winners |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in first["strategies"]:
        by_bin = " ".join(f"{x:.2f}" for x in r["by_bin"])
        lines.append(
            f"| {r['budget']} | {r['strategy']} | {r['accuracy']:.3f} | {by_bin} | {r['tokens']:,.0f} | {r['computed']:,.0f} | {r['odd_candidates']:.2f} | {r['odd_winners']:.2f} |"
        )
    lines += [
        "",
        "## Best-of-N",
        "",
        "| N | " + " | ".join(first["best_of_n"]) + " | tokens (weighted) |",
        "|---" * (2 + len(first["best_of_n"])) + "|",
    ]
    for n in next(iter(first["best_of_n"].values())):
        lines.append(
            f"| {n} | "
            + " | ".join(f"{curve[n]:.3f}" for curve in first["best_of_n"].values())
            + f" | {first['best_of_n_tokens'][n]:,.0f} |"
        )
    lines += [
        "",
        "## Compute-optimal, gross and net of difficulty",
        "",
        "Tokens a question. `needs`: what best-of-N weighted spends for the same accuracy. Net of its bin for every question; calibration and the",
        "reviser's training are shared by the questions served. `break-even`: served questions from which the plan is cheaper than best-of-N.",
        "",
        "| of | budget | bins | accuracy | gross | net | needs | ratio, gross | ratio, net | net at 10^2 | 10^4 | 10^6 | break-even |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in first["compute_optimal"]:
        served = " | ".join(number(r["net_by_served"][str(n)]) for n in SERVED)
        ratio = lambda tokens: (
            "above 256" if r["best_of_n_needs"] == float("inf") else f"{r['best_of_n_needs'] / tokens:.2f}"
        )
        lines.append(
            f"| {r['of']} | {r['budget']} | {r['grade']} | {r['accuracy']:.3f} | {r['tokens']:,.0f} | {r['net_tokens']:,.0f} | {number(r['best_of_n_needs'])} |"
            f" {ratio(r['tokens'])} | {ratio(r['net_tokens'])} | {served} | {number(r['break_even'])} |"
        )
    lines += [
        "",
        "## Paid once",
        "",
        "In tokens of inference of the same FLOPs: "
        + ", ".join(f"{part} {tokens:,.0f}" for part, tokens in first["fixed"].items())
        + ".",
    ]
    if "goal" in first:
        lines += [
            "",
            f"Best-of-64 weighted's accuracy at {first['goal']['share']:.3f} of its tokens, by {' and '.join(first['goal']['strategies'])} (chosen on the other half of the questions).",
        ]
    if "best_ratio_by_bin" in first:
        lines += [
            "",
            "## Sequential to parallel",
            "",
            "| budget | best ratio by oracle bin, easy to hard |",
            "|---|---|",
        ]
        lines += [
            f"| {budget} | {' '.join(n.split(':')[1] for n in best)} |"
            for budget, best in first["best_ratio_by_bin"].items()
        ]
    if "pass@1_by_attempt" in first:
        lines += ["", "pass@1 along the longest chain: " + " ".join(f"{x:.2f}" for x in first["pass@1_by_attempt"])]
    lines += [
        "",
        "## Routing and capability, by round (claim 16)",
        "",
        "| round | single samples, by fixed bin | compute-optimal (oracle bins) | added | plan, easiest bin first |",
        "|---|---|---|---|---|",
    ]
    row = lambda values: " ".join(f"{x:.2f}" for x in values)
    for r in first["routing"]:
        added = " ".join(f"{b - a:+.2f}" for a, b in zip(r["single"], r["searched"]))
        lines.append(f"| {r['round']} | {row(r['single'])} | {row(r['searched'])} | {added} | {', '.join(r['plan'])} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = arguments(argv, "python -m eval.claims", __doc__.split("\n\n")[0])
    try:
        usual = args.budgets == list(BUDGETS)
        results = RESULTS if usual else RESULTS / f"budgets_{'_'.join(map(str, args.budgets))}"
        measured, rounds, others = [], [], list(elsewhere.kept(RESULTS)) if usual else []
        asked = [(run, largest(run, args)) for run in args.runs]
        options = [arg for arg in argv if arg not in map(str, args.runs)]
        sizes = [
            [] if of_run.questions == args.questions else ["--questions", str(of_run.questions)] for _, of_run in asked
        ]
        drawn = [
            f"python -m eval.study {' '.join([str(run), *options, *size])}" for (run, _), size in zip(asked, sizes)
        ]
        command = " && ".join([*drawn, f"python -m eval.claims {' '.join(argv)}"])
        for run, of_run in asked:
            study = Study(*read_all(run, of_run), seed=load(run / "recipe.yaml").seed)
            table, behind = measure(study)
            behind["fixed"], behind["routing"] = fixed_tokens(run, args.round), routing(run)
            amortise(behind, behind["fixed"])
            measured.append((study.questions, table, behind))
            rounds.append(over_rounds(run))
        every = sorted({question for questions, _, _ in measured for question in questions})
        claims = combine([table.over(questions, every) for questions, table, _ in measured], command) + combine(
            rounds, command
        )
        for (id, claim, paper, (mean, low, high), unit, runs), by in others:
            claims.append(Claim(id, claim, paper, mean, low, high, judge(low, high), unit, list(runs), by))
    except UserError as error:
        print(explain(error), file=sys.stderr)
        return 1
    behind = [behind for _, _, behind in measured]
    if (matched := results / "flops_matched.json").is_file():
        behind[0]["flops_matched"] = json.loads(matched.read_text(encoding="utf-8"))
    names = ", ".join(f"`{run.name}` on {len(questions)}" for run, (questions, _, _) in zip(args.runs, measured))
    about = f"{len(every)} test questions; {len(args.runs)} training {'seed' if len(args.runs) == 1 else 'seeds'} ({names}), round {args.round}. Written by `{command}`."
    results.mkdir(parents=True, exist_ok=True)
    (results / "claims.json").write_text(json.dumps([asdict(c) for c in claims], indent=1) + "\n", encoding="utf-8")
    (results / "behind.json").write_text(json.dumps(plain(behind), indent=1) + "\n", encoding="utf-8")
    text = markdown(claims, behind, about)
    (results / "CLAIMS.md").write_text(text, encoding="utf-8")
    pictures.draw(behind[0], results)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
