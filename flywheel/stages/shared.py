"""Functions that several stages share: difficulty, grades, traces, training texts, models of a round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

from flywheel.measure.bins import fixed_bins, quantile_bins
from flywheel.measure.stats import bootstrap_mean
from flywheel.problems.grading import answer_key
from flywheel.recipe import HarvestSpec, TrainSpec
from flywheel.records import Difficulty, Finish, Grade, Harvested, ModelRef, Role, Solution, Split, Verdict
from flywheel.runs.files import stream_table
from flywheel.runs.reading import where
from flywheel.runs.run import Context, Run
from flywheel.runs.stage import Input
from flywheel.training import Example, Job
from flywheel.training.stored import Stored, stored

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


def rate(verdicts: Mapping[Verdict, int]) -> float:
    """The fraction of correct among the decided verdicts; 0.0 if all are undecided."""
    decided = sum(verdicts.values()) - verdicts.get(Verdict.UNDECIDED, 0)
    return verdicts.get(Verdict.CORRECT, 0) / decided if decided else 0.0


def tallies(
    run: Run, stage: str, round: int, purpose: str | None = None, questions: Iterable[str] | None = None
) -> Iterator[tuple[str, Counter[Verdict]]]:
    """(question, how many of its solutions got which verdict), in the order of the stage's items.

    Only columns are read, shard by shard. `purpose`: of the solutions that count; None: all.
    """
    columns = ["question_id", "verdict", "purpose"]
    for table in run.written(stage, round).tables(Grade, columns, questions):
        if purpose is not None:
            table = table.filter(where("purpose", [purpose]))
        found: dict[str, Counter[Verdict]] = {}
        grouped = table.group_by(columns[:2], use_threads=False)  # in the order of the rows
        for row in grouped.aggregate([([], "count_all")]).to_pylist():
            found.setdefault(row["question_id"], Counter())[Verdict(row["verdict"])] = row["count_all"]
        yield from found.items()


def verdict_counts(tallied: Iterable[Mapping[Verdict, int]]) -> dict[str, int]:
    """The verdicts on all solutions, from those by question."""
    total: Counter[Verdict] = Counter()
    for verdicts in tallied:
        total.update(verdicts)
    return {str(v): total[v] for v in Verdict}


def judged(
    run: Run,
    stage: str,
    round: int,
    purpose: str | None = None,
    questions: Iterable[str] | None = None,
    right: bool = False,
) -> Iterator[tuple[str, list[tuple[Solution, Verdict]]]]:
    """Each question's solutions with their verdicts, shard by shard, in the order of the stage's items.

    purpose: of the solutions; None: all. questions: these alone, and no shard without one is opened. right: the correct
    solutions alone. A question without any is left out.
    """
    written = run.written(stage, round)
    for asked in written.groups(questions):
        verdicts = {
            grade.solution_id: grade.verdict
            for grade in written.records(Grade, asked)
            if purpose in (None, grade.purpose) and (grade.correct or not right)
        }
        groups = by_question(written.records(Solution, asked, where("id", verdicts)))
        yield from ((question, [(s, verdicts[s.id]) for s in group]) for question, group in groups.items())


def sampled(ctx: Context, question: str) -> list[tuple[Solution, Verdict]]:
    """The sample stage's solutions of a question in the order of their draws, with their verdicts."""
    return [pair for _, group in judged(ctx, "sample", ctx.round, questions=[question]) for pair in group]


def pass_rates(run: Run, stage: str, round: int, purpose: str | None = None) -> dict[str, float]:
    """pass@1 by question, from the solutions of a stage; `purpose` as in `tallies`."""
    return {question: rate(verdicts) for question, verdicts in tallies(run, stage, round, purpose)}


