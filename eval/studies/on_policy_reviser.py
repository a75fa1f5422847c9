"""Does on-policy data hurt the reviser?

Snell et al., section 6.1 and appendix, claim 11: a reviser trained further on its own chains that end right (ReST^EM)
loses the gain along the chain. Two revisers are trained from the base by the same recipe, on as many trajectories of
each length: off-policy, as the loop does (independent incorrect samples of the policy, then a correct one), and
on-policy (the round's reviser's own chains of training questions, cut at their first correct attempt). Both play
chains on the test questions.

pass@1 by attempt; the slope (attempts after the fourth less attempt 1), and the paired difference of the two slopes
and of the two first attempts, with 95% intervals over questions and runs.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.shared import add_runs, as_stage, chains, folder, job
from flywheel.errors import UserError
from flywheel.measure.stats import bootstrap_runs
from flywheel.records import Finish, ModelRef, Role, Solution, Split, Trajectory
from flywheel.runs.run import Run
from flywheel.search.revise import Revise
from flywheel.stages import train_reviser
from flywheel.stages.kit import prompts_and_reader
from flywheel.stages.shared import closed, examples
from flywheel.stages.train_reviser import trajectories
from flywheel.training import train_sft
from flywheel.training.stored import FOLDER


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--attempts", type=int, default=8, help="of a chain, five at least (%(default)s)")
    parser.add_argument("--questions", type=int, default=300, help="test questions (%(default)s)")


def first_right(chain: Sequence[Solution], right: dict[str, bool], context: int) -> Trajectory | None:
    """The chain's first correct attempt after the last `context` attempts with an answer; None if none is correct."""
    place = next((i for i, s in enumerate(chain) if right[s.id]), None)
    if place is None or chain[place].finish is not Finish.STOP:
        return None
    before = [s for s in chain[:place] if s.answer is not None][-context:]
    return Trajectory(chain[place].question_id, (*before, chain[place]))


def alike(data: dict[str, list[Trajectory]]) -> dict[str, list[Trajectory]]:
    """Subsample so that each kind has the same number of trajectories with 0, 1, ... incorrect attempts."""
    rng, out = random.Random(0), {name: [] for name in data}
    for length in sorted({len(t.attempts) for rows in data.values() for t in rows}):
        groups = {name: [t for t in rows if len(t.attempts) == length] for name, rows in data.items()}
        for name, group in groups.items():
            out[name] += rng.sample(group, min(map(len, groups.values())))
    return out


def train(run: Run, rows: Sequence[Trajectory], out: Path) -> str:
    """Train a reviser from the base; returns the path of its adapter."""
    (prompts, reader), spec = prompts_and_reader(run), run.recipe.reviser
    problems = {p.id: p.question for p in run.problems(Split.TRAIN)}
    held = set(sorted({t.question_id for t in rows})[::10])
    texts = (
        (t.question_id, prompts.revise(problems[t.question_id], t.attempts[:-1]), closed(t.attempts[-1], reader.eos))
        for t in rows
    )
    shutil.rmtree(out / FOLDER, ignore_errors=True)  # of another call of this study
    fit, check = examples(out / FOLDER, 0, texts, spec.max_length).split(held)
    train_sft(fit, check, job(run, out, spec, "last", Role.REVISER))
    return str(out / "adapter")


def play(run: Run, round: int, attempts: int, count: int) -> tuple[list[int], dict[str, np.ndarray]]:
    """(number of trajectories by incorrect attempts, kind -> (questions, attempts) array, 1.0 where right)."""
    shown = run.recipe.reviser.context
    made, right = chains(run, round, Split.TRAIN, Revise(shown + 1, 3, "majority"))
    on_policy = [t for chain in made if (t := first_right(chain, right, shown))]
    data = alike({"off_policy": list(trajectories(as_stage(run, round, train_reviser.STAGE))), "on_policy": on_policy})
    lengths = [len(t.attempts) - 1 for t in data["on_policy"]]
    if len(lengths) < 2:
        raise UserError(f"{run.root}: {len(lengths)} trajectories are too few to train a reviser on")
    rate: dict[str, np.ndarray] = {}
    for name, rows in data.items():
        adapter = train(run, rows, folder(run, round) / f"reviser_{name}")
        ref = ModelRef(f"reviser_{name}", run.recipe.model.base, adapter)
        played, graded = chains(run, round, Split.TEST, Revise(attempts, 1, "majority"), count, ref)
        played.sort(key=lambda chain: chain[0].question_id)
        rate[name] = np.array([[float(graded[s.id]) for s in chain] for chain in played])
    return [lengths.count(k) for k in range(shown + 1)], rate


def measure(args: argparse.Namespace) -> dict:
    if args.attempts < 5:
        raise UserError("--attempts: five at least; the slope is that of attempts after the fourth")
    counts, rates = zip(*(play(run, args.round, args.attempts, args.questions) for run in args.runs))
    rate = {name: np.array([of_run[name] for of_run in rates]) for name in rates[0]}  # runs x questions x attempts
    slope = {name: r[:, :, 4:].mean(2) - r[:, :, 0] for name, r in rate.items()}
    gain = {
        "slope": slope["on_policy"] - slope["off_policy"],
        "first": (rate["on_policy"] - rate["off_policy"])[:, :, 0],
    }
    return {
        "trajectories": list(map(sum, counts)),
        "by_incorrect_attempts": list(counts),
        "questions": rate["on_policy"].shape[1],
        "pass@1_by_attempt": {name: r.mean((0, 1)) for name, r in rate.items()},
        "slope": {name: bootstrap_runs(values) for name, values in slope.items()},
        "on_less_off_policy": {name: bootstrap_runs(values) for name, values in gain.items()},
        "each_run": {name: values.mean(1) for name, values in gain.items()},
    }
