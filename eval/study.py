"""Draw once what the claims are measured on: python -m eval.study RUN [RUN ...] [--round 1] [--oracle 512] [--pool 256] [--budgets 4 16 64]

On the test questions of each finished run (all of the problem set's, more than a loop measures on), with the policy, PRM and reviser that search in that round:

- difficulty: `--oracle` samples a question that only bin it; the PRM judges the first `--judged`;
- pool: `--pool` judged samples a question, for every curve of best-of-N;
- trials: beam, lookahead and the grid of revisions at each of `--budgets`;
- adaptive: sampling that stops by itself.

Chunks are kept in RUN/studies/round_R/, so a killed study goes on where it stopped and a second
one over the same draws is free. Processes share the chunks, one a core for a small model.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flywheel.search.tools import judged

from eval import prompt_head
from flywheel.errors import UserError, explain
from flywheel.models.engine import Sampling
from flywheel.recipe import load
from flywheel.records import (
    Adaptive,
    Beam,
    BestOfN,
    Candidate,
    ModelRef,
    Outcome,
    Problem,
    Revise,
    Solution,
    Split,
    Strategy,
)
from flywheel.runs import manifest
from flywheel.runs.files import read_json, sha256, write_json
from flywheel.runs.loop import workers
from flywheel.runs.run import Context, Stage, fill, read_table
from flywheel.runs.shards import shard_dirs
from flywheel.search.plan import LONGEST, name
from flywheel.search.run import search, search_all
from flywheel.stages.kit import Kit, answer_is_right, ids, kit, search_tools, searchers

BUDGETS = (4, 16, 64)  # generations, where none are named
SURE = (0.99, 0.95, 0.9, 0.8, 0.7)  # of adaptive sampling: the surest first, which holds the others
READS = ("train_prm", "choose_reviser", "gate@-1?", "distill@-1?")


@dataclass(frozen=True, slots=True)
class Difficult:
    """How hard one question is, by samples that score nothing else: `right` of `samples`; `seen`: mean PRM score of `judged`."""

    question_id: str
    right: int
    samples: int
    seen: float
    judged: int
    tokens: int  # of the samples
    judged_tokens: int  # of the judged ones, with their judging
    level: (
        float  # what the problem set says: the laboratory's number of operations, MATH's level; 0 where it says nothing
    )
    said: int  # the bin that the prompt alone gave (eval.prompt_head), 1 the easiest
    said_tokens: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """One judged sample. `shape` is "" for an ordinary one, else what is odd about it (`shape`)."""

    question_id: str
    answer: str | None
    score: float
    correct: bool
    cost: int
    score_cost: int
    cached: int
    shape: str


@dataclass(frozen=True, slots=True)
class Tried:
    """One strategy on one question. `shapes`: share of its candidates that are odd; `winner`: the shape of the best of the winning answer."""

    question_id: str
    strategy: str
    budget: int
    correct: bool
    covered: bool
    tokens: int
    cached: int  # of them, what the prefix cache served
    odd: float
    winner: str
    by_attempt: tuple[bool, ...] = ()


def shape(solution: Solution, usual: int | None) -> str:
    """`repeated`: a step twice; `short` or `long`: other than the `usual` number of steps, where that is known."""
    texts = [step.text.strip() for step in solution.steps]
    if max(Counter(texts).values(), default=0) > 1:
        return "repeated"
    if usual is None or len(texts) == usual:
        return ""
    return "short" if len(texts) < usual else "long"


def usual_steps(ctx: Context, text: str) -> int | None:
    """The laboratory has one derivation a question: its operations, and the answer."""
    if not (ctx.recipe.problems.step_checker or "").startswith("data.chain."):
        return None
    from data.chain.domain import parse_question

    return len(parse_question(text)[1]) + 1


def level(ctx: Context, problem: Problem) -> float:
    """The first number in the label that the problem set carries; in the laboratory the number of steps."""
    number = re.search(r"\d+", problem.level)
    return float(number[0]) if number else float(usual_steps(ctx, problem.question.text) or 0)


# ---- what is drawn -----------------------------------------------------------------------


def difficulty(ctx: Context, kit: Kit, questions: Sequence[str], *, oracle: int, judge: int) -> Iterator[Difficult]:
    async def one(question: str) -> tuple[list[Candidate], list[Candidate], int, int]:
        item, tools = kit.problems[question].question, search_tools(kit)
        drawn = await search(BestOfN(oracle, "majority"), item, tools, tag=f"r{ctx.round}/oracle")
        prompt = kit.prompts.solve(item)
        [word] = await kit.engine("head").generate(prompt, Sampling(1, 0.0), purpose="head")
        said = words.index(word.tokens[0]) + 1 if word.tokens and word.tokens[0] in words else (len(words) + 1) // 2
        return (
            list(drawn.candidates),
            list(await judged(item, drawn.candidates[:judge], tools.prm)),
            said,
            len(prompt) + 1,
        )

    words = prompt_head.words(kit.prompts.tokenizer)
    for question, (drawn, seen, said, said_tokens) in kit.each(questions, one):
        right = sum(g.correct for g in kit.grade([c.solution for c in drawn]))
        tokens = sum(c.cost for c in drawn)
        judged_tokens = sum(c.cost + c.score_cost for c in seen)
        yield Difficult(
            question,
            right,
            len(drawn),
            sum(c.score for c in seen) / len(seen),
            len(seen),
            tokens,
            judged_tokens,
            level(ctx, kit.problems[question]),
            said,
            said_tokens,
        )


def pool(ctx: Context, kit: Kit, questions: Sequence[str], *, size: int) -> Iterator[Drawn]:
    async def one(question: str) -> Outcome:
        return await search(BestOfN(size), kit.problems[question].question, search_tools(kit), tag=f"r{ctx.round}/pool")

    for question, outcome in kit.each(questions, one):
        usual = usual_steps(ctx, kit.problems[question].question.text)
        right = {g.solution_id: g.correct for g in kit.grade([c.solution for c in outcome.candidates])}
        for c in outcome.candidates:
            yield Drawn(
                question,
                c.solution.answer,
                c.score,
                right[c.solution.id],
                c.cost,
                c.score_cost,
                c.cached + c.score_cached,
                shape(c.solution, usual),
            )


def wanted(budgets: Sequence[int], reviser: bool) -> list[tuple[int, Strategy]]:
    """Beams of width 4 and sqrt, lookahead 1 and 3 at equal budget, every sequential : parallel ratio in powers of four."""
    out: list[tuple[int, Strategy]] = []
    for budget in sorted(budgets, reverse=True):
        root = int(budget**0.5)
        out += [(budget, Beam(budget, width)) for width in {min(4, budget), root}]
        out += [
            (budget, Beam(budget // (k + 1), min(4, budget // (k + 1)), lookahead=k))
            for k in (1, 3)
            if budget >= 4 * (k + 1)
        ]
        ratios = [4**i for i in range(10) if budget % 4**i == 0 and 4**i <= min(budget, LONGEST)] if reviser else []
        out += [(budget, Revise(a, budget // a, select)) for a in ratios for select in ("weighted", "majority", "last")]
    return list(dict.fromkeys(out))


def adaptive(budgets: Sequence[int], reviser: bool) -> list[tuple[int, Strategy]]:
    """Adaptive sampling by each maker and surety; of 4 it stops at its first step or is best-of-4."""
    makers = ("policy", "reviser") if reviser else ("policy",)
    return [
        (budget, Adaptive(budget, sure, maker))
        for budget in sorted(budgets, reverse=True)
        if budget > 4
        for maker in makers
        for sure in SURE
    ]


def trials(
    ctx: Context,
    kit: Kit,
    questions: Sequence[str],
    *,
    budgets: Sequence[int],
    which: Callable[[Sequence[int], bool], list],
) -> Iterator[Tried]:
    tools = search_tools(kit)
    asked = which(budgets, tools.reviser is not None)

    async def one(question: str) -> list[tuple[int, Strategy, Outcome]]:
        return await search_all(asked, kit.problems[question].question, tools, tag=f"r{ctx.round}/study")

    for question, outcomes in kit.each(questions, one):
        usual = usual_steps(ctx, kit.problems[question].question.text)
        distinct = {c.solution.id: c.solution for _, _, o in outcomes for c in o.candidates}
        right = {g.solution_id: g.correct for g in kit.grade(list(distinct.values()))}
        for budget, strategy, o in outcomes:
            solutions = [c.solution for c in o.candidates]
            winners = [c for c in o.candidates if c.solution.answer is not None and c.solution.answer == o.answer]
            yield Tried(
                question,
                name(strategy),
                budget,
                bool(answer_is_right(o.answer, solutions, right)),
                any(right[s.id] for s in solutions),
                o.tokens,
                o.cached,
                sum(bool(shape(s, usual)) for s in solutions) / len(solutions),
                shape(max(winners, key=lambda c: c.score).solution, usual) if winners else "none",
                tuple(right[s.id] for s in solutions) if isinstance(strategy, Revise) and strategy.chains == 1 else (),
            )


# ---- the parts of a study ----------------------------------------------------------------


def parts(args: argparse.Namespace) -> dict[str, tuple[type, Stage]]:
    """Directory -> what its shards hold, and the stage that draws it. Sizes are in the name: other sizes are another study."""
    drawn = {
        f"difficulty_{args.oracle}_{args.judged}": (
            Difficult,
            partial(difficulty, oracle=args.oracle, judge=args.judged),
        ),
        f"pool_{args.pool}": (Drawn, partial(pool, size=args.pool)),
        "trials_" + "_".join(map(str, sorted(args.budgets))): (
            Tried,
            partial(trials, budgets=args.budgets, which=wanted),
        ),
        "adaptive_" + "_".join(map(str, sorted(args.budgets))): (
            Tried,
            partial(trials, budgets=args.budgets, which=adaptive),
        ),
    }
    tools = lambda ctx: kit(ctx, {**searchers(ctx), "head": head(ctx)}, Split.TEST)
    items = lambda ctx: ids(ctx, Split.TEST)[: args.questions]
    part = f"_first_{args.questions}" if args.questions else ""
    return {
        title + part: (kind, Stage(title + part, (), READS, items=items, tools=tools, work=work, test_split=True))
        for title, (kind, work) in drawn.items()
    }


def head(ctx: Context) -> ModelRef:
    return ModelRef("prompt_head", ctx.recipe.model.base, str(prompt_head.folder(ctx.run, ctx.round) / "adapter"))


def context(run: Path, round: int, stage: Stage, chunk: int) -> Context:
    """The run's own recipe, but for the size of chunks, and all of the test split: more questions than the loop measures on."""
    recipe = load(run / "recipe.yaml")
    limits = {split: n for split, n in recipe.problems.limits.items() if split != Split.TEST}
    recipe = recipe.model_copy(
        update={
            "engine": recipe.engine.model_copy(update={"chunk": chunk}),
            "problems": recipe.problems.model_copy(update={"limits": limits}),
        }
    )
    ctx = Context(recipe, run, round, stage)
    ctx.dir = run / "studies" / f"round_{round}" / stage.name  # a study is no stage: it stays out of the rounds
    return ctx


