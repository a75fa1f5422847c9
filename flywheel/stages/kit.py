"""What a sampling stage works with: open engines, prompts, the parser of solutions, the grader."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from flywheel.errors import UserError
from flywheel.ledger import Ledger
from flywheel.models import published
from flywheel.models.backend import engines
from flywheel.models.driver import Backend, drawing
from flywheel.models.engine import Engine, Sampling
from flywheel.models.prm import Prm, label_ids, together
from flywheel.models.prompts import Prompts
from flywheel.models.steps import Reader
from flywheel.models.weights import MAX_LORA_RANK, check_heads, check_length, check_targets, judge_fault, load_tokenizer
from flywheel.problems.grading import Grader, load_function, preflight_of
from flywheel.recipe import Recipe
from flywheel.records import Grade, ModelRef, Problem, Question, Role, Solution, Split
from flywheel.runs.run import Context, Run
from flywheel.search.head import Head, bin_words
from flywheel.search.run import search
from flywheel.search.strategy import Searcher, Strategy

PUBLISHED = "prm:published"
WINDOW = 4  # sequences kept in flight, in units of engine.max_running
ON_GPU = Path("/dev/nvidiactl").exists()  # found without opening it
T = TypeVar("T")


def prompts_and_reader(run: Run) -> tuple[Prompts, Reader]:
    """The prompts and the solution parser for the run's tokenizer; opens no engine."""
    spec = run.recipe.prompts
    tokenizer = load_tokenizer(run.recipe.model.base)
    return Prompts(spec, tokenizer), Reader(tokenizer, spec)


def preflight(recipe: Recipe) -> list[str]:
    """Check before the run what would fail a stage hours later.

    Stop words, labels, templates, checkers, the length of every question, the LoRA rank. Returns the ids of the
    questions that `problems.skip_long` leaves out. Raises UserError.
    """
    try:
        tokenizer = load_tokenizer(recipe.model.base)
        prompts = Prompts(recipe.prompts, tokenizer)
        Reader(tokenizer, recipe.prompts)
        prompts.solve(Question("preflight", "1"))
        label_ids(tokenizer, recipe.prm.labels)
        bin_words(tokenizer, recipe.calibrate.bins if recipe.head else 0)
        check_length(recipe.model.base, recipe.engine.max_model_len)
        check_targets(recipe.model)
        check_heads(recipe.model.base, recipe.engine.tensor_parallel)
        fault = judge_fault(recipe.model.base)
    except (ValueError, re.error) as error:
        raise UserError(str(error)) from None
    if recipe.prm.published:
        published.preflight(recipe.prm.published, recipe.engine)
    for key in ("checker", "step_checker"):
        if name := getattr(recipe.problems, key):
            load_function(name, f"problems.{key}")
    problems = Run(Path(), recipe, skipped=()).problems(*Split)
    if ready := preflight_of(recipe.problems.checker):
        ready(problems)
    shown = {example.level for example in recipe.prompts.examples if example.level}
    if unused := shown - {problem.level for problem in problems}:
        print(f"prompts.examples: shown with no question, for none is of level {', '.join(sorted(unused))}", flush=True)
    for word in prompts.foreign():
        print(f"prompts: {word} is no token of {recipe.model.base}, but plain text; of another model?", flush=True)
    if fault and recipe.engine.kind == "vllm" and recipe.engine.adapters != "runtime":
        print(
            f"model: {recipe.model.base} has {fault}: its PRMs score by label log-probabilities, one request a step,"
            " which is slower than as a classifier",
            flush=True,
        )
    if recipe.engine.kind == "server":
        from flywheel.models import remote

        remote.preflight(
            recipe.engine, [recipe.model.base, *([rival.model] if (rival := recipe.prm.published) else [])]
        )
    if recipe.engine.kind == "vllm" and not ON_GPU:
        from flywheel.models.vllm_cpu import emulated  # it imports torch

        if warning := emulated(recipe.engine):
            print(warning, flush=True)
    check_lora_rank(recipe)
    return long_questions(recipe, prompts, problems)


