"""The rehearsal of a new run: its base sampled, trained and served in miniature, before anything is written.

It finds within a minute what would fail a stage hours later, and measures what the estimate needs. Each function is
called in a process of its own, like a stage; `runs/rehearsal.py` calls them.
"""

from __future__ import annotations

import os
import random
import resource
import time
from itertools import islice
from pathlib import Path
from statistics import fmean

from flywheel.errors import TooLong
from flywheel.ledger import Ledger
from flywheel.models.engine import Completion
from flywheel.models.prm import label_ids
from flywheel.recipe import Recipe
from flywheel.records import ModelRef, Problem, Role, Split
from flywheel.runs.run import Run
from flywheel.search.run import search_all
from flywheel.search.strategies import strategies
from flywheel.stages.kit import ON_GPU, Kit, open_kit, prompts_and_reader, runtime_adapters, too_long
from flywheel.stages.tryout import try_out

SECONDS = 3.0  # after which no further batch is begun
SAMPLING = 10.0  # seconds for the measured batch of solutions
RIGHT = 4  # solutions at least, for their mean length
SAMPLES = 4  # a question in the sampled batches


def sample(recipe: Recipe, force: bool) -> dict[str, float]:
    """Try the base out (`try_out`), then measure its sampling by one process.

    open: seconds to open an engine, the first of this machine, so more than later ones take. generate, read: tokens/s
    that it generates in large batches, and reads of texts that it has not seen. prompt, bare, check, solution: mean
    tokens of a question's prompt, of the base's with its worked examples, of the PRM's, of a solution; right: of a
    right one, 0 if fewer than RIGHT are; steps: mean number of a solution's steps. Raises UserError as `try_out` does,
    and TooLong if no question fits the model.
    """
    run, started = Run(Path(), recipe, skipped=()), time.monotonic()
    models = {Role.POLICY: ModelRef("policy_0", recipe.model.base)}
    with open_kit(run, models, Split.TRAIN, ledger=Ledger("rehearsal", 0), seed=0) as kit:
        kit.engine()
        opened = time.monotonic() - started
        fitting = [problem for problem in kit.problems.values() if not too_long(recipe, kit.prompts, problem)]
        if not fitting:
            raise TooLong("no question fits engine.max_model_len")
        tried = try_out(kit, fitting, force)
        made = [solution.generated for solution, _ in tried]
        right = [solution.generated for solution, grade in tried if grade.correct]
        asked, prompts = [problem.question for problem in fitting], kit.prompts
        solve, bare, check = (
            fmean(map(len, texts))
            for texts in (
                map(prompts.solve, asked),
                (prompts.solve(question, bare=True) for question in asked),
                (prompts.check(question, ())[0] for question in asked),
            )
        )
        drawn, generate = generated(kit, fitting, max(1, round(fmean(made))))
        return {
            "open": opened,
            "generate": generate,
            "read": reading(kit, fitting[0], [done.tokens for done in drawn]),
            "prompt": solve,
            "bare": bare,
            "check": check,
            "solution": fmean(made),
            "right": fmean(right) if len(right) >= RIGHT else 0.0,
            "steps": max(1.0, fmean(len(solution.steps) for solution, _ in tried)),
        }