def origin(run: Path, round: int) -> dict[str, str]:
    """sha256 of what decides a study's draws: the manifests of the round's models, the prompt's head."""
    models = [
        (round, "train_prm"),
        (round, "choose_reviser"),
        (round, "sample"),
        *((r, "gate") for r in range(1, round)),
    ]
    files = [manifest.stage_dir(run, *at) / "manifest.json" for at in models] + [
        prompt_head.folder(run, round) / "adapter" / "adapter_model.safetensors"
    ]
    return {str(path.relative_to(run)): sha256(path) for path in files}


def check_origin(directory: Path, run: Path, round: int) -> None:
    """A part was drawn with the models that are there now. Raises UserError; one without any draw takes them as its own."""
    note, now = directory / "made_from.json", origin(run, round)
    if not shard_dirs(directory) and not note.is_file():
        write_json(note, now)
    was = read_json(note) or {}
    if was != now:
        changed = next(name for name in now if was.get(name) != now[name])
        raise UserError(
            f"{directory}: drawn with another {changed}; remove it, and what else of this round is in {directory.parent}, and draw again"
        )


def largest(run: Path, args: argparse.Namespace) -> argparse.Namespace:
    """`args` for the most questions of which every part is drawn, where they name no number: all, else the most `--questions`."""
    folder = run / "studies" / f"round_{args.round}"
    drawn = lambda asked: all((folder / title / "finished").is_file() for title in parts(asked))
    if args.questions or drawn(args):
        return args
    sizes = {int(path.parent.name.rpartition("_first_")[2]) for path in folder.glob("trials_*_first_*/finished")}
    found = [argparse.Namespace(**{**vars(args), "questions": n}) for n in sorted(sizes, reverse=True)]
    return next(filter(drawn, found), args)  # of one without a whole study, `read_all` says what is missing


