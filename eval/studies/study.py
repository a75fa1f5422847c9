"""Draw once what the claims are measured on: difficulty, samples, and every strategy on the test questions.

With the policy, PRM and reviser that search in that round, on all test questions of the problem set:

- difficulty: `--oracle` samples a question that only bin it; the PRM judges the first `--judged`;
- pool: `--pool` judged samples a question, for every curve of best-of-N;
- trials: at each of `--budgets` beam, lookahead and the grid of revisions, greedy answers, best-of-N at two lower
  temperatures;
- adaptive: sampling that stops by itself.

Chunks are kept in RUN/studies/round_R/, so a killed study goes on where it stopped, and a second one over the same
draws is free. Processes share the chunks, one a core for a small model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from eval import draws
from eval.draws import Difficult, Drawn, Tried, add_sizes, check_origin, titles
from eval.shared import draw, folder, whole_test
from flywheel.errors import UserError
from flywheel.ledger import metered
from flywheel.measure.health import repeats
from flywheel.records import ModelRef, Problem, Role, Solution
from flywheel.runs.processes import default_workers
from flywheel.runs.run import Context, Run
from flywheel.search.adaptive import Adaptive
from flywheel.search.beam import Beam
from flywheel.search.best_of_n import BestOfN
from flywheel.search.dvts import Dvts
from flywheel.search.greedy import Greedy
from flywheel.search.particle import Particle
from flywheel.search.revise import LONGEST, Revise
from flywheel.search.run import search, search_all
from flywheel.search.strategy import Strategy, judge
from flywheel.stages.kit import Kit
from flywheel.stages.shared import answer_is_right, search_models

LOWER = (0.7, 0.4)  # temperatures, beside the recipe's
SURE = (0.99, 0.95, 0.9, 0.8, 0.7)  # of adaptive sampling; the first covers the others
Asked = list[tuple[int, Strategy]]  # (budget, strategy)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sizes(parser)
    parser.add_argument("--chunk", type=int, default=20, help="questions to a shard (%(default)s)")


# ---- strategies --------------------------------------------------------------------------


def wanted(budgets: Sequence[int], reviser: bool) -> Asked:
    """Beams of width 4 and sqrt N, lookahead 1 and 3 at equal budget, DVTS, particles, chains of powers of 4 attempts.

    And the simple strategies that these have to beat: greedy answers, and best-of-N at lower temperatures.
    """
    out: Asked = []
    for budget in sorted(budgets, reverse=True):
        out += [(budget, Beam(budget, width)) for width in {min(4, budget), int(budget**0.5)}]
        looks = [k for k in (1, 3) if budget >= 4 * (k + 1)]
        out += [(budget, Beam(budget // (k + 1), min(4, budget // (k + 1)), lookahead=k)) for k in looks]
        out += [(budget, Dvts(budget)), (budget, Particle(budget))] if budget >= 4 else []
        lengths = [4**i for i in range(10) if budget % 4**i == 0 and 4**i <= min(budget, LONGEST)] if reviser else []
        makers = ("policy", "reviser") if reviser else ("policy",)
        out += [(budget, Greedy(maker)) for maker in makers]
        out += [(budget, BestOfN(budget, how, t)) for t in LOWER for how in ("weighted", "majority")]
        selects = ("weighted", "majority", "last")
        out += [(budget, Revise(length, budget // length, select)) for length in lengths for select in selects]
    return list(dict.fromkeys(out))


def stopping(budgets: Sequence[int], reviser: bool) -> Asked:
    """Adaptive sampling by maker and `sure`, for budgets above 4: with 4 it would be best-of-4."""
    makers = ("policy", "reviser") if reviser else ("policy",)
    large = sorted((b for b in budgets if b > 4), reverse=True)
    return [(budget, Adaptive(budget, sure, maker)) for budget in large for maker in makers for sure in SURE]


# ---- parts -------------------------------------------------------------------------------


def shape(solution: Solution, usual: int | None) -> str:
    """`repeated`: a step occurs twice; `short` or `long`: fewer or more steps than `usual`, if known; else ""."""
    if repeats(solution):
        return "repeated"
    if usual is None or len(solution.steps) == usual:
        return ""
    return "short" if len(solution.steps) < usual else "long"


def usual_steps(ctx: Context, text: str) -> int | None:
    """The number of steps of a derivation in the chain set: one per operation, and the answer; else None."""
    if not (ctx.recipe.problems.step_checker or "").startswith("data.chain."):
        return None
    from data.chain.domain import parse_question

    return len(parse_question(text)[1]) + 1


def level(ctx: Context, problem: Problem) -> float:
    """The first number in the problem's `level`, else the usual number of steps, else 0."""
    number = re.search(r"\d+", problem.level)
    return float(number[0]) if number else float(usual_steps(ctx, problem.question.text) or 0)


async def difficulty(ctx: Context, kit: Kit, questions: Sequence[str], *, oracle: int, judged: int) -> list[Difficult]:
    searcher = kit.searcher(reviser=False, head=True)

    async def one(id: str) -> list[Difficult]:
        question = kit.problems[id].question
        drawn = (await search(BestOfN(oracle, "majority"), question, searcher, tag=f"r{ctx.round}/oracle")).candidates
        with metered() as spent:
            bin = await searcher.head.bin(question)
        scored = await judge(question, drawn[:judged], searcher.prm)
        made = Difficult(
            id,
            right=sum((await kit.correct(c.solution for c in drawn)).values()),
            samples=len(drawn),
            predicted=sum(c.score for c in scored) / len(scored),
            tokens=sum(c.cost for c in drawn),
            predicted_tokens=sum(c.cost + c.score_cost for c in scored),
            level=level(ctx, kit.problems[id]),
            prompt_bin=bin,
            prompt_tokens=spent.tokens,
        )
        return [made]

    return await kit.each(questions, one)


