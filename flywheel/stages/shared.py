"""Functions that several stages share: difficulty, grades, traces, training texts, models of a round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

from flywheel.measure.bins import fixed_bins, quantile_bins
from flywheel.measure.stats import bootstrap_mean
from flywheel.problems.grading import answer_key
from flywheel.recipe import TrainSpec
from flywheel.records import Difficulty, Finish, Grade, Harvested, ModelRef, Role, Solution, Split, Verdict
from flywheel.runs.files import read_table
from flywheel.runs.run import Context, Run
from flywheel.runs.stage import Input
from flywheel.training import Example, Job

T = TypeVar("T")
LAST_POLICY = (Input("gate", back=1, optional=True), Input("distill", back=1, optional=True))


def ids(run: Run, *splits: Split) -> list[str]:
    return [p.id for p in run.problems(*splits)]


def by_question(records: Iterable[T]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = {}
    for record in records:
        groups.setdefault(record.question_id, []).append(record)
    return groups


# ---- grades and difficulty -------------------------------------------------------------


def pass_rates(grades: Iterable[Grade]) -> dict[str, float]:
    """Fraction of correct solutions by question, leaving out undecided ones; 0.0 if all are undecided."""
    rates = {}
    for question, group in by_question(grades).items():
        decided = [g.correct for g in group if g.verdict is not Verdict.UNDECIDED]
        rates[question] = sum(decided) / len(decided) if decided else 0.0
    return rates


def verdict_counts(grades: Sequence[Grade]) -> dict[str, int]:
    return {str(v): sum(g.verdict is v for g in grades) for v in Verdict}


@lru_cache(maxsize=1)  # called for every chunk
def sampled(ctx: Context) -> tuple[dict[str, list[Solution]], dict[str, Verdict]]:
    """The sample stage's solutions by question, and their verdicts by solution id."""
    verdicts = {grade.solution_id: grade.verdict for grade in ctx.read(Grade, "sample")}
    return by_question(ctx.read(Solution, "sample")), verdicts


def sampled_rates(ctx: Context) -> dict[str, float]:
    """pass@1 of the last policy on the train and calibrate questions, from the sample stage."""
    return pass_rates(ctx.read(Grade, "sample"))


@lru_cache(maxsize=1)
def difficulties(ctx: Context) -> dict[str, Difficulty]:
    """Bins of the train and calibrate questions by the sample stage's pass rates.

    Quantiles are taken within each split. With one quantile over both, their different numbers of
    samples per question, which change how often a rate is exactly 0, would shift one split's bins.
    """
    spec = ctx.recipe.calibrate
    rates = sampled_rates(ctx)
    quantile: dict[str, int] = {}
    for split in (Split.TRAIN, Split.CALIBRATE):
        quantile |= quantile_bins({q: rates[q] for q in ids(ctx, split)}, spec.bins)
    fixed = fixed_bins(rates, spec.edges)
    return {q: Difficulty(q, rate, quantile[q], fixed[q]) for q, rate in rates.items()}


def test_grades(run: Run, round: int, purpose: str = "evaluate") -> dict[str, list[Grade]]:
    """Grades of the test questions, by question. `purpose`: `evaluate`, `greedy`, or in round 0 also `bin`."""
    return by_question(g for g in run.read(Grade, "evaluate", round) if g.purpose == purpose)


def test_rates(run: Run, round: int, purpose: str = "evaluate") -> dict[str, float]:
    """pass@1 by test question. `purpose` as in `test_grades`."""
    return pass_rates(g for group in test_grades(run, round, purpose).values() for g in group)


def test_solutions(run: Run, round: int, purpose: str = "evaluate") -> dict[str, list[Solution]]:
    return by_question(s for s in run.read(Solution, "evaluate", round) if s.purpose == purpose)


def answer_is_right(answer: str | None, solutions: Iterable[Solution], correct: Mapping[str, bool]) -> float:
    """1.0 if the selected `answer` is right, by the verdict of a solution that gave it; None is wrong."""
    if answer is None:
        return 0.0
    given = (s for s in solutions if s.answer is not None and answer_key(s.answer) == answer_key(answer))
    return float(correct[next(given).id])