def read_all(run: Path, args: argparse.Namespace) -> tuple[list[Difficult], list[Drawn], list[Tried]]:
    """Everything that was drawn of a run, by kind. Raises UserError where a part is not finished."""
    rows = [(kind, read(run, args.round, title, kind)) for title, (kind, _) in parts(args).items()]
    return tuple(
        [row for kind, part in rows if kind is wanted_kind for row in part] for wanted_kind in (Difficult, Drawn, Tried)
    )


def read(run: Path, round: int, title: str, kind: type) -> list:
    """All records of a part. Raises UserError where it is not finished."""
    directory = run / "studies" / f"round_{round}" / title
    if not (directory / "finished").is_file():
        raise UserError(f"{directory}: not drawn; python -m eval.study {run} --round {round} draws it")
    check_origin(directory, run, round)
    tables = [
        table for shard in shard_dirs(directory) if (table := shard / f"{kind.__name__}.parquet").is_file()
    ]  # a chunk may yield none
    return [row for table in tables for row in read_table(table, kind)]


def arguments(argv: Sequence[str] | None, program: str, about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--round", type=int, default=1)
    parser.add_argument("--questions", type=int, help="the first so many test questions (all)")
    parser.add_argument("--oracle", type=int, default=512, help="samples that bin a question")
    parser.add_argument("--judged", type=int, default=64, help="of these, how many the PRM judges")
    parser.add_argument("--pool", type=int, default=256)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--chunk", type=int, default=20, help="questions")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not 1 <= args.judged <= args.oracle:
        parser.error(f"--judged {args.judged}: 1 to --oracle ({args.oracle}) wanted")
    if wrong := [b for b in args.budgets if b & (b - 1) or not 1 <= b <= args.pool]:
        parser.error(
            f"--budgets {wrong[0]}: a power of two, and at most --pool ({args.pool}), wanted: best-of-N is read off the pool"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = arguments(argv, "python -m eval.study", __doc__.split("\n\n")[0])
    try:
        for run in args.runs:
            if not (run / "recipe.yaml").is_file():
                raise UserError(f"{run}: not a run (it has no recipe.yaml)")
        if args.worker is None:
            cores = sorted(os.sched_getaffinity(0))
            recipe = load(args.runs[0] / "recipe.yaml")
            for run in args.runs:
                if not (prompt_head.folder(run, args.round) / "adapter" / "adapter_model.safetensors").is_file():
                    subprocess.run(
                        [sys.executable, "-m", "eval.prompt_head", str(run), "--round", str(args.round)],
                        check=True,
                        stdout=sys.stderr,
                    )
            count = min(len(cores), recipe.engine.workers or workers(recipe.model.base, len(cores)))
            others = [
                subprocess.Popen([sys.executable, "-m", "eval.study", *argv, "--worker", f"{i}/{count}"])
                for i in range(1, count)
            ]
            mine = 0
        else:
            mine, count = map(int, args.worker.split("/"))
            others = []
        if count > 1:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[mine::count])
        with redirect_stdout(sys.stderr):
            for run, (_, stage) in itertools.product(args.runs, parts(args).values()):
                ctx = context(run, args.round, stage, args.chunk)
                if (ctx.dir / "finished").is_file():
                    continue
                ctx.dir.mkdir(parents=True, exist_ok=True)
                check_origin(ctx.dir, run, args.round)
                fill(ctx)
                (ctx.dir / "finished").touch()
                print(f"{ctx.dir}: drawn", flush=True)
        failed = sum(child.wait() != 0 for child in others)
        if failed:
            raise UserError(f"{failed} of the study's processes failed; what is drawn is kept")
    except UserError as error:
        print(explain(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
