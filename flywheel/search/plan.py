"""Plans: which strategy at which difficulty and budget, chosen on the calibration questions.

Snell et al., section 3: the compute-optimal strategy is chosen per difficulty bin on one
fold and scored on the other. Two plans, because two things are wanted: to *serve*, the
selected answer must be right; to *harvest*, gold is known and any verified solution will do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import isqrt

from flywheel.errors import UserError
from flywheel.recipe import AdaptiveSpec, BeamSpec, BestOfNSpec, CalibrateSpec, ReviseSpec, StrategySpec
from flywheel.records import Adaptive, Beam, BestOfN, Revise, Strategy

SCHEMA = 1
ENOUGH = 5  # questions that a bin needs to choose for itself
LONGEST = 64  # attempts in a revision chain (Snell et al., 6.2)
KINDS: dict[str, type] = {"best_of_n": BestOfN, "beam": Beam, "revise": Revise, "adaptive": Adaptive}


def name(strategy: Strategy) -> str:
    """The strategy in figures, tables and ids, e.g. `best_of_n:16:weighted`, `beam:16:4`, `revise:8x2:majority`.

    Limits that are not the usual ones are added, so that different strategies have different names.
    """
    match strategy:
        case BestOfN(n=n, select=select):
            return f"best_of_n:{n}:{select}"
        case Beam(n=n, width=width, max_rounds=rounds, lookahead=k):
            return (
                f"beam:{n}:{width}"
                + (f":rounds{rounds}" if rounds != Beam(n).max_rounds else "")
                + (f":lookahead{k}" if k else "")
            )
        case Revise(length=length, chains=chains, select=select, context=context):
            return f"revise:{length}x{chains}:{select}" + (
                f":context{context}" if context != Revise(length).context else ""
            )
        case Adaptive(n=n, sure=sure, maker=maker, step=step):
            return f"adaptive:{n}:{sure:g}:{maker}" + (f":step{step}" if step != Adaptive(n).step else "")


def strategies(spec: CalibrateSpec) -> list[tuple[int, Strategy]]:
    """Every distinct (budget, strategy) that a recipe asks for, by rising budget.

    A budget is in the paper's unit, final answers generated: N beams that look k steps ahead
    spend N (k + 1) of it (5.2), revisions spend it on chains x attempts, and adaptive sampling
    at most all of it. Beam's width is a
    number or `sqrt` of the number of beams. What a budget does not allow is left out
    (`left_out` says so).
    """
    wanted = [(budget, _expand(kind, budget)) for budget, kind in _asked(spec)]
    return list(dict.fromkeys(item for item, (budget, kind) in zip(wanted, _asked(spec)) if not _unfit(kind, budget)))


def left_out(spec: CalibrateSpec) -> list[str]:
    """One line for every strategy of the recipe that cannot run at one of its budgets."""
    return [
        f"{why[0]} left out at budget {budget}: {why[1]}"
        for budget, kind in _asked(spec)
        if (why := _unfit(kind, budget))
    ]


def _asked(spec: CalibrateSpec) -> list[tuple[int, StrategySpec]]:
    return [
        (budget, kind)
        for budget in sorted(set(spec.budgets))
        for kind in spec.strategies
        if budget <= (kind.max_budget or budget)
    ]


def _unfit(spec: StrategySpec, budget: int) -> tuple[str, str] | None:
    """What cannot spend `budget`, and why; None if it can."""
    match spec:
        case BeamSpec(lookahead=k) if budget % (k + 1):
            return f"beam with lookahead {k}", f"a beam costs {k + 1}, which does not divide it"
        case BeamSpec(width=int(width), lookahead=k) if width > budget // (k + 1):
            return f"beam of width {width}", f"it has only {budget // (k + 1)} beams"
        case ReviseSpec(chains=chains) if budget % chains:
            return f"revise in {chains} chains", "they do not divide it"
        case ReviseSpec(chains=chains) if budget // chains > LONGEST:
            return f"revise in {chains} chains", f"of more than {LONGEST} attempts each"
    return None


def _expand(spec: StrategySpec, budget: int) -> Strategy:
    match spec:
        case BestOfNSpec(select=select):
            return BestOfN(budget, select)
        case BeamSpec(width=width, max_rounds=rounds, lookahead=k):
            beams = budget // (k + 1)
            return Beam(beams, isqrt(beams) if width == "sqrt" else width, rounds, k)
        case ReviseSpec(chains=chains, select=select, context=context):
            return Revise(budget // chains, chains, select, context)
        case AdaptiveSpec(sure=sure, maker=maker, step=step):
            return Adaptive(budget, sure, maker, step)


@dataclass(frozen=True, slots=True)
class Trial:
    """One strategy on one calibration question.

    `correct`: the selected answer is right. `verified`: verified solutions that a harvest
    would keep and had not before: with its candidates they reach `harvest.min_votes`.
    `tokens`: all that it was charged for.
    """

    question_id: str
    bin: int
    budget: int
    strategy: Strategy
    correct: bool
    verified: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Entry:
    """The choice for one bin and budget, and the figures that made it.

    `score`, a question: share of right answers (serve), distinct verified solutions
    (harvest). `borrowed`: neighbouring bins whose questions helped a bin of too few.
    """

    bin: int
    budget: int
    strategy: Strategy
    questions: int
    score: float
    tokens: float  # a question
    borrowed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """`kind` is serve or harvest. `models`: role -> name of the artifact that it was measured with."""

    kind: str
    models: dict[str, str]
    entries: tuple[Entry, ...]

    def strategy(self, bin: int, budget: int) -> Strategy:
        """Raises UserError where the plan has no such entry."""
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
        entries = [
            {**asdict(e), "strategy": {"kind": _kind(e.strategy), **asdict(e.strategy)}, "borrowed": list(e.borrowed)}
            for e in self.entries
        ]
        return {"schema": SCHEMA, "kind": self.kind, "models": dict(self.models), "entries": entries}

    @classmethod
    def from_dict(cls, data: dict, source: str = "plan") -> Plan:
        """Raises UserError, naming `source`, on another schema or a malformed plan."""
        try:
            if data["schema"] != SCHEMA:
                raise UserError(
                    f"{source}: a plan of schema {data['schema']}, and this version reads schema {SCHEMA}: calibrate again"
                )
            entries = []
            for row in data["entries"]:
                given = dict(row["strategy"])
                strategy = KINDS[given.pop("kind")](**given)
                entries.append(Entry(**{**row, "strategy": strategy, "borrowed": tuple(row["borrowed"])}))
            return cls(data["kind"], dict(data["models"]), tuple(entries))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{source}: not a plan: {type(error).__name__}: {error}") from None


def _kind(strategy: Strategy) -> str:
    return next(kind for kind, made in KINDS.items() if type(strategy) is made)


# ---- fitting -------------------------------------------------------------------------


def serve_plan(
    trials: Sequence[Trial], models: Mapping[str, str], bins: int = 5, folds: int = 2, seed: int = 0
) -> tuple[Plan, list[dict]]:
    """The plan chosen on all trials, and its honest score (`figures` by budget, from `held_out`).

    For each bin and budget, the strategy of most right answers; ties go to the cheaper one.
    What a strategy scored on the very trials that chose it stands in the entries.
    """

    fit = partial(most_right, models=models, bins=bins)
    plan, served = fit(trials), held_out(trials, fit, folds, seed)
    return plan, [{"budget": budget, **figures(group)} for budget, group in sorted(served.items())]


def most_right(trials: Sequence[Trial], models: Mapping[str, str], bins: int = 5) -> Plan:
    """The serve plan of these very trials."""
    entries = []
    for budget in sorted({t.budget for t in trials}):
        at_budget = [t for t in trials if t.budget == budget]
        for bin in range(1, bins + 1):
            options = _options(at_budget, bin, bins, budget, lambda t: float(t.correct))
            entries.append(min(options, key=lambda e: (-e.score, e.tokens)))
    return Plan("serve", dict(models), tuple(entries))


def harvest_plan(trials: Sequence[Trial], models: Mapping[str, str], budget: int, keep: int, bins: int = 5) -> Plan:
    """One strategy a bin, of any budget tried, that together verify most for the harvest's tokens.

    Maximises the sum over bins of the mean of min(verified, keep), while the mean tokens sum
    to no more than the cheapest strategy of `budget` costs when every question gets it.
    (Quantile bins hold equal shares of the questions, so bins weigh alike; solutions past
    `keep` are thrown away, so they do not count.) Verified solutions per token alone would
    always choose the smallest budget, whose first samples gain most; with the total fixed,
    what easy bins do not need is spent where it still finds something. Ties go to fewer
    tokens. The optimum is exact (a multiple-choice knapsack). Every entry stands under
    `budget`. Raises ValueError if nothing was tried at it.
    """
    costs: dict[Strategy, list[int]] = {}
    for trial in trials:
        if trial.budget == budget:
            costs.setdefault(trial.strategy, []).append(trial.tokens)
    if not costs:
        raise ValueError(
            f"harvest.budget: {budget} is not among the calibrated budgets {sorted({t.budget for t in trials})}"
        )
    cheapest = min(costs, key=lambda strategy: sum(costs[strategy]) / len(costs[strategy]))
    options = [
        _options(trials, bin, bins, budget, lambda t: float(min(t.verified, keep))) for bin in range(1, bins + 1)
    ]
    limit = sum(e.tokens for row in options for e in row if e.strategy == cheapest) * (1 + 1e-9)
    states: list[tuple[float, float, tuple[Entry, ...]]] = [(0.0, 0.0, ())]  # tokens, verified, choices so far
    for row in options:
        grown = [(tokens + e.tokens, score + e.score, (*chosen, e)) for tokens, score, chosen in states for e in row]
        states = []
        for state in sorted(grown, key=lambda s: (s[0], -s[1])):  # what costs more must verify more
            if state[0] <= limit and (not states or state[1] > states[-1][1] + 1e-9):
                states.append(state)
    return Plan("harvest", dict(models), states[-1][2])


def _options(trials: Sequence[Trial], bin: int, bins: int, budget: int, score: Callable[[Trial], float]) -> list[Entry]:
    """One Entry a strategy, in order of appearance, over the bin's questions and any borrowed ones.

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
                f"{name(strategy)}: {len(group)} trials on the {n} questions of bin {bin}; one on each wanted"
            )
    borrowed = tuple(b for b in used if b != bin)
    return [
        Entry(bin, budget, strategy, n, sum(map(score, group)) / n, sum(t.tokens for t in group) / n, borrowed)
        for strategy, group in by_strategy.items()
    ]


def _lenders(trials: Sequence[Trial], bin: int, bins: int) -> list[int]:
    """The bin, and its neighbours, nearest first, until together they hold ENOUGH questions."""
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
    """Budget -> for every question, the trial of the strategy that a plan chose without that question.

    Questions are dealt into `folds`, bin by bin, in an order drawn with `seed`; the plan
    that serves a fold is fitted on the other ones.
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
    """Every (bin, budget, strategy) that was tried, with its `figures`, sorted."""
    groups: dict[tuple[int, int, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.bin, trial.budget, name(trial.strategy)), []).append(trial)
    return [
        {"bin": bin, "budget": budget, "strategy": label, **figures(group)}
        for (bin, budget, label), group in sorted(groups.items())
    ]


def figures(trials: Sequence[Trial]) -> dict:
    """Over one trial a question: questions, and a question's mean accuracy, verified solutions and tokens."""
    n = len(trials)
    sums = {
        "accuracy": sum(t.correct for t in trials),
        "verified": sum(t.verified for t in trials),
        "tokens": sum(t.tokens for t in trials),
    }
    return {"questions": n, **{key: value / n for key, value in sums.items()}}
