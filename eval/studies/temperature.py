"""At which temperature should each round sample? Calibration questions drawn anew by every policy at several.

B-STaR (Zeng et al. 2024, arXiv 2412.17256) tunes the temperature of the harvest round by round, since a policy that is
trained on its own answers becomes sure. By round and temperature, for `--samples` draws of each calibration question:
pass@1; the share that the harvest would cover (`harvest.min_votes` right draws, by `harvest.vote`); the entropy of the
answers. `less_usual`: the share covered less that of the recipe's temperature. Intervals are over runs and questions.
"""

from __future__ import annotations

import argparse

import numpy as np

from eval.shared import add_runs
from flywheel.ledger import Ledger
from flywheel.measure.diversity import diversity
from flywheel.measure.stats import bootstrap_runs
from flywheel.problems.grading import answer_key
from flywheel.records import Grade, ModelRef, Role, Solution, Split
from flywheel.runs.run import Run
from flywheel.stages.kit import open_kit
from flywheel.stages.shared import enough_votes, ids

NAMES = ("pass@1", "covered", "answer_entropy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, round=False)
    parser.add_argument("--samples", type=int, default=32, help="draws of a question (%(default)s)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.4, 0.7, 1.0, 1.3, 1.6], metavar="T")


def drawn(run: Run, model: ModelRef, samples: int, temperatures: list[float]) -> np.ndarray:
    """(temperatures, questions, NAMES) of one policy."""
    questions = ids(run, Split.CALIBRATE)
    with open_kit(
        run, {Role.POLICY: model}, Split.CALIBRATE, ledger=Ledger("temperature", 0), seed=run.recipe.seed
    ) as kit:

        async def one(asked: tuple[float, str]) -> tuple[float, float, float]:
            t, question = asked
            found = await kit.sampled(question, samples, purpose="temperature", tag=f"t{t:g}", temperature=t)
            made = [record for record in found if isinstance(record, Solution)]
            right = {record.solution_id for record in found if isinstance(record, Grade) and record.correct}
            covered = bool(enough_votes(run.recipe.harvest, [s for s in made if s.id in right]))
            spread = diversity([(s, s.id in right) for s in made], answer_key)["answer_entropy"]
            return len(right) / len(made), float(covered), spread

        asked = [(t, question) for t in temperatures for question in questions]
        return np.array(kit.backend.run(asked, one)).reshape(len(temperatures), len(questions), len(NAMES))


def measure(args: argparse.Namespace) -> dict:
    usual = args.runs[0].recipe.sample.temperature
    temperatures, rows = sorted({*args.temperatures, usual}), []
    for r in range(min(max(run.rounds) for run in args.runs) + 1):
        found = np.array([drawn(run, run.model(Role.POLICY, r), args.samples, temperatures) for run in args.runs])
        covered = found[..., NAMES.index("covered")]  # runs, temperatures, questions
        for i, t in enumerate(temperatures):
            rows.append(
                {
                    "round": r,
                    "temperature": t,
                    **{name: bootstrap_runs(found[:, i, :, k]) for k, name in enumerate(NAMES)},
                    "less_usual": bootstrap_runs(covered[:, i] - covered[:, temperatures.index(usual)]),
                    "each_run": covered[:, i].mean(axis=1),
                }
            )
    return {"runs": [str(run.root) for run in args.runs], "usual": usual, "rows": rows}
