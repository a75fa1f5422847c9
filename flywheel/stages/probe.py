"""The probe of `--dry-run`: what this machine makes of the recipe's model in some ten seconds.

Each function is called in a process of its own; `runs/estimate.py` turns what they return into a cost by stage.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from flywheel.errors import TooLong
from flywheel.ledger import Ledger
from flywheel.models.engine import Completion
from flywheel.recipe import Recipe
from flywheel.records import ModelRef, Problem, Role, Split
from flywheel.runs.run import Run
from flywheel.stages.kit import Kit, open_kit, prompts_and_reader, too_long

SECONDS = 3.0  # after which no further batch is begun
SAMPLES = 4  # a question in the sampled batches


def sampling(recipe: Recipe) -> dict[str, float]:
    """Speed and lengths of the base's sampling, by one process.

    open: seconds to open an engine. generate, read: tokens/s that it generates in full batches, and reads of texts that
    it has not seen. prompt, check, solution: mean tokens of a question's prompt, of the PRM's, of a solution; steps:
    mean number of its steps.
    """
    run, started = Run(Path(), recipe, skipped=()), time.monotonic()
    models = {Role.POLICY: ModelRef("policy_0", recipe.model.base)}
    with open_kit(run, models, *Split, ledger=Ledger("probe", 0), seed=0) as kit:
        opened = time.monotonic() - started
        fitting = [p for p in kit.problems.values() if not too_long(recipe, kit.prompts, p)]
        if not fitting:
            raise TooLong("no question fits engine.max_model_len")
        solve, check = (
            [len(tokens) for tokens in map(make, fitting)]
            for make in (lambda p: kit.prompts.solve(p.question), lambda p: kit.prompts.check(p.question, ())[0])
        )
        made, generate, length = generated(kit, fitting)
        steps = [len(kit.reader.steps(done.tokens)) / max(1, len(done.tokens)) for done in made]
        return {
            "open": opened,
            "generate": generate,
            "read": reading(kit, fitting[0], [done.tokens for done in made]),
            "prompt": sum(solve) / len(solve),
            "check": sum(check) / len(check),
            "solution": length,
            "steps": max(1.0, length * sum(steps) / len(steps)),
        }


def generated(kit: Kit, problems: list[Problem]) -> tuple[list[Completion], float, float]:
    """(completions, tokens/s, mean length of a whole solution) of full batches of ever longer completions."""
    spec, most = kit.recipe.sample, 4
    count = max(1, kit.recipe.engine.max_running // SAMPLES)
    problems = random.Random(0).sample(problems, min(count, len(problems)))
    while True:
        most = min(most, spec.max_tokens)

        async def draw(problem: Problem, most: int = most) -> list[Completion]:
            sampling = kit.sampling(max_tokens=most)
            return await kit.engine().generate(
                kit.prompts.solve(problem.question), sampling, purpose="probe", n=SAMPLES
            )

        started = time.monotonic()
        done = [one for _, drawn in kit.each(problems, draw) for one in drawn]
        seconds, tokens = time.monotonic() - started, sum(len(one.tokens) for one in done)
        if most == spec.max_tokens:
            return done, tokens / max(seconds, 1e-9), tokens / len(done)
        if seconds > SECONDS / 2:
            # as if every token were equally likely to be the last; a solution ends at max_tokens at the latest
            end = sum(bool(one.tokens) and one.finish == "stop" for one in done) / max(1, tokens)
            whole = (1 - (1 - end) ** spec.max_tokens) / end if end else spec.max_tokens
            return done, tokens / max(seconds, 1e-9), whole
        most *= 4


def reading(kit: Kit, problem: Problem, texts: list[tuple[int, ...]]) -> float:
    """Tokens/s that the engine reads of texts that its prefix cache does not hold: those given, shuffled."""
    chance, prompt = random.Random(0), kit.prompts.solve(problem.question)
    room = kit.recipe.engine.max_model_len - 1 - len(prompt)

    async def read(text: list[int]) -> list[Completion]:
        return await kit.engine().generate([*prompt, *text], kit.sampling(max_tokens=1), purpose="probe")

    for count in (16, len(texts)):  # first a few, for an engine that would need minutes for all
        batch = [chance.sample(text, len(text))[:room] for text in texts[:count]]
        started = time.monotonic()
        list(kit.each(batch, read))
        seconds = max(time.monotonic() - started, 1e-9)
        if seconds * len(texts) / len(batch) > SECONDS:
            break
    return sum(map(len, batch)) / seconds


def training(recipe: Recipe, length: int) -> dict[str, float]:
    """Speed of LoRA training on texts of `length` tokens. start: seconds before the first step; train: tokens/s."""
    from flywheel.training import Example, Job, train_sft

    os.environ["WANDB_MODE"] = "disabled"
    run, chance = Run(Path(), recipe, skipped=()), random.Random(0)
    prompts, _ = prompts_and_reader(run)
    length = max(2, min(length, recipe.distill.max_length))
    words = [token for problem in run.problems(Split.TRAIN)[:100] for token in prompts.solve(problem.question)]
    batch, steps = 1, 1
    while True:
        spec = recipe.distill.model_copy(
            update={"batch_size": batch, "micro_batch_size": batch, "epochs": 1, "evals": 1, "start": None}
        )
        texts = [Example(tuple(chance.choices(words, k=length)), length // 2) for _ in range(batch * steps)]
        with TemporaryDirectory(prefix="flywheel-") as out:
            job = Job(recipe.model, spec, Path(out), 0, "last", Role.POLICY, Ledger("probe", 0))
            started = time.monotonic()
            report = train_sft(texts, [], job)
            start = time.monotonic() - started - report.seconds
        if report.seconds > SECONDS / 2 or (batch == recipe.distill.micro_batch_size and steps > 1):
            return {"start": max(0.0, start), "train": report.tokens / report.seconds}
        batch, steps = recipe.distill.micro_batch_size, 1 if batch == 1 else 16
