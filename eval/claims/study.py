"""The study data of one run as arrays over its test questions, from which the claims are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from eval.curves import SELECT, is_right
from eval.draws import Difficult, Drawn, Tried
from flywheel.errors import UserError
from flywheel.measure.bins import quantile_bins
from flywheel.records import Role
from flywheel.search.best_of_n import BestOfN
from flywheel.search.plan import Trial, held_out, most_right
from flywheel.search.revise import Revise
from flywheel.search.strategy import Strategy

T = TypeVar("T")
BINS = 5
PROBE = 4  # samples
GRADES = ("oracle", "predicted", "probe", "prompt", "label")  # estimates of difficulty, by descending cost


@dataclass(frozen=True)
class Planned:
    """Results per question of the plan chosen without it. `net`: tokens including the estimate of its difficulty."""

    right: np.ndarray
    tokens: np.ndarray
    net: np.ndarray


class Study:
    """The study data of one run. Arrays are over `questions`, in that order; bins count from 1 (easiest).

    Raises UserError if the parts cover different questions.
    """

    def __init__(self, difficult: Sequence[Difficult], drawn: Sequence[Drawn], tried: Sequence[Tried], seed: int = 0):
        self.questions = sorted(d.question_id for d in difficult)
        self.seed, by_id = seed, {d.question_id: d for d in difficult}
        self.difficult = [by_id[q] for q in self.questions]
        pools: dict[str, list[Drawn]] = {q: [] for q in self.questions}
        for d in drawn:
            pools[d.question_id].append(d)
        self.pools = list(pools.values())
        lengths = {len(pool) for pool in self.pools}
        if len(lengths) != 1 or {t.question_id for t in tried} != set(self.questions):
            raise UserError("the parts of this study are of different questions; draw them with the same --questions")
        self.sizes = [2**i for i in range(20) if 2**i <= min(lengths)]  # values of N for best-of-N
        found: dict[tuple[int, Strategy], dict[str, Tried]] = {}
        for t in tried:
            found.setdefault((t.budget, t.strategy), {})[t.question_id] = t
        self.tried = {key: [rows[q] for q in self.questions] for key, rows in found.items()}
        self.budgets = sorted({budget for budget, _ in self.tried})
        self.kept: dict[tuple, Any] = {}

    def over(self, value: Callable[..., float], items: Sequence) -> np.ndarray:
        return np.array([float(value(item)) for item in items])

    def halves(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Two folds of (indices to choose on, indices to score): each half of the questions is scored once."""
        order = np.random.default_rng(self.seed).permutation(len(self.questions))
        yield order[::2], order[1::2]
        yield order[1::2], order[::2]

    def once(self, *key: object, make: Callable[[], T]) -> T:
        """The result of `make`, cached by `key`."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    # ---- best-of-N, from the pool ----

    def best_of_n(self, n: int, select: str) -> np.ndarray:
        """Accuracy per question: the mean over the disjoint groups of n samples in its pool."""

        def accuracy(pool: Sequence[Drawn]) -> float:
            return np.mean([is_right(group, SELECT[select]) for group in groups(pool, n)])

        return self.once("right", n, select, make=lambda: self.over(accuracy, self.pools))

    def best_of_n_tokens(self, n: int, select: str, computed: bool = False) -> np.ndarray:
        """Mean tokens per question of n samples, over the groups of its pool, with scoring unless a majority decides.

        `computed`: without tokens that the prefix cache served.
        """
        judge = select != "majority"
        cost = partial(spent, n=n, judge=judge, computed=computed)
        return self.once("tokens", n, judge, computed, make=lambda: self.over(cost, self.pools))

    # ---- parallel samples, the baseline of every claim: best-of-N weighted of the policy or of the reviser ----

    def counts(self, maker: Role) -> list[int]:
        """The numbers of parallel samples that were drawn of `maker`."""
        return self.sizes if maker == Role.POLICY else [b for b in self.budgets if (b, Revise(1, b)) in self.tried]

    def parallel(self, n: int, maker: Role, computed: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(accuracy, tokens), each per question, of `n` samples; `computed`: see `best_of_n_tokens`."""
        if maker == Role.POLICY:
            return self.best_of_n(n, "weighted"), self.best_of_n_tokens(n, "weighted", computed)
        tokens = self.row(n, Revise(1, n), "tokens")
        return self.row(n, Revise(1, n)), tokens - (self.row(n, Revise(1, n), "cached") if computed else 0)

    def best_parallel(self, n: int, makers: Sequence[Role]) -> tuple[np.ndarray, np.ndarray]:
        """`parallel` of the maker that is right more often on the other half of the questions."""
        found = [self.parallel(n, maker) for maker in makers]
        right, tokens = (np.zeros(len(self.questions)) for _ in range(2))
        for fit, use in self.halves():
            best = max(found, key=lambda of: of[0][fit].mean())
            right[use], tokens[use] = best[0][use], best[1][use]
        return right, tokens

    def at_tokens(self, tokens: float, makers: Sequence[Role] = (Role.POLICY,), computed: bool = False) -> np.ndarray:
        """Accuracy per question of parallel samples at `tokens` mean tokens (`computed`: see `best_of_n_tokens`).

        Of several makers, of the one that is right more often on the other half. Interpolated between the measured
        numbers of samples on a log scale; fewer tokens than the least number takes count as that number. More than all
        samples that were drawn take count as these, which is to the advantage of what they are compared with.
        """
        return self.best_of([self._at_tokens(tokens, maker, computed) for maker in makers])

    def _at_tokens(self, tokens: float, maker: Role, computed: bool) -> np.ndarray:
        drawn = [self.parallel(n, maker, computed) for n in self.counts(maker)]
        grid = np.log([spent.mean() for _, spent in drawn])
        at = np.clip(np.log(tokens), grid[0], grid[-1])
        return np.array([np.interp(at, grid, accuracies) for accuracies in zip(*(right for right, _ in drawn))])

    def tokens_for(self, accuracy: float, makers: Sequence[Role] = (Role.POLICY,)) -> float:
        """Mean tokens at which parallel samples of one of `makers` first reach mean `accuracy`; infinity if never.

        Log-interpolated between the measured numbers of samples.
        """
        return min(self._tokens_for(accuracy, maker) for maker in makers)

    def _tokens_for(self, accuracy: float, maker: Role) -> float:
        drawn = [self.parallel(n, maker) for n in self.counts(maker)]
        right, cost = ([of.mean() for of in column] for column in zip(*drawn))
        place = next((i for i, reached in enumerate(right) if reached >= accuracy), None)
        if not place:
            return float("inf") if place is None else float(cost[0])
        part = (accuracy - right[place - 1]) / (right[place] - right[place - 1])
        return float(cost[place - 1] * (cost[place] / cost[place - 1]) ** part)

    # ---- the other strategies ----

    def row(self, budget: int, strategy: Strategy, what: str = "correct") -> np.ndarray:
        return self.over(lambda tried: getattr(tried, what), self.tried[budget, strategy])

    def computed(self, budget: int, strategy: Strategy) -> float:
        """Mean tokens, without those that the prefix cache served."""
        return float((self.row(budget, strategy, "tokens") - self.row(budget, strategy, "cached")).mean())

    def strategies(self, budget: int, *kinds: type[Strategy]) -> list[Strategy]:
        return [s for b, s in self.tried if b == budget and isinstance(s, kinds)]

    def options(self) -> dict[Strategy, tuple[np.ndarray, np.ndarray]]:
        """Strategy -> (accuracy, tokens), each per question, for all strategies tried and best-of-N of all sizes."""
        hows = ("weighted", "majority")
        bests = {
            BestOfN(n, how): (self.best_of_n(n, how), self.best_of_n_tokens(n, how)) for n in self.sizes for how in hows
        }
        return bests | {s: (self.row(b, s), self.row(b, s, "tokens")) for b, s in self.tried}

    def best_of(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Accuracy per question of the row that was best on the other half of the questions."""
        out = np.zeros(len(self.questions))
        for fit, use in self.halves():
            out[use] = max(rows, key=lambda row: row[fit].mean())[use]
        return out

    def cheapest(self, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Strategy]]:
        """(accuracy - `target`, tokens, strategies) of the cheapest strategy that reaches it on the other half."""
        options, chosen = self.options(), []
        ahead, tokens = np.zeros(len(target)), np.zeros(len(target))
        for fit, use in self.halves():
            reach = {s: t[fit].mean() for s, (right, t) in options.items() if right[fit].mean() >= target[fit].mean()}
            best = min(reach, key=reach.__getitem__)
            right, spent = options[best]
            ahead[use], tokens[use] = right[use] - target[use], spent[use]
            chosen.append(best)
        return ahead, tokens, chosen

    # ---- difficulty and plans ----

    def ease(self, grade: str) -> np.ndarray:
        """The estimate of difficulty per question; higher is easier."""
        return {
            "oracle": lambda: self.over(lambda d: d.right / d.samples, self.difficult),
            "predicted": lambda: self.over(lambda d: d.predicted, self.difficult),
            "probe": lambda: self.over(lambda pool: np.mean([d.score for d in pool[:PROBE]]), self.pools),
            "prompt": lambda: self.over(lambda d: -d.prompt_bin, self.difficult),
            "label": lambda: self.over(lambda d: -d.level, self.difficult),
        }[grade]()

    def bins(self, grade: str) -> np.ndarray:
        """Bins per question: quantile bins of `ease`, except that the prompt head predicts bins directly."""
        if grade == "prompt":
            return np.array([d.prompt_bin for d in self.difficult])
        found = quantile_bins(dict(zip(self.questions, self.ease(grade))), BINS)
        return np.array([found[q] for q in self.questions])

    def in_bins(self, values: np.ndarray, *bins: int) -> np.ndarray:
        """`values`, with NaN outside the oracle bins `bins`."""
        return np.where(np.isin(self.bins("oracle"), bins), values, np.nan)

    def grade_tokens(self, grade: str) -> np.ndarray:
        """Tokens per question that the estimate of its difficulty costs."""
        return {
            "oracle": lambda: self.over(lambda d: d.tokens, self.difficult),
            "predicted": lambda: self.over(lambda d: d.predicted_tokens, self.difficult),
            "probe": lambda: self.over(lambda pool: sum(d.cost + d.score_cost for d in pool[:PROBE]), self.pools),
            "prompt": lambda: self.over(lambda d: d.prompt_tokens, self.difficult),
            "label": lambda: np.zeros(len(self.questions)),
        }[grade]()

    def plan(self, budget: int, kinds: tuple[type[Strategy], ...], grade: str) -> Planned:
        """Compute-optimal search (Snell et al., 3) with the strategies of `kinds` and best-of-N."""
        return self.once("plan", budget, kinds, grade, make=lambda: self._plan(budget, kinds, grade))

    def _plan(self, budget: int, kinds: tuple[type[Strategy], ...], grade: str) -> Planned:
        options, trials = self.options(), []
        bests = [BestOfN(budget, how) for how in ("weighted", "majority")]
        for strategy in [*bests, *(s for kind in kinds for s in self.strategies(budget, kind))]:
            for q, bin, right, tokens in zip(self.questions, self.bins(grade), *options[strategy]):
                trials.append(Trial(q, int(bin), budget, strategy, right, 0, tokens))
        fit = partial(most_right, models={}, bins=BINS)
        served = {t.question_id: t for t in held_out(trials, fit, seed=self.seed)[budget]}
        chosen = [served[q] for q in self.questions]
        paid = self.grade_tokens(grade)
        if grade == "probe":  # best-of-N at the probe's temperature reuses its samples: they are charged only once
            for i, trial in enumerate(chosen):
                if isinstance(trial.strategy, BestOfN) and trial.strategy.temperature is None:
                    first = self.pools[i][: min(PROBE, budget)]
                    paid[i] -= sum(d.cost + trial.strategy.judged * d.score_cost for d in first)
        tokens = self.over(lambda t: t.tokens, chosen)
        return Planned(self.over(lambda t: t.correct, chosen), tokens, tokens + paid)


def groups(pool: Sequence[Drawn], n: int) -> list[Sequence[Drawn]]:
    """The disjoint groups of n samples."""
    return [pool[start : start + n] for start in range(0, len(pool) - n + 1, n)]


def spent(pool: Sequence[Drawn], n: int, judge: bool, computed: bool) -> float:
    """Mean tokens of a group of n. Equal solutions (same answer and score) are scored once per group."""
    first: dict[tuple, Drawn] = {}
    for d in pool:
        if d.score_cost:
            first.setdefault((d.answer, d.score), d)
    total = 0
    for group in groups(pool, n):
        total += sum(d.cost - (min(d.cached, d.cost) if computed else 0) for d in group)
        if judge:
            judged = {(d.answer, d.score) for d in group if d.answer is not None}
            total += sum(first[key].score_cost for key in judged if key in first)
    return total / (len(pool) // n)
