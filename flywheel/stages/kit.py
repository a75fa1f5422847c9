"""What a sampling stage works with: open engines, prompts, the parser of solutions, the grader."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from flywheel.errors import UserError
from flywheel.ledger import Ledger
from flywheel.models.backend import open_backend
from flywheel.models.driver import Backend
from flywheel.models.engine import Engine, Sampling
from flywheel.models.prm import Prm, label_ids
from flywheel.models.prompts import Prompts
from flywheel.models.steps import Reader
from flywheel.models.weights import check_length, check_targets, judge_fault, load_tokenizer
from flywheel.problems.grading import Grader, load_function
from flywheel.recipe import Recipe
from flywheel.records import Grade, ModelRef, Problem, Question, Role, Solution, Split
from flywheel.runs.run import Context, Run
from flywheel.search.run import search
from flywheel.search.strategy import Searcher, Strategy

T = TypeVar("T")
R = TypeVar("R")


def prompts_and_reader(run: Run) -> tuple[Prompts, Reader]:
    """The prompts and the solution parser for the run's tokenizer; opens no engine."""
    spec = run.recipe.prompts
    tokenizer = load_tokenizer(run.recipe.model.base)
    return Prompts(spec, tokenizer), Reader(tokenizer, spec)


def preflight(recipe: Recipe) -> None:
    """Check before the run what would fail a stage hours later: stop words, labels, templates, lengths, checkers.

    Raises UserError.
    """
    try:
        tokenizer = load_tokenizer(recipe.model.base)
        prompts = Prompts(recipe.prompts, tokenizer)
        Reader(tokenizer, recipe.prompts)
        prompts.solve(Question("preflight", "1"))
        label_ids(tokenizer, recipe.prm.labels)
        check_length(recipe.model.base, recipe.engine.max_model_len)
        check_targets(recipe.model)
        fault = judge_fault(recipe.model.base)
    except (ValueError, re.error) as error:
        raise UserError(str(error)) from None
    for name, key in (
        (recipe.problems.checker, "problems.checker"),
        (recipe.problems.step_checker, "problems.step_checker"),
    ):
        if name:
            load_function(name, key)
    for word in prompts.foreign():
        print(f"prompts: {word} is no token of {recipe.model.base}, but plain text; of another model?", flush=True)
    if fault and recipe.engine.kind == "vllm" and recipe.engine.adapters != "runtime":
        print(
            f"model: {recipe.model.base} has {fault}: its PRMs score by label log-probabilities, one request a step,"
            " which is slower than as a classifier",
            flush=True,
        )


@dataclass
class Kit:
    """Open engines by key (a role, or a name such as `prm:base`), with prompts, parser, grader and problems by id."""

    recipe: Recipe
    backend: Backend
    prompts: Prompts
    reader: Reader
    grader: Grader
    problems: dict[str, Problem]

    def engine(self, key: str = Role.POLICY) -> Engine:
        return self.backend.engine(key)

    def prm(self, key: str = Role.PRM) -> Prm:
        return Prm(self.engine(key), self.prompts, self.recipe.prm.labels, self.recipe.prm.aggregate)

    def searcher(self, policy: bool = True, prm: bool = True, reviser: bool = True) -> Searcher:
        """A searcher with the engines whose flag is set."""
        return Searcher(
            self.engine() if policy else None,
            self.prm() if prm else None,
            self.engine(Role.REVISER) if reviser else None,
            self.prompts,
            self.reader,
            self.recipe.sample,
        )

    def each(self, items: Iterable[T], work: Callable[[T], Awaitable[R]]) -> Iterator[tuple[T, R]]:
        """Run `work` on all items concurrently; yields (item, result) in the order of `items`."""
        items = list(items)
        return zip(items, self.backend.run(items, work))

    def sampling(self, **changes: object) -> Sampling:
        """Sampling parameters for a whole solution, with `changes`."""
        return replace(Sampling.of(self.recipe.sample, self.reader.stop, self.reader.done), **changes)

    async def solutions(self, question: Question, n: int, *, purpose: str, tag: str) -> list[Solution]:
        """Sample `n` independent solutions of `question` from the policy."""
        engine = self.engine()
        completions = await engine.generate(
            self.prompts.solve(question, engine.bare), self.sampling(), purpose=purpose, n=n
        )
        return [
            self.reader.solution(
                done.tokens,
                done.finish,
                id=f"{question.id}/{tag}/{i}",
                question_id=question.id,
                purpose=purpose,
                model=engine.name,
            )
            for i, done in enumerate(completions)
        ]

    def sample_all(self, counts: Mapping[str, int], *, purpose: str, tag: str) -> Iterator[Solution | Grade]:
        """Sample `counts[id]` solutions of each question; yields a question's solutions, then their grades."""

        async def one(question: str) -> list[Solution]:
            return await self.solutions(self.problems[question].question, counts[question], purpose=purpose, tag=tag)

        for _, solutions in self.each(counts, one):
            yield from solutions
            yield from self.grade(solutions)

    def search_all(
        self, questions: Iterable[str], searcher: Searcher, strategy: Callable[[str], Strategy], tag: str
    ) -> Iterator[Solution | Grade]:
        """Search each question by `strategy(id)`; yields all candidates of a question, then their grades."""

        async def one(question: str) -> list[Solution]:
            outcome = await search(strategy(question), self.problems[question].question, searcher, tag=tag)
            return [candidate.solution for candidate in outcome.candidates]

        for _, solutions in self.each(questions, one):
            yield from solutions
            yield from self.grade(solutions)

    def grade(self, solutions: Sequence[Solution]) -> list[Grade]:
        return self.grader.verdicts([(self.problems[s.question_id], s) for s in solutions])

    def correct(self, solutions: Iterable[Solution]) -> dict[str, bool]:
        """Solution id -> whether it is correct."""
        return {grade.solution_id: grade.correct for grade in self.grade(list(solutions))}


@contextmanager
def open_kit(run: Run, models: Mapping[str, ModelRef], *splits: Split, ledger: Ledger, seed: int) -> Iterator[Kit]:
    """Open the engines of `models` and the problems of `splits`; closes all engines on exit."""
    prompts, reader = prompts_and_reader(run)
    problems = {p.id: p for p in run.problems(*splits)}
    judges = {key for key in models if key.partition(":")[0] == Role.PRM}
    labels = label_ids(prompts.tokenizer, run.recipe.prm.labels) if judges else None
    models = {key: replace(ref, labels=labels) if key in judges else ref for key, ref in models.items()}
    with TemporaryDirectory(prefix="flywheel-") as scratch, Grader(run.recipe.problems) as grader:
        backend = open_backend(run.recipe.engine, models, ledger, seed % 2**31, Path(scratch))
        try:
            yield Kit(run.recipe, backend, prompts, reader, grader, problems)
        finally:
            backend.close()


def kit(ctx: Context, models: Mapping[str, ModelRef], *splits: Split):
    """`open_kit` for a stage, with the stage's ledger and a seed from run, round and stage."""
    return open_kit(ctx, models, *splits, ledger=ctx.ledger, seed=ctx.seed("engine"))