def runtime_adapters(recipe: Recipe) -> bool:
    """Whether one engine serves a base with all its adapters."""
    wanted = recipe.engine.adapters == "runtime" or (recipe.engine.adapters == "auto" and ON_GPU)
    return recipe.engine.kind == "vllm" and wanted


def check_lora_rank(recipe: Recipe) -> None:
    """Raises UserError if adapters are served at run time and vLLM takes none of `model.lora_rank`."""
    if runtime_adapters(recipe) and recipe.model.lora_rank > MAX_LORA_RANK:
        raise UserError(
            f"model.lora_rank: {recipe.model.lora_rank} is more than vLLM serves at run time ({MAX_LORA_RANK});"
            " lower it, or set engine.adapters=merged"
        )


def too_long(recipe: Recipe, prompts: Prompts, problem: Problem) -> int:
    """The tokens that a question and a solution of `sample.max_tokens` have beyond `engine.max_model_len`, or 0."""
    solve, (check, _) = prompts.solve(problem.question, bare=True), prompts.check(problem.question, ())
    longest = max(len(solve), len(check) + 1)  # the PRM's prompt ends with a label
    return max(0, longest + recipe.sample.max_tokens - recipe.engine.max_model_len)


def long_questions(recipe: Recipe, prompts: Prompts, problems: Sequence[Problem]) -> list[str]:
    """The ids of the questions that do not fit the model. Raises UserError for them without `problems.skip_long`.

    Raises UserError too if a split has no other questions.
    """
    long = {problem.id: over for problem in problems if (over := too_long(recipe, prompts, problem))}
    if not long:
        return []
    most = max(long, key=long.get)
    line = (
        f"{len(long)} of {len(problems)} questions do not fit engine.max_model_len {recipe.engine.max_model_len} with"
        f" sample.max_tokens {recipe.sample.max_tokens}, {most} the most: {long[most]} tokens too many"
    )
    if not recipe.problems.skip_long:
        raise UserError(f"{line}; raise engine.max_model_len, or leave them out with problems.skip_long=true")
    for split in Split:
        if all(problem.id in long for problem in problems if problem.split is split):
            raise UserError(f"{line}, and they are all of the split {split}; raise engine.max_model_len")
    return list(long)


