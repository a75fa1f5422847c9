"""What does a policy answer at temperature 0?

pass@1 is of samples at the recipe's temperature, as the paper's is. Served alone, a model would answer greedily,
once: this is the figure that a user of the last policy sees, and the cheapest answer that a search has to beat.

By round: the accuracy of the policy's greedy answers on all test questions of the problem set with its 95% interval
(runs averaged question by question), each run's alone, the paired gain over round 0, and tokens an answer.

`--problems FILE` asks other questions, which no stage has seen: FILE holds the recipe's section `problems`, and keys of
`prompts` to change, such as worked examples for the base. It is the measure of transfer, and of what was forgotten.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from eval.shared import add_runs, over_runs, whole_test
from flywheel.ledger import Ledger
from flywheel.measure.stats import bootstrap_runs
from flywheel.recipe import Loader, parse
from flywheel.records import ModelRef, Role, Split
from flywheel.runs.run import Run
from flywheel.stages.kit import open_kit
from flywheel.stages.shared import ids


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, round=False)
    parser.add_argument("--problems", type=Path, metavar="FILE", help="YAML with other questions, e.g. eval/transfer/*")


def asking(run: Run, file: Path) -> Run:
    """The same run with the problems, and the prompts, of `file`."""
    other, own = yaml.load(file.read_text(encoding="utf-8"), Loader), run.recipe.model_dump(mode="json")
    return Run(run.root, parse({**own, **other, "prompts": {**own["prompts"], **other.get("prompts", {})}}, str(file)))


def greedy(run: Run, model: ModelRef, questions: Sequence[str]) -> tuple[dict[str, float], float]:
    """(question -> 1.0 if `model` is right at temperature 0, else 0.0; mean tokens per answer, prompt included)."""
    with open_kit(run, {Role.POLICY: model}, Split.TEST, ledger=Ledger("greedy", 0), seed=run.recipe.seed) as kit:

        async def one(question: str) -> tuple[bool, int]:
            prompt, sampling = (
                kit.prompts.solve(kit.problems[question].question, kit.engine().bare),
                kit.sampling(temperature=0.0, top_p=1.0),
            )
            [done] = await kit.engine().generate(prompt, sampling, purpose="greedy")
            named = {"id": f"{question}/greedy", "question_id": question, "purpose": "greedy", "model": model.name}
            [grade] = await kit.grade([kit.reader.solution(done.tokens, done.finish, **named)])
            return grade.correct, len(prompt) + len(done.tokens) + done.eos

        drawn = kit.backend.run(questions, one)
    right = {question: float(correct) for question, (correct, _) in zip(questions, drawn)}
    return right, float(np.mean([tokens for _, tokens in drawn]))


def measure(args: argparse.Namespace) -> dict:
    runs, rows = [asking(run, args.problems) if args.problems else whole_test(run) for run in args.runs], []
    first: np.ndarray | None = None
    for r in range(min(max(run.rounds) for run in runs) + 1):
        found, spent = zip(*(greedy(run, run.model(Role.POLICY, r), ids(run, Split.TEST)) for run in runs))
        values = over_runs(found)
        first = values if first is None else first
        rows.append(
            {
                "round": r,
                "accuracy": bootstrap_runs(values),
                "runs": [np.mean(list(right.values())) for right in found],
                "gain": bootstrap_runs(values - first),
                "tokens": np.mean(spent),
            }
        )
    return {"questions": first.shape[1], "rounds": rows}
