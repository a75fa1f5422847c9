"""What a sampling stage works with: engines, prompts, the reader of solutions, the grader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from flywheel.errors import UserError
from flywheel.measure.bins import fixed_bins, quantile_bins
from flywheel.measure.stats import bootstrap_mean
from flywheel.models.engine import Backend, Engine, Sampling
from flywheel.models.prm import Prm, label_ids
from flywheel.models.prompts import Prompts
from flywheel.models.steps import Reader
from flywheel.models.weights import check_length, load_tokenizer, open_backend
from flywheel.problems.grading import Grader, answer_key
from flywheel.recipe import Recipe, TrainSpec
from flywheel.records import (
    Difficulty,
    Finish,
    Grade,
    Harvested,
    ModelRef,
    Outcome,
    Problem,
    Question,
    Role,
    Solution,
    Split,
    Strategy,
    Verdict,
)
from flywheel.runs.run import Context, read_table
from flywheel.search.run import search
from flywheel.search.tools import Tools
from flywheel.training import Example

T = TypeVar("T")
R = TypeVar("R")


def text_tools(ctx: Context) -> tuple[Prompts, Reader]:
    """Prompts and reader for the run's tokenizer (no engine)."""
    spec = ctx.recipe.prompts
    tokenizer = load_tokenizer(ctx.recipe.model.base)
    return Prompts(spec, tokenizer), Reader(tokenizer, spec.step, spec.answer, spec.stop)


def preflight(recipe: Recipe) -> None:
    """What a stage would trip over hours later: words that are no tokens, a template, a model too short. Raises UserError."""
    try:
        tokenizer = load_tokenizer(recipe.model.base)
        prompts = Prompts(recipe.prompts, tokenizer)
        Reader(tokenizer, recipe.prompts.step, recipe.prompts.answer, recipe.prompts.stop)
        prompts.solve(Question("preflight", "1"))
        label_ids(tokenizer, recipe.prm.labels)
        check_length(recipe.model.base, recipe.engine.max_model_len)
    except ValueError as error:
        raise UserError(str(error)) from None


@dataclass
class Kit:
    """Open engines of a stage, by key (a role, or a name such as `prm:base`)."""

    ctx: Context
    backend: Backend
    prompts: Prompts
    reader: Reader
    grader: Grader
    problems: dict[str, Problem]

    def engine(self, key: str = Role.POLICY) -> Engine:
        return self.backend.engine(key)

    def prm(self, key: str = Role.PRM) -> Prm:
        spec = self.ctx.recipe.prm
        return Prm(self.engine(key), self.prompts, spec.labels, spec.aggregate)

    def each(self, items: Iterable[T], work: Callable[[T], Awaitable[R]]) -> Iterator[tuple[T, R]]:
        """`work` on all items at once, results in the order of `items` whatever order they end in."""
        items = list(items)
        return zip(items, self.backend.run(items, work))

    async def solutions(
        self, question: Question, n: int, *, purpose: str, tag: str, key: str = Role.POLICY
    ) -> list[Solution]:
        """`n` independent solutions of `question` by the engine `key`."""
        spec, engine = self.ctx.recipe.sample, self.engine(key)
        sampling = Sampling(spec.max_tokens, spec.temperature, spec.top_p, self.reader.stop)
        completions = await engine.generate(self.prompts.solve(question), sampling, purpose=purpose, n=n)
        return [
            self.reader.solution(
                done.tokens,
                done.finish,
                id=f"{question.id}/{tag}/{i}",
                question_id=question.id,
                origin=f"{purpose}:{engine.name}",
            )
            for i, done in enumerate(completions)
        ]

    def grade(self, solutions: Sequence[Solution]) -> list[Grade]:
        return self.grader.verdicts([(self.problems[s.question_id], s) for s in solutions])

    def searched(
        self, questions: Iterable[str], tools: Tools, strategy: Callable[[str], Strategy], tag: str
    ) -> Iterator[Solution | Grade]:
        """Search each question by the strategy of its id: all candidates of a question, then their grades."""

        async def one(question: str) -> Outcome:
            return await search(strategy(question), self.problems[question].question, tools, tag=tag)

        for _, outcome in self.each(questions, one):
            found = [candidate.solution for candidate in outcome.candidates]
            yield from found
            yield from self.grade(found)