def generated(kit: Kit, problems: list[Problem], length: int) -> tuple[list[Completion], float]:
    """(completions, tokens/s) of a batch of up to `length` tokens each, a full one if SAMPLING seconds are enough.

    The prompts are in the prefix cache by then, as they are for all but the first sample of a question.
    """
    count = max(1, kit.recipe.engine.max_running // SAMPLES)
    problems = random.Random(0).sample(problems, min(count, len(problems)))
    engine = kit.engine()

    def draw(problems: list[Problem], most: int) -> tuple[list[Completion], float]:
        async def some(problem: Problem) -> list[Completion]:
            prompt = kit.prompts.solve(problem.question, engine.bare)
            return await engine.generate(prompt, kit.sampling(max_tokens=most), purpose="rehearsal", n=SAMPLES)

        started = time.monotonic()
        done = [one for drawn in kit.backend.run(problems, some) for one in drawn]
        return done, max(time.monotonic() - started, 1e-9)

    draw(problems, 1)
    _, seconds = draw(problems, few := min(4, length))
    share = min(1.0, SAMPLING / (seconds * length / few))
    done, seconds = draw(problems[: max(1, int(len(problems) * share))], length)
    return done, sum(len(one.tokens) for one in done) / seconds


def reading(kit: Kit, problem: Problem, texts: list[tuple[int, ...]]) -> float:
    """Tokens/s that the engine reads of texts that its prefix cache does not hold: those given, shuffled."""
    chance, prompt = random.Random(0), kit.prompts.solve(problem.question)
    room = kit.recipe.engine.max_model_len - 1 - len(prompt)

    async def read(text: list[int]) -> list[Completion]:
        return await kit.engine().generate([*prompt, *text], kit.sampling(max_tokens=1), purpose="rehearsal")

    for count in (16, len(texts)):  # first a few, for an engine that would need minutes for all
        batch = [chance.sample(text, len(text))[:room] for text in texts[:count]]
        started = time.monotonic()
        kit.backend.run(batch, read)
        seconds = max(time.monotonic() - started, 1e-9)
        if seconds * len(texts) / len(batch) > SECONDS:
            break
    return sum(map(len, batch)) / seconds


def train(recipe: Recipe, out: Path, length: int) -> dict[str, float]:
    """Train a policy and a PRM for a few steps on random texts of `length` tokens, into `out/policy`, `out/prm`.

    start: seconds that the first training takes for one text, with all that it loads; train: tokens/s of the policy's
    training; train_memory: bytes at the peak of the run's largest training, if it fills a micro batch with its longest
    texts: what a token takes is measured.
    """
    from flywheel.training import Example, Job, PrmExample, train_prm, train_sft

    os.environ["WANDB_MODE"] = "disabled"
    run, chance = Run(Path(), recipe, skipped=()), random.Random(0)
    prompts, reader = prompts_and_reader(run)
    length = max(2, min(length, recipe.distill.max_length, recipe.prm.max_length))
    asked = [prompts.solve(problem.question) for problem in run.problems(Split.TRAIN)[:100]]
    words, prompt = [token for tokens in asked for token in tokens], max(map(len, asked))

    def text(length: int = length) -> tuple[int, ...]:
        return (*chance.choices(words, k=length - 1), reader.eos)

    def job(role: Role, name: str, batch: int) -> Job:
        spec = {Role.POLICY: recipe.distill, Role.PRM: recipe.prm}[role].model_copy(
            update={"batch_size": batch, "micro_batch_size": batch, "epochs": 1, "evals": 1, "start": None}
        )
        return Job(recipe.model, spec, out / name, 0, "last", role, Ledger("rehearsal", 0))

    labels = label_ids(prompts.tokenizer, recipe.prm.labels)
    started = time.monotonic()
    train_prm([PrmExample(text(), (length,), (1.0,))], [], labels, job(Role.PRM, "prm", 1))
    start = time.monotonic() - started
    full, peaks = recipe.distill.micro_batch_size, []
    for name, batch, steps, size in (
        ("half_a_text", 1, 1, length // 2 + 1),
        ("few_steps", full, 3, length),
        ("steps", full, 16, length),
    ):
        texts = [Example(text(size), size // 2) for _ in range(batch * steps)]
        report = train_sft(texts, [], job(Role.POLICY, name, batch))
        peaks.append(peak())
        if report.seconds > SECONDS / 2:
            break
    (out / name).rename(out / "policy")
    a_token = (peaks[-1] - peaks[0]) / (full * length - length // 2)
    shown = {"reviser": recipe.reviser.context}  # solutions of a training's text, besides the one that is learned
    most = max(
        spec.micro_batch_size * min(spec.max_length, prompt + (1 + shown.get(key, 0)) * recipe.sample.max_tokens)
        for key, spec in recipe.trainings.items()
    )
    return {"start": start, "train": report.tokens / report.seconds, "train_memory": peaks[0] + a_token * most}


def serve(recipe: Recipe, out: Path) -> dict[str, float]:
    """Open policy, PRM, reviser and the base as a PRM, as the search on test questions does; run every strategy once.

    open: seconds to open one of these engines. serve_memory: bytes of one process with all of them, at its peak, and
    on a CPU of their caches, which take memory only as they fill.
    """
    run, started = Run(Path(), recipe, skipped=()), time.monotonic()
    models = {
        role: ModelRef(f"{role}_1", recipe.model.base, str(out / ("prm" if role is Role.PRM else "policy") / "adapter"))
        for role in (Role.POLICY, Role.PRM, Role.REVISER)
    } | {"prm:base": ModelRef("policy_0", recipe.model.base)}
    smallest = min(recipe.calibrate.budgets)
    wanted = [(budget, strategy) for budget, strategy in strategies(recipe.calibrate) if budget == smallest]
    with open_kit(run, models, Split.TRAIN, ledger=Ledger("rehearsal", 0), seed=0) as kit:
        opened = (time.monotonic() - started) / len(models)
        fitting = (problem for problem in kit.problems.values() if not too_long(recipe, kit.prompts, problem))

        async def one(problem: Problem) -> None:
            outcomes = await search_all(wanted, problem.question, kit.searcher(), tag="rehearsal")
            await kit.grade(candidate.solution for _, _, outcome in outcomes for candidate in outcome.candidates)

        kit.backend.run(islice(fitting, 1), one)
    caches = 0 if ON_GPU else 1 if runtime_adapters(recipe) else len(models)
    return {"open": opened, "serve_memory": peak() + caches * (recipe.engine.kv_cache_mb << 20)}


def peak() -> int:
    """The largest number of bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
