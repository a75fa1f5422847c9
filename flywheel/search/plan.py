"""Plans: the best strategy per difficulty bin and budget, chosen on the calibration questions.

Snell et al., section 3: the compute-optimal strategy is chosen per difficulty bin on one fold and scored on the
other. The *serve* plan maximises correct selected answers. The *harvest* plan maximises verified solutions: on
training questions gold is known, so any verified candidate can be kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from flywheel.errors import UserError
from flywheel.search.greedy import Greedy
from flywheel.search.strategies import AnyStrategy, from_dict
from flywheel.search.strategy import Strategy

SCHEMA = 1
ENOUGH = 5  # questions; a bin with fewer borrows its neighbours'


@dataclass(frozen=True, slots=True)
class Trial:
    """One strategy on one calibration question.

    `correct`: the selected answer is right. `verified`: number of distinct verified solutions that have
    `harvest.min_votes`, by `harvest.vote`, only with this trial's candidates. `tokens`: all tokens charged.
    """

    question_id: str
    bin: int
    budget: int
    strategy: AnyStrategy
    correct: bool
    verified: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Entry:
    """The strategy chosen for one bin and budget, and the figures behind the choice.

    `score`: mean per question of right answers in [0, 1] (serve) or of distinct verified solutions (harvest).
    `borrowed`: neighbouring bins whose questions were added because this bin has fewer than ENOUGH.
    """

    bin: int
    budget: int
    strategy: Strategy
    questions: int
    score: float
    tokens: float  # mean per question
    borrowed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """`kind`: serve or harvest. `models`: role -> name of the model that the trials ran with."""

    kind: str
    models: dict[str, str]
    entries: tuple[Entry, ...]

    def strategy(self, bin: int, budget: int) -> Strategy:
        """The strategy for questions of `bin`. Raises UserError if the plan has no such entry."""
        for entry in self.entries:
            if (entry.bin, entry.budget) == (bin, budget):
                return entry.strategy
        budgets = sorted({e.budget for e in self.entries})
        raise UserError(
            f"the {self.kind} plan has no strategy for bin {bin} at budget {budget}; it has budgets {budgets}"
        )

    def check_models(self, models: Mapping[str, str]) -> None:
        """Raises UserError, naming the first role that differs, unless the plan was made with `models`."""
        for role in sorted(self.models.keys() | models.keys()):
            made_with, given = self.models.get(role), models.get(role)
            if given != made_with:
                raise UserError(f"the {self.kind} plan was made with {role} {made_with}, not {given}: calibrate again")

    def to_dict(self) -> dict:
        """JSON: schema, kind, models, entries (one object each, the strategy with its `kind`)."""
        entries = [{**asdict(e), "strategy": e.strategy.to_dict(), "borrowed": list(e.borrowed)} for e in self.entries]
        return {"schema": SCHEMA, "kind": self.kind, "models": dict(self.models), "entries": entries}

    @classmethod
    def from_dict(cls, data: dict, source: str = "plan") -> Plan:
        """Raises UserError, naming `source`, on another schema or a malformed plan."""
        try:
            if data["schema"] != SCHEMA:
                raise UserError(
                    f"{source}: a plan of schema {data['schema']}, and this version reads {SCHEMA}: calibrate again"
                )
            entries = []
            for row in data["entries"]:
                entries.append(
                    Entry(**{**row, "strategy": from_dict(row["strategy"]), "borrowed": tuple(row["borrowed"])})
                )
            return cls(data["kind"], dict(data["models"]), tuple(entries))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{source}: not a plan: {type(error).__name__}: {error}") from None


# ---- fitting -------------------------------------------------------------------------


def serve_plan(
    trials: Sequence[Trial], models: Mapping[str, str], bins: int = 5, folds: int = 2, seed: int = 0
) -> tuple[Plan, list[dict]]:
    """The plan chosen on all trials, and its cross-validated score (`figures` by budget, from `held_out`).

    For each bin and budget, the strategy with most right answers; ties go to the cheaper one.
    The scores in the plan's entries are in-sample: from the same trials that chose the strategy.
    """

    fit = partial(most_right, models=models, bins=bins)
    plan, served = fit(trials), held_out(trials, fit, folds, seed)
    return plan, [{"budget": budget, **figures(group)} for budget, group in sorted(served.items())]


def most_right(trials: Sequence[Trial], models: Mapping[str, str], bins: int = 5) -> Plan:
    """The serve plan fitted on `trials`."""
    entries = []
    for budget in sorted({t.budget for t in trials}):
        at_budget = [t for t in trials if t.budget == budget]
        for bin in range(1, bins + 1):
            options = _options(at_budget, bin, bins, budget, lambda t: float(t.correct))
            entries.append(min(options, key=lambda e: (-e.score, e.tokens)))
    return Plan("serve", dict(models), tuple(entries))


def simplest(trials: Sequence[Trial]) -> dict[int, Strategy]:
    """Budget -> what a plan has to beat: one simple strategy for all questions (see `Strategy.simple`).

    Of those that were tried (makers, votes, temperatures) the one with most right answers; ties go to the cheaper one.
    """
    groups: dict[tuple[int, Strategy], list[Trial]] = {}
    for trial in trials:
        if trial.strategy.simple:
            groups.setdefault((trial.budget, trial.strategy), []).append(trial)
    ranked = sorted(groups, key=lambda key: (-sum(t.correct for t in groups[key]), sum(t.tokens for t in groups[key])))
    best: dict[int, Strategy] = {}
    for budget, strategy in ranked:
        best.setdefault(budget, strategy)
    return best


def harvest_plan(trials: Sequence[Trial], models: Mapping[str, str], budget: int, keep: int, bins: int = 5) -> Plan:
    """One strategy per bin, from all budgets tried, that together verify most within the harvest's token budget.

    Maximises the sum over bins of mean min(verified, keep), subject to a limit on the sum of mean tokens: the cost of
    giving every question the cheapest strategy of `budget`, greedy aside, which spends no budget. Bins weigh the same
    because quantile bins hold equal shares of the questions; solutions beyond `keep` do not count because the harvest
    discards them. Maximising verified solutions per token instead would always choose the smallest budget, whose first
    samples gain most; with a fixed total, tokens that easy bins do not need go to harder ones. Ties go to fewer tokens.
    The optimum is exact (a multiple-choice knapsack). All entries are stored under `budget`. Raises ValueError if it
    was not tried.
    """
    costs: dict[Strategy, list[int]] = {}
    for trial in trials:
        if trial.budget == budget and not isinstance(trial.strategy, Greedy):
            costs.setdefault(trial.strategy, []).append(trial.tokens)
    if not costs:
        raise ValueError(
            f"harvest.budget: {budget} is not among the calibrated budgets {sorted({t.budget for t in trials})}"
        )
    cheapest = min(costs, key=lambda strategy: sum(costs[strategy]) / len(costs[strategy]))
    # the greedy answer is one strategy at every budget
    trials = list({(trial.question_id, trial.strategy): trial for trial in trials}.values())
    options = [
        _options(trials, bin, bins, budget, lambda t: float(min(t.verified, keep))) for bin in range(1, bins + 1)
    ]
    limit = sum(e.tokens for row in options for e in row if e.strategy == cheapest) * (1 + 1e-9)
    states: list[tuple[float, float, tuple[Entry, ...]]] = [(0.0, 0.0, ())]  # tokens, verified, choices so far
    for row in options:
        grown = [(tokens + e.tokens, score + e.score, (*chosen, e)) for tokens, score, chosen in states for e in row]
        states = []
        for state in sorted(grown, key=lambda s: (s[0], -s[1])):  # keep the Pareto front of (tokens, verified)
            if state[0] <= limit and (not states or state[1] > states[-1][1] + 1e-9):
                states.append(state)
    return Plan("harvest", dict(models), states[-1][2])


def _options(trials: Sequence[Trial], bin: int, bins: int, budget: int, score: Callable[[Trial], float]) -> list[Entry]:
    """One Entry per strategy, in order of appearance, over the bin's questions and any borrowed ones.

    Raises ValueError if a strategy was not tried exactly once on each of these questions.
    """
    used = _lenders(trials, bin, bins)
    by_strategy: dict[Strategy, list[Trial]] = {}
    for trial in trials:
        if trial.bin in used:
            by_strategy.setdefault(trial.strategy, []).append(trial)
    questions = sorted({t.question_id for group in by_strategy.values() for t in group})
    n = len(questions)
    for strategy, group in by_strategy.items():
        if sorted(t.question_id for t in group) != questions:
            raise ValueError(
                f"{strategy.name}: {len(group)} trials on the {n} questions of bin {bin}; one on each wanted"
            )
    borrowed = tuple(b for b in used if b != bin)
    return [
        Entry(bin, budget, strategy, n, sum(map(score, group)) / n, sum(t.tokens for t in group) / n, borrowed)
        for strategy, group in by_strategy.items()
    ]


def _lenders(trials: Sequence[Trial], bin: int, bins: int) -> list[int]:
    """The bin, followed by its nearest neighbours until all together have ENOUGH questions."""
    sizes = {b: len({t.question_id for t in trials if t.bin == b}) for b in range(1, bins + 1)}
    used = [bin]
    for distance in range(1, bins):
        if sum(sizes[b] for b in used) >= ENOUGH:
            break
        used += [b for b in (bin - distance, bin + distance) if sizes.get(b)]
    return used


# ---- scoring -------------------------------------------------------------------------


def held_out(
    trials: Sequence[Trial], fit: Callable[[Sequence[Trial]], Plan], folds: int = 2, seed: int = 0
) -> dict[int, list[Trial]]:
    """Cross-validation: budget -> for every question, the trial of the strategy chosen without that question.

    Questions are shuffled with `seed` and split into `folds`, stratified by bin; the plan for a fold is fitted on
    the other folds.
    """
    bin_of = {t.question_id: t.bin for t in trials}
    order = sorted(bin_of)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda question: bin_of[question])
    fold_of = {question: i % folds for i, question in enumerate(order)}
    tried = {(t.question_id, t.strategy): t for t in trials}
    served: dict[int, list[Trial]] = {}
    for fold in range(folds):
        plan = fit([t for t in trials if fold_of[t.question_id] != fold])
        for question in sorted(q for q in order if fold_of[q] == fold):
            for entry in plan.entries:
                if entry.bin == bin_of[question]:
                    served.setdefault(entry.budget, []).append(tried[question, entry.strategy])
    return served


def table(trials: Sequence[Trial]) -> list[dict]:
    """`figures` of every (bin, budget, strategy) that was tried, sorted."""
    groups: dict[tuple[int, int, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.bin, trial.budget, trial.strategy.name), []).append(trial)
    return [
        {"bin": bin, "budget": budget, "strategy": label, **figures(group)}
        for (bin, budget, label), group in sorted(groups.items())
    ]


def figures(trials: Sequence[Trial]) -> dict:
    """Number of questions, and mean accuracy, verified solutions and tokens; `trials` hold one trial per question."""
    n = len(trials)
    sums = {
        "accuracy": sum(t.correct for t in trials),
        "verified": sum(t.verified for t in trials),
        "tokens": sum(t.tokens for t in trials),
    }
    return {"questions": n, **{key: value / n for key, value in sums.items()}}