@contextmanager
def kit(ctx: Context, models: Mapping[str, ModelRef], *splits: Split) -> Iterator[Kit]:
    """Open the engines of `models` for questions of `splits`; everything is closed at the end."""
    prompts, reader = text_tools(ctx)
    problems = {p.id: p for p in ctx.problems(*splits)}
    labels = label_ids(prompts.tokenizer, ctx.recipe.prm.labels)
    models = {
        key: replace(ref, labels=labels) if key.partition(":")[0] == Role.PRM else ref for key, ref in models.items()
    }
    with TemporaryDirectory(prefix="flywheel-") as scratch, Grader(ctx.recipe.problems) as grader:
        backend = open_backend(ctx.recipe.engine, models, ctx.ledger, ctx.seed("engine") % 2**31, Path(scratch))
        try:
            yield Kit(ctx, backend, prompts, reader, grader, problems)
        finally:
            backend.close()


def ids(ctx: Context, *splits: Split) -> list[str]:
    return [p.id for p in ctx.problems(*splits)]


def by_question(records: Iterable[T]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = {}
    for record in records:
        groups.setdefault(record.question_id, []).append(record)
    return groups


def pass_rates(grades: Iterable[Grade]) -> dict[str, float]:
    """Share of correct solutions by question. Undecided ones count neither way."""
    rates = {}
    for question, group in by_question(grades).items():
        decided = [g.correct for g in group if g.verdict is not Verdict.UNDECIDED]
        rates[question] = sum(decided) / len(decided) if decided else 0.0
    return rates


@lru_cache(maxsize=1)  # a stage's process asks for every chunk
def sampled(ctx: Context) -> tuple[dict[str, list[Solution]], dict[str, Verdict]]:
    """The sample stage's solutions by question, and their verdicts by solution id."""
    verdicts = {grade.solution_id: grade.verdict for grade in ctx.read(Grade, "sample")}
    return by_question(ctx.read(Solution, "sample")), verdicts


@lru_cache(maxsize=4)
def difficulties(ctx: Context, round: int | None = None) -> dict[str, Difficulty]:
    """Bins of the train and calibrate questions from the sample stage's pass rates (oracle grade).

    Quantiles are taken within each split: the splits are drawn alike, and their numbers of
    samples differ, so that ties at a rate of 0 would otherwise part them.
    """
    spec = ctx.recipe.calibrate
    grades = by_question(ctx.read(Grade, "sample", round))
    rates = pass_rates(grade for group in grades.values() for grade in group)
    quantile: dict[str, int] = {}
    for split in (Split.TRAIN, Split.CALIBRATE):
        inside = [p.id for p in ctx.problems(split)]
        quantile |= quantile_bins({q: rates[q] for q in inside}, spec.bins)
    fixed = fixed_bins(rates, spec.edges)
    return {q: Difficulty(q, rate, len(grades[q]), quantile[q], fixed[q]) for q, rate in rates.items()}


def verdict_counts(grades: Sequence[Grade]) -> dict[str, int]:
    return {str(v): sum(g.verdict is v for g in grades) for v in Verdict}


def trace(solution: Solution) -> str:
    """What two solutions share if they are the same derivation: their text, spacing apart."""
    return " ".join(solution.text.split())


def votes(right: Iterable[Solution], parents: Mapping[str, str | None]) -> Counter[str]:
    """trace -> how many independent draws gave it, of the `right` solutions. `parents`: solution id -> its parent's.

    An attempt sees the ones before it and beams share their beginnings, so a whole revision
    chain, or a whole search by beams, is one draw, however often it repeats itself.
    """

    def draw(solution: Solution) -> str:
        if solution.origin.startswith("beam:"):
            return solution.id.rpartition("/")[0]
        id = solution.id
        while parents.get(id):
            id = parents[id]
        return id

    return Counter(text for text, _ in {(trace(s), draw(s)) for s in right})


def examples(
    rows: Iterable[tuple[str, Sequence[int], Sequence[int]]], held: set[str], longest: int
) -> tuple[list[Example], list[Example], int]:
    """(to train on, to validate on, how many were too long) of (question id, prompt, target) token ids.

    The questions of `held` validate. What is longer than `longest` tokens is left out and counted, never cut.
    """
    fit, check, too_long = [], [], 0
    for question, prompt, target in rows:
        if len(prompt) + len(target) > longest:
            too_long += 1
            continue
        (check if question in held else fit).append(Example((*prompt, *target), len(prompt)))
    return fit, check, too_long


def start(ctx: Context, spec: TrainSpec) -> str | None:
    """The adapter that a training of this round begins with: the last policy's if the recipe says so and there is one."""
    return ctx.model(Role.POLICY, ctx.round - 1).adapter if spec.start == "policy" else None


def closed(solution: Solution, eos: int) -> tuple[int, ...]:
    """A finished solution as training text: its own token ids and EOS."""
    if solution.finish is not Finish.STOP:
        raise ValueError(f"{solution.id}: a truncated solution cannot be a training text")
    return (*solution.tokens, eos)


def searchers(ctx: Context) -> dict:
    """The models of this round's search: the policy that was sampled, this round's PRM and reviser.

    A round without a reviser (nothing to train it on) searches without one.
    """
    models = {Role.POLICY: ctx.model(Role.POLICY, ctx.round - 1), Role.PRM: ctx.model(Role.PRM, ctx.round)}
    if ctx.figures("choose_reviser").get("chosen"):
        models[Role.REVISER] = ctx.model(Role.REVISER, ctx.round)
    return models


def plan_models(ctx: Context) -> dict[str, str]:
    """The names of this round's searchers, by role, as a plan holds them."""
    return {str(role): ref.name for role, ref in searchers(ctx).items()}


def search_tools(kit: Kit, reviser: bool = True) -> Tools:
    """The kit's engines as a search wants them; `reviser`: whether the round's reviser, if it has one, is among them."""
    reviser = kit.engine(Role.REVISER) if reviser and Role.REVISER in searchers(kit.ctx) else None
    return Tools(kit.engine(), kit.prm(), reviser, kit.prompts, kit.reader, kit.ctx.recipe.sample)


def harvested(ctx: Context, rounds: range) -> list[Harvested]:
    """The harvest of several rounds, a trace of a question once (votes of its first round)."""
    seen: dict[tuple[str, str], Harvested] = {}
    for round in rounds:
        for row in read_table(ctx.path("harvest", round) / "harvest.parquet", Harvested):
            seen.setdefault((row.question_id, " ".join(row.solution.split())), row)
    return list(seen.values())


def test_samples(
    ctx: Context, round: int, draw: str = "score"
) -> tuple[dict[str, list[Solution]], dict[str, list[Grade]]]:
    """Solutions and grades of one draw, by question."""
    mark = f"/r{round}/{draw}/"
    solutions = by_question(s for s in ctx.read(Solution, "evaluate", round) if mark in s.id)
    return solutions, by_question(g for g in ctx.read(Grade, "evaluate", round) if mark in g.solution_id)


def test_rates(ctx: Context, round: int, draw: str = "score") -> dict[str, float]:
    mark = f"/r{round}/{draw}/"
    return pass_rates(g for g in ctx.read(Grade, "evaluate", round) if mark in g.solution_id)


def interval(ctx: Context, values: Sequence[float]) -> tuple[float, list[float]]:
    mean, low, high = bootstrap_mean(values, n=ctx.recipe.evaluate.bootstrap, seed=ctx.seed("bootstrap") % 2**31)
    return mean, [low, high]


def answer_is_right(answer: str | None, solutions: Iterable[Solution], correct: Mapping[str, bool]) -> float:
    """1.0 if the selected `answer` is right: the verdict of a solution that gave it; None is wrong."""
    if answer is None:
        return 0.0
    return float(
        next(correct[s.id] for s in solutions if s.answer is not None and answer_key(s.answer) == answer_key(answer))
    )