@lru_cache(maxsize=1)
def difficulties(ctx: Context) -> dict[str, Difficulty]:
    """Bins of the train and calibrate questions by the sample stage's pass rates.

    Quantiles are taken within each split. With one quantile over both, their different numbers of
    samples per question, which change how often a rate is exactly 0, would shift one split's bins.
    """
    spec = ctx.recipe.calibrate
    rates = pass_rates(ctx, "sample", ctx.round)
    quantile: dict[str, int] = {}
    for split in (Split.TRAIN, Split.CALIBRATE):
        quantile |= quantile_bins({q: rates[q] for q in ids(ctx, split)}, spec.bins)
    fixed = fixed_bins(rates, spec.edges)
    return {q: Difficulty(q, rate, quantile[q], fixed[q]) for q, rate in rates.items()}


def test_rates(run: Run, round: int, purpose: str = "evaluate") -> dict[str, float]:
    """pass@1 by test question. `purpose`: `evaluate`, `greedy`, or in round 0 also `bin`."""
    return pass_rates(run, "evaluate", round, purpose)


def answer_is_right(answer: str | None, solutions: Iterable[Solution], correct: Mapping[str, bool]) -> bool:
    """Whether the selected `answer` is right, by the verdict of a solution that gave it; None is wrong."""
    if answer is None:
        return False
    given = (s for s in solutions if s.answer is not None and answer_key(s.answer) == answer_key(answer))
    return bool(correct[next(given).id])


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


def enough_votes(spec: HarvestSpec, right: Sequence[Solution]) -> list[str]:
    """The traces of a question's `right` solutions that the harvest keeps, most votes first; `keep` aside.

    `harvest.vote: trace` asks for `min_votes` draws of the trace, `answer` for as many right draws of any.
    """
    draws = len({s.draw for s in right})
    return [
        text
        for text, count in votes(right).most_common()
        if (count if spec.vote == "trace" else draws) >= spec.min_votes
    ]


def harvested(ctx: Context, rounds: range) -> Iterator[Harvested]:
    """The harvest of several rounds. A trace of a question is kept once, as its first round recorded it."""
    seen: set[bytes] = set()  # digests: the texts themselves may be more than memory holds
    for round in rounds:
        for row in stream_table(ctx.path("harvest", round) / "harvest.parquet", Harvested):
            key = blake2b(f"{row.question_id}\0{spaced(row.solution)}".encode(), digest_size=16).digest()
            if key not in seen:
                seen.add(key)
                yield row


def examples(
    folder: Path,
    rank: int,
    rows: Iterable[tuple[str, Sequence[int], Sequence[int]]],
    longest: int,
    figures: Callable[[], dict] = dict,
) -> Stored:
    """Store (question id, prompt ids, target ids) as training examples; see `stored`, as for the other arguments.

    A row of more than `longest` tokens is left out and counted as the figure `too_long`, never truncated. The figure
    `questions`: the ids of all rows' questions, sorted.
    """
    questions, too_long = set(), 0

    def fitting() -> Iterator[tuple[str, Example]]:
        nonlocal too_long
        for question, prompt, target in rows:
            questions.add(question)
            if len(prompt) + len(target) > longest:
                too_long += 1
            else:
                yield question, Example((*prompt, *target), len(prompt))

    return stored(folder, rank, fitting(), lambda: {"questions": sorted(questions), "too_long": too_long, **figures()})


def closed(solution: Solution, eos: int) -> tuple[int, ...]:
    """The token ids of a finished solution plus EOS, as a training target. Raises ValueError if it is truncated."""
    if solution.finish is not Finish.STOP:
        raise ValueError(f"{solution.id}: a truncated solution cannot be a training text")
    return (*solution.tokens, eos)


def job(ctx: Context, spec: TrainSpec, keep: str, role: Role) -> Job:
    """What the stage trains: `spec` and `keep` as in `Job`, in the stage's folder, on its ledger."""
    start = ctx.model(Role.POLICY, ctx.round - 1).adapter if spec.start == "policy" else None
    return Job(ctx.recipe.model, spec, ctx.dir, ctx.seed("train"), keep, role, ctx.ledger, start, ctx.progress)


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