@dataclass
class Kit:
    """Open engines by key (a role, or a name such as `prm:base`), with prompts, parser, grader and problems by id."""

    recipe: Recipe
    backend: Backend
    prompts: Prompts
    reader: Reader
    grader: Grader
    problems: dict[str, Problem]
    ledger: Ledger  # its verdicts are those on all solutions that were graded
    grading: int = 0  # solutions whose grades are waited for

    def engine(self, key: str = Role.POLICY) -> Engine:
        return self.backend.engine(key)

    def prm(self, key: str = Role.PRM) -> Prm:
        if key == PUBLISHED:
            return published.PublishedPrm(self.engine(key), published.form(self.recipe.prm.published))
        return Prm(self.engine(key), self.prompts, self.recipe.prm.labels, self.recipe.prm.aggregate)

    def searcher(
        self, policy: bool = True, prm: str | None = Role.PRM, reviser: bool = True, head: bool = False
    ) -> Searcher:
        """A searcher with the engines whose flag is set, and the PRM of that key."""
        return Searcher(
            self.engine() if policy else None,
            self.prm(prm) if prm else None,
            self.engine(Role.REVISER) if reviser else None,
            self.prompts,
            self.reader,
            self.recipe.sample,
            head=Head(self.engine(Role.HEAD), self.prompts, self.recipe.calibrate.bins) if head else None,
        )

    def stream(
        self, source: Callable[[], Coroutine[Any, Any, None] | None], full: Callable[[], bool] = lambda: False
    ) -> None:
        """Run the coroutines that `source` gives, so many at a time that the engines never wait for sequences.

        See `models.stepping.stream`. Solutions that are being graded count as sequences, or they could pile up.
        """
        enough = WINDOW * self.recipe.engine.max_running * max(1, len(self.recipe.engine.servers))
        self.backend.stream(source, lambda: full() or self.backend.sequences + self.grading >= enough)

    async def each(self, items: Iterable[T], work: Callable[[T], Awaitable[Iterable[object]]]) -> list[object]:
        """The records that `work` makes of each item, in the order of `items`; all items concurrently."""

        async def one(item: T) -> Iterable[object]:
            with drawing(f"{item}"):
                return await work(item)

        return [record for made in await together(map(one, items)) for record in made]

    def sampling(self, **changes: object) -> Sampling:
        """Sampling parameters for a whole solution, with `changes`."""
        return replace(self.reader.sampling(self.recipe.sample), **changes)

    async def solutions(
        self, question: Question, n: int, *, purpose: str, tag: str, prefix: tuple[int, ...] = (), **changes
    ) -> list[Solution]:
        """Sample `n` independent solutions of `question` that begin with `prefix`; `changes` as for `sampling`."""
        engine = self.engine()
        prompt = [*self.prompts.solve(question, engine.bare), *prefix]
        completions = await engine.generate(prompt, self.sampling(**changes), purpose=purpose, n=n)
        return [
            self.reader.solution(
                (*prefix, *done.tokens),
                done.finish,
                id=f"{question.id}/{tag}/{i}",
                question_id=question.id,
                purpose=purpose,
                model=engine.name,
            )
            for i, done in enumerate(completions)
        ]

    async def sampled(self, question: str, n: int, *, purpose: str, tag: str, **changes) -> list[Solution | Grade]:
        """`n` solutions of the question with that id, and their grades; `changes` as for `sampling`."""
        found = await self.solutions(self.problems[question].question, n, purpose=purpose, tag=tag, **changes)
        return [*found, *await self.grade(found)]

    async def searched(self, question: str, searcher: Searcher, strategy: Strategy, tag: str) -> list[Solution | Grade]:
        """All candidates of a search of the question with that id, and their grades."""
        outcome = await search(strategy, self.problems[question].question, searcher, tag=tag)
        found = [candidate.solution for candidate in outcome.candidates]
        return [*found, *await self.grade(found)]

    async def grade(self, solutions: Iterable[Solution]) -> list[Grade]:
        """A grade for each solution; the engines go on meanwhile."""
        pairs = [(self.problems[s.question_id], s) for s in solutions]
        self.grading += len(pairs)
        try:
            grades = await self.grader.grade(pairs)
        finally:
            self.grading -= len(pairs)
        self.ledger.current.verdicts.update(str(grade.verdict) for grade in grades)
        return grades

    async def correct(self, solutions: Iterable[Solution]) -> dict[str, bool]:
        """Solution id -> whether it is correct."""
        return {grade.solution_id: grade.correct for grade in await self.grade(solutions)}


def published_model(run: Run) -> dict[str, ModelRef]:
    """The published PRM of the recipe by its key; empty if the recipe names none."""
    spec = run.recipe.prm.published
    return {PUBLISHED: published.form(spec).ref} if spec else {}


@contextmanager
def open_kit(
    run: Run, models: Mapping[str, ModelRef], *splits: Split, ledger: Ledger, seed: int, leave_open: bool = False
) -> Iterator[Kit]:
    """Open the engines of `models` and the problems of `splits`, if any; `leave_open` as for `backend.engines`."""
    prompts, reader = prompts_and_reader(run)
    problems = {p.id: p for p in run.problems(*splits)} if splits else {}
    judges = {key for key, ref in models.items() if key.partition(":")[0] == Role.PRM and not ref.labels}
    labels = label_ids(prompts.tokenizer, run.recipe.prm.labels) if judges else None
    models = {key: replace(ref, labels=labels) if key in judges else ref for key, ref in models.items()}
    with TemporaryDirectory(prefix="flywheel-") as scratch, Grader(run.recipe.problems) as grader:
        with engines(run.recipe.engine, models, ledger, seed % 2**31, Path(scratch), leave_open) as backend:
            yield Kit(run.recipe, backend, prompts, reader, grader, problems, ledger)


def kit(ctx: Context, models: Mapping[str, ModelRef], *splits: Split):
    """`open_kit` for a stage, with the stage's ledger and a seed from run, round and stage."""
    return open_kit(ctx, models, *splits, ledger=ctx.ledger, seed=ctx.seed("engine"), leave_open=ctx.leave_open)