async def pool(ctx: Context, kit: Kit, questions: Sequence[str], *, size: int) -> list[Drawn]:
    searcher = kit.searcher(reviser=False)

    async def one(id: str) -> list[Drawn]:
        question, rows = kit.problems[id].question, []
        found = (await search(BestOfN(size), question, searcher, tag=f"r{ctx.round}/pool")).candidates
        usual, right = usual_steps(ctx, question.text), await kit.correct(c.solution for c in found)
        for c in found:
            s, cached = c.solution, c.cached + c.score_cached
            rows.append(Drawn(id, s.answer, c.score, right[s.id], c.cost, c.score_cost, cached, shape(s, usual)))
        return rows

    return await kit.each(questions, one)


async def trials(
    ctx: Context, kit: Kit, questions: Sequence[str], *, budgets: Sequence[int], which: Callable[..., Asked]
) -> list[Tried]:
    searcher = kit.searcher(reviser=Role.REVISER in search_models(ctx))
    asked = which(budgets, searcher.reviser is not None)

    async def one(id: str) -> list[Tried]:
        question, rows = kit.problems[id].question, []
        outcomes = await search_all(asked, question, searcher, tag=f"r{ctx.round}/study")
        usual = usual_steps(ctx, question.text)
        right = await kit.correct({c.solution.id: c.solution for _, _, o in outcomes for c in o.candidates}.values())
        for budget, strategy, o in outcomes:
            solutions = [c.solution for c in o.candidates]
            winners = [c for c in o.candidates if o.answer is not None and c.solution.answer == o.answer]
            best = max(winners, key=lambda c: c.score, default=None)
            one_chain = isinstance(strategy, Revise) and strategy.chains == 1
            made = Tried(
                id,
                strategy,
                budget,
                correct=answer_is_right(o.answer, solutions, right),
                tokens=o.tokens,
                cached=o.cached,
                odd=sum(bool(shape(s, usual)) for s in solutions) / len(solutions),
                winner=shape(best.solution, usual) if best else "none",
                by_attempt=tuple(right[s.id] for s in solutions) if one_chain else (),
            )
            rows.append(made)
        return rows

    return await kit.each(questions, one)


# ---- processes ---------------------------------------------------------------------------


def models(ctx: Context) -> dict[str, ModelRef]:
    """The models of the round's search, and its difficulty head, also one that the round itself refused."""
    head = ModelRef(f"head_{ctx.round}", ctx.recipe.model.base, str(adapter(ctx, ctx.round)))
    return {**search_models(ctx), Role.HEAD: head}


def adapter(run: Run, round: int) -> Path:
    return run.path("train_head", round) / "adapter"


def draw_all(args: argparse.Namespace, cores: Sequence[int] | None, share: tuple[int, int]) -> None:
    """Sample a share (as in `draw`) of all parts of all runs on `cores`."""
    if cores:
        os.sched_setaffinity(0, cores)
    works = {
        "difficulty": partial(difficulty, oracle=args.oracle, judged=args.judged),
        "pool": partial(pool, size=args.pool),
        "trials": partial(trials, budgets=args.budgets, which=wanted),
        "adaptive": partial(trials, budgets=args.budgets, which=stopping),
    }
    with redirect_stdout(sys.stderr):
        for run in args.runs:
            for part, title in titles(args).items():
                directory = folder(run, args.round) / title
                if (directory / "finished").is_file():
                    continue
                directory.mkdir(parents=True, exist_ok=True)
                check_origin(directory, run, args.round)
                sizes = {"count": args.questions, "chunk": args.chunk}
                draw(whole_test(run), args.round, title, models, works[part], **sizes, share=share)


def measure(args: argparse.Namespace) -> dict:
    draws.check_sizes(args)
    for run in args.runs:
        if not adapter(run, args.round).is_dir():
            raise UserError(f"{run.root}: round {args.round} has no difficulty head: --fork it with --set head={{}}")
    cores, recipe = sorted(os.sched_getaffinity(0)), args.runs[0].recipe
    count = min(len(cores), recipe.engine.workers or default_workers(recipe.model.base, len(cores)))
    shares = [cores[i::count] if count > 1 else None for i in range(count)]
    spawn = multiprocessing.get_context("spawn")
    others = [spawn.Process(target=draw_all, args=(args, shares[i], (i, count))) for i in range(1, count)]
    for process in others:
        process.start()
    try:
        draw_all(args, shares[0], (0, count))
    except BaseException:
        for process in others:
            process.terminate()
        raise
    for process in others:
        process.join()
    if failed := sum(process.exitcode != 0 for process in others):
        raise UserError(f"{failed} of the study's processes failed; what is drawn is kept")
    drawn = [folder(run, args.round) / title for run in args.runs for title in titles(args).values()]
    for directory in drawn:
        (directory / "finished").touch()
    return {"drawn": [str(directory) for directory in drawn]}