def interval(ctx: Context, values: Sequence[float]) -> tuple[float, list[float]]:
    """(mean, [low, high]): the mean and its 95% bootstrap interval over questions."""
    mean, low, high = bootstrap_mean(values, n=ctx.recipe.evaluate.bootstrap, seed=ctx.seed("bootstrap") % 2**31)
    return mean, [low, high]


# ---- traces and training texts ---------------------------------------------------------


def trace(solution: Solution) -> str:
    """The text with normalised whitespace: solutions with equal traces are the same derivation."""
    return spaced(solution.text)


def spaced(text: str) -> str:
    """`text` with each run of whitespace as one space."""
    return " ".join(text.split())


def votes(right: Iterable[Solution]) -> Counter[str]:
    """trace -> number of independent draws (`Solution.draw`) that gave it, among the `right` solutions."""
    return Counter(text for text, _ in dict.fromkeys((trace(s), s.draw) for s in right))


def harvested(ctx: Context, rounds: range) -> list[Harvested]:
    """The harvest of several rounds. A trace of a question is kept once, as its first round recorded it."""
    seen: dict[tuple[str, str], Harvested] = {}
    for round in rounds:
        for row in read_table(ctx.path("harvest", round) / "harvest.parquet", Harvested):
            seen.setdefault((row.question_id, spaced(row.solution)), row)
    return list(seen.values())


def examples(
    rows: Iterable[tuple[str, Sequence[int], Sequence[int]]], held: set[str], longest: int
) -> tuple[list[Example], list[Example], int]:
    """Split (question id, prompt ids, target ids) into (training examples, validation examples, number too long).

    Questions in `held` validate. A row of more than `longest` tokens is left out and counted, never truncated.
    """
    fit, check, too_long = [], [], 0
    for question, prompt, target in rows:
        if len(prompt) + len(target) > longest:
            too_long += 1
            continue
        (check if question in held else fit).append(Example((*prompt, *target), len(prompt)))
    return fit, check, too_long


def closed(solution: Solution, eos: int) -> tuple[int, ...]:
    """The token ids of a finished solution plus EOS, as a training target. Raises ValueError if it is truncated."""
    if solution.finish is not Finish.STOP:
        raise ValueError(f"{solution.id}: a truncated solution cannot be a training text")
    return (*solution.tokens, eos)


def start(ctx: Context, spec: TrainSpec) -> str | None:
    """The adapter to initialise training from: the last policy's if `spec.start` is `policy`, else None."""
    return ctx.model(Role.POLICY, ctx.round - 1).adapter if spec.start == "policy" else None


def job(ctx: Context, spec: TrainSpec, keep: str, role: Role) -> Job:
    """What the stage trains: `spec` and `keep` as in `Job`, in the stage's folder, on its ledger."""
    seed, adapter = ctx.seed("train"), start(ctx, spec)
    return Job(ctx.recipe.model, spec, ctx.dir, seed, keep, role, ctx.ledger, adapter, ctx.progress)


# ---- models of a round -----------------------------------------------------------------


def search_models(ctx: Context) -> dict[Role, ModelRef]:
    """The models of this round's search: the last round's policy, and this round's PRM and reviser.

    There is no reviser key if the round has none.
    """
    models = {Role.POLICY: ctx.model(Role.POLICY, ctx.round - 1), Role.PRM: ctx.model(Role.PRM, ctx.round)}
    if ctx.figures("choose_reviser").get("chosen"):
        models[Role.REVISER] = ctx.model(Role.REVISER, ctx.round)
    return models


def head_model(run: Run, round: int | None = None) -> dict[Role, ModelRef]:
    """The difficulty head of a round (by default the stage's own) by its role; empty if the round has none."""
    head = run.model(Role.HEAD, run.round if round is None else round)
    return {Role.HEAD: head} if head.adapter else {}


def model_names(models: Mapping[Role, ModelRef]) -> dict[str, str]:
    """Model names by role, as stored in plans and figures."""
    return {str(role): ref.name for role, ref in models.items()}
