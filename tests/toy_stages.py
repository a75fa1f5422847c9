"""Small real stages for the tests of the run directory: no model, the same records every time.

What a test wants to happen it says in the environment: TOY_SLEEP (seconds a chunk), TOY_FAULT
(`stage:chunk:fault`), TOY_LOG (a file that gets one line for each chunk computed). A process that gets SIGUSR1 writes
the stacks of its threads to TOY_LOG.stacks.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from flywheel.errors import EngineDied, StartAgain, UserError
from flywheel.models.driver import Backend
from flywheel.recipe import Recipe
from flywheel.records import Finish, Grade, Solution, Split, Step, Verdict
from flywheel.runs.run import Context, Run
from flywheel.runs.stage import Input, Stage
from flywheel.search.beam import Beam
from flywheel.search.best_of_n import BestOfN
from flywheel.search.strategies import AnyStrategy

if "TOY_LOG" in os.environ:
    STACKS = open(os.environ["TOY_LOG"] + ".stacks", "a")  # noqa: SIM115, open as long as the process lives
    faulthandler.register(signal.SIGUSR1, STACKS)


@dataclass(frozen=True, slots=True)
class Trial:
    question_id: str
    strategy: AnyStrategy
    right: bool
    extra: dict[str, float]


def log(line: str) -> None:
    if path := os.environ.get("TOY_LOG"):
        with open(path, "a") as file:
            file.write(f"{line} {os.environ.get('TOY_RANK', '0')} {os.getpid()}\n")


def fault(ctx: Context, chunk: str) -> None:
    stage, _, rest = os.environ.get("TOY_FAULT", "::").partition(":")
    at, _, kind = rest.partition(":")
    if stage != ctx.stage.name or at not in (chunk, "*"):
        return
    match kind:
        case "user":
            raise UserError("toy: this is what you did wrong")
        case "bug":
            raise KeyError("toy bug")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "again":  # rank 1 asks for it once; until then rank 0 waits as in a collective operation
            asked = ctx.dir / ".asked"
            if ctx.rank == 1 and not asked.exists():
                asked.touch()
                raise StartAgain("toy: out of memory")
            if ctx.rank == 0 and not asked.exists():
                time.sleep(600)
        case "engine" | "engine once":
            died = ctx.dir / ".died"
            if kind == "engine" or not died.exists():
                died.touch()
                raise EngineDied("the toy engine died")
        case "orphan":  # a grandchild that would outlive everyone
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            time.sleep(600)


@contextmanager
def tools(ctx: Context):
    log(f"tools:{ctx.stage.name}")
    yield Backend({}, [])


def draw(ctx: Context, question: str) -> Solution:
    rng = random.Random(ctx.seed(question))
    steps = tuple(Step(f"{n}\n", (n, n + 1)) for n in (rng.randrange(99) for _ in range(3)))
    return Solution(
        f"{question}/0", question, steps, Finish.STOP, str(rng.randrange(5)), "sample", "toy", f"{question}/0"
    )


async def work(ctx: Context, tool: Backend, questions: Sequence[str]) -> list[object]:
    assert isinstance(tool, Backend)
    log(f"{ctx.stage.name}:{ctx.round}:{questions[0]}")
    rows = []
    for question in questions:
        time.sleep(float(os.environ.get("TOY_SLEEP", 0)) / len(questions))
        fault(ctx, question)
        solution = draw(ctx, question)
        ctx.ledger.charge("policy", ctx.stage.name, parameters=10, prompt=5, generated=len(solution.tokens))
        verdict = Verdict.CORRECT if solution.answer == "3" else Verdict.INCORRECT
        rows += [solution, Grade(solution.id, question, verdict)]
    return rows


def finish(ctx: Context) -> dict:
    grades = list(ctx.read(Grade, ctx.stage.name))
    return {"solutions": len(grades), "right": sum(g.correct for g in grades), "nan": float("nan")}


async def trials(ctx: Context, tool: Backend, questions: Sequence[str]) -> list[object]:
    log(f"{ctx.stage.name}:{ctx.round}:{questions[0]}")
    fault(ctx, questions[0])
    right = {g.question_id: g.correct for g in ctx.read(Grade, "sample")}
    return [Trial(q, BestOfN(4) if right[q] else Beam(4), right[q], {"x": 0.5}) for q in questions]


def train(ctx: Context) -> dict:
    """Ten steps, each kept, so that a killed training goes on where it was."""
    log(f"{ctx.stage.name}:{ctx.round}")
    scratch = ctx.dir / "trainer"
    scratch.mkdir(exist_ok=True)
    for step in range(10):
        fault(ctx, str(step))
        if not (done := scratch / f"{ctx.rank}_{step}").exists():
            time.sleep(float(os.environ.get("TOY_SLEEP", 0)))
            done.touch()
        ctx.progress(step + 1, 10, loss=1 / (step + 1))
    (ctx.dir / "adapter").mkdir(exist_ok=True)
    if ctx.rank == 0:
        (ctx.dir / "adapter" / "weights").write_text(str(ctx.seed("weights")))
        ctx.ledger.train("policy", "distill", parameters=10, trained=2, tokens=100)
    return {
        "trained": True,
        "port": os.environ.get("MASTER_PORT"),
        "rank": os.environ.get("RANK"),
        "threads": os.environ["OMP_NUM_THREADS"],
    }


def gate(ctx: Context) -> dict:
    return {
        "passed": ctx.round != 2,
        "environment": {key: os.environ.get(key) for key in ("RANK", "WANDB_MODE", "DO_NOT_TRACK")},
    }


def train_ids(ctx: Context) -> list[str]:
    return [p.id for p in ctx.problems(Split.TRAIN)]


def test_ids(ctx: Context) -> list[str]:
    return [p.id for p in ctx.problems(Split.TEST)]


test_ids.__test__ = False

SAMPLE = Stage(
    "sample",
    ("sample", "engine"),
    (Input("gate", back=1), Input("distill", back=1)),
    train_ids,
    tools,
    work,
    finish=finish,
)
LABEL = Stage("label", ("label",), (Input("sample"),), train_ids, tools, trials, shares="sample")
DISTILL = Stage("distill", ("distill",), (Input("label"), Input("sample", every=True)), train=train)
GATE = Stage("gate", ("distill",), (Input("distill"),), items=lambda ctx: [], work=work, finish=gate)
EVALUATE = Stage(
    "evaluate",
    ("evaluate",),
    (Input("gate"), Input("evaluate", back=1)),
    test_ids,
    tools,
    work,
    finish=finish,
    test_split=True,
)


def stages(round: int) -> list[Stage]:
    return [EVALUATE] if round == 0 else [SAMPLE, LABEL, DISTILL, GATE, EVALUATE]


# ---- the rehearsal of a toy run ----


def sample(recipe: Recipe, force: bool) -> None:
    log(f"rehearsal:{force}")
    if os.environ.get("TOY_FAULT") == "rehearsal" and not force:
        raise UserError("try-out: no answer could be read; see prompts.answer")


# ---- the report of a toy run ----


def after_round(run: Run, round: int) -> None:
    log(f"report:{round}")
    print(f"report of round {round}")
    if os.environ.get("TOY_FAULT") == "report":
        raise OSError("no way to the tracker")


def summary(run: Run) -> dict:
    return {"run": run.root.name}


def print_round(data: dict, round: int) -> None:
    print(f"summary of {data['run']} at round {round}")
