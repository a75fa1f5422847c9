"""Does on-policy data hurt the reviser? python -m eval.on_policy_reviser RUN [RUN ...] [--round 1] [--attempts 8] [--questions 300]

Snell et al., section 6.1 and appendix, claim 11: a reviser trained further on its own chains that end right (ReST^EM) loses
the gain along the chain. Two revisers are trained from the base by the same recipe, on as many trajectories of each length: off-policy,
as the loop does (independent incorrect samples of the policy, then a correct one), and on-policy (the round's reviser's own
chains of training questions, cut at their first correct attempt). Both play chains on the test questions.

Prints JSON: pass@1 by attempt; the slope (attempts after the fourth less attempt 1), and the paired difference of the two
slopes and of the two first attempts, with 95% intervals over questions and runs.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.cli import answer
from eval.history_verifier import READS, chains
from flywheel.errors import UserError
from flywheel.ledger import Ledger
from flywheel.measure.stats import bootstrap_runs
from flywheel.recipe import load
from flywheel.records import Finish, ModelRef, Revise, Role, Solution, Split, Trajectory
from flywheel.runs.run import Context, Stage
from flywheel.stages.kit import closed, examples, text_tools
from flywheel.stages.train_reviser import trajectories
from flywheel.training import Job, train_sft


def first_right(chain: Sequence[Solution], right: dict[str, bool], context: int) -> Trajectory | None:
    """The chain up to its first correct attempt, with the last `context` readable ones before it."""
    place = next((i for i, s in enumerate(chain) if right[s.id]), None)
    if place is None or chain[place].finish is not Finish.STOP:
        return None
    return Trajectory(
        chain[place].question_id, (*[s for s in chain[:place] if s.answer is not None][-context:], chain[place])
    )


def alike(data: dict[str, list[Trajectory]]) -> dict[str, list[Trajectory]]:
    """Of each kind as many trajectories with 0, 1, ... incorrect attempts as the other has, drawn at random."""
    rng, out = random.Random(0), {name: [] for name in data}
    for length in sorted({len(t.attempts) for rows in data.values() for t in rows}):
        groups = {name: [t for t in rows if len(t.attempts) == length] for name, rows in data.items()}
        for name, group in groups.items():
            out[name] += rng.sample(group, min(map(len, groups.values())))
    return out


def play(run: Path, round: int, attempts: int, count: int) -> tuple[list[int], dict[str, np.ndarray]]:
    """Trajectories by incorrect attempts, of each kind as many; kind -> questions x attempts, 1.0 where right."""
    recipe = load(run / "recipe.yaml")
    ctx = Context(recipe, run, round, Stage("on_policy", (), ("sample", *READS), train=lambda ctx: {}, test_split=True))
    prompts, reader = text_tools(ctx)
    problems = {p.id: p for p in ctx.problems(Split.TRAIN)}
    made, right = chains(run, round, Split.TRAIN, Revise(recipe.reviser.context + 1, 3, "majority"), None)
    data = {
        "off_policy": trajectories(ctx),
        "on_policy": [t for chain in made if (t := first_right(chain, right, recipe.reviser.context))],
    }
    data = alike(data)
    lengths = [len(t.attempts) - 1 for t in data["on_policy"]]
    if len(lengths) < 2:
        raise UserError(f"{run}: {len(lengths)} trajectories are too few to train a reviser on")
    rate: dict[str, np.ndarray] = {}
    for name, rows in data.items():
        held = set(sorted({t.question_id for t in rows})[::10])
        texts = (
            (
                t.question_id,
                prompts.revise(problems[t.question_id].question, t.attempts[:-1]),
                closed(t.attempts[-1], reader.eos),
            )
            for t in rows
        )
        fit, check, _ = examples(texts, held, recipe.reviser.max_length)
        at = run / "studies" / f"round_{round}" / f"reviser_{name}"
        ledger = Ledger("on_policy", round)
        train_sft(fit, check, Job(recipe.model, recipe.reviser, at, recipe.seed, "last", Role.REVISER, ledger))
        ref = ModelRef(f"reviser_{name}", recipe.model.base, str(at / "adapter"))
        played, graded = chains(run, round, Split.TEST, Revise(attempts, 1, "majority"), count, ref)
        played.sort(key=lambda chain: chain[0].question_id)
        rate[name] = np.array([[float(graded[s.id]) for s in chain] for chain in played])
    return [lengths.count(k) for k in range(recipe.reviser.context + 1)], rate


def study(runs: Sequence[Path], round: int, attempts: int, count: int) -> dict:
    counts, rates = zip(*(play(run, round, attempts, count) for run in runs))
    rate = {name: np.array([of_run[name] for of_run in rates]) for name in rates[0]}  # runs x questions x attempts
    slope = {name: r[:, :, 4:].mean(2) - r[:, :, 0] for name, r in rate.items()}
    return {
        "trajectories": list(map(sum, counts)),
        "by_incorrect_attempts": list(counts),
        "questions": rate["on_policy"].shape[1],
        "pass@1_by_attempt": {name: r.mean((0, 1)).tolist() for name, r in rate.items()},
        "slope": {name: bootstrap_runs(s) for name, s in slope.items()},
        "on_less_off_policy": {
            "slope": bootstrap_runs(slope["on_policy"] - slope["off_policy"]),
            "first": bootstrap_runs(rate["on_policy"][:, :, 0] - rate["off_policy"][:, :, 0]),
        },
        "each_run": {
            "slope": (slope["on_policy"] - slope["off_policy"]).mean(1).tolist(),
            "first": (rate["on_policy"] - rate["off_policy"])[:, :, 0].mean(1).tolist(),
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.on_policy_reviser", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--round", type=int, default=1)
    parser.add_argument("--attempts", type=int, default=8)
    parser.add_argument("--questions", type=int, default=300)
    args = parser.parse_args(argv)
    if args.attempts < 5:
        parser.error("--attempts: five at least; the slope is that of attempts after the fourth")
    return answer(lambda: study(args.runs, args.round, args.attempts, args.questions))


if __name__ == "__main__":
    sys.exit(main())
