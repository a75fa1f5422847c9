"""How well does a PRM find the first wrong step of a solution? F1 on ProcessBench, by subset and verifier.

Zheng et al. 2024 (arXiv 2412.06559). FOLDER holds its files (gsm8k.json, math.json, olympiadbench.json, omnimath.json),
each a JSON list or a JSON object a line: `problem`, `steps`, and `label`, the index of the first wrong step or -1. The
verifiers are the round's PRM, the un-finetuned base, and the published PRM of the recipe or of --published. The first
step with a value below the threshold is called wrong; F1 is the harmonic mean of the accuracies on solutions with an
error (`on_wrong`) and without one (`on_right`). Intervals are a bootstrap over solutions. Solutions that do not fit
`engine.max_model_len` are left out for every verifier, and counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from eval.shared import add_published, add_runs, with_published
from flywheel.errors import TooLong, UserError
from flywheel.ledger import Ledger
from flywheel.measure.step_errors import step_errors
from flywheel.records import ModelRef, Question, Role, Step
from flywheel.stages.kit import Kit, open_kit, published_model

SUBSETS = ("gsm8k", "math", "olympiadbench", "omnimath")
RESAMPLES = 1000


@dataclass(frozen=True)
class Sample:
    """A solution by its steps; `wrong`: the index of the first wrong one, None if all are right."""

    question: Question
    steps: tuple[str, ...]
    wrong: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, count=1)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="the files of ProcessBench")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="a step of a lower value is called wrong (default: %(default)s, for values that are probabilities)",
    )
    add_published(parser)


def samples(path: Path) -> list[Sample]:
    """Raises UserError, a line with file and row, for what is not of ProcessBench's form."""
    text = path.read_text(encoding="utf-8")
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [*map(json.loads, text.splitlines())]
    except ValueError as error:
        raise UserError(f"{path}: neither a JSON list nor a JSON object a line ({error})") from None
    found = []
    for number, row in enumerate(rows, 1):
        match row:
            case {"problem": str(problem), "steps": [_, *_] as steps, "label": int(label)} if all(
                isinstance(step, str) for step in steps
            ) and -1 <= label < len(steps):
                question = Question(f"{path.stem}/{row.get('id', number)}", problem)
                found.append(Sample(question, tuple(steps), None if label == -1 else label))
            case _:
                raise UserError(
                    f"{path}: row {number}: wanted problem (text), steps (texts), label (the index of a step, or -1)"
                )
    if {sample.wrong is None for sample in found} != {True, False}:
        raise UserError(f"{path}: F1 needs solutions with an error and without one")
    return found


def values(kit: Kit, key: str, found: Sequence[Sample]) -> list[tuple[float, ...] | None]:
    """The step values of each sample by the PRM of `key`; None if it does not fit the model."""
    prm, encode = kit.prm(key), kit.prompts.tokenizer.encode

    async def judge(sample: Sample) -> tuple[float, ...] | None:
        texts = [step.rstrip() + kit.recipe.prompts.step for step in sample.steps]
        steps = [Step(text, tuple(encode(text, add_special_tokens=False))) for text in texts]
        try:
            return await prm.values(sample.question, steps)
        except TooLong:
            return None

    return kit.backend.run(found, judge)


def figures(judged: Sequence[tuple[float, ...]], wrong: Sequence[int | None], threshold: float) -> dict:
    """F1 with its 95% interval, and both accuracies. Resamples without both kinds of solutions do not count."""
    rng, drawn = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        chosen = rng.integers(len(judged), size=len(judged))
        if {wrong[i] is None for i in chosen} == {True, False}:
            drawn.append(step_errors([judged[i] for i in chosen], [wrong[i] for i in chosen], threshold).f1)
    return {**asdict(step_errors(judged, wrong, threshold)), "f1_ci": np.quantile(drawn, [0.025, 0.975]).tolist()}


def measure(args: argparse.Namespace) -> dict:
    files = [path for name in SUBSETS for path in sorted(args.data.glob(f"{name}.json*"))]
    if not files:
        raise UserError(f"{args.data}: none of ProcessBench's files in it ({', '.join(f'{s}.json' for s in SUBSETS)})")
    data, run = {path.stem: samples(path) for path in files}, with_published(args.runs[0], args.published)
    models = {Role.PRM: run.model(Role.PRM, args.round), "prm:base": ModelRef("policy_0", run.recipe.model.base)}
    models |= published_model(run)
    names = {key: "base" if key == "prm:base" else ref.name for key, ref in models.items()}
    subsets = {}
    with open_kit(run, models, ledger=Ledger("process_bench", args.round), seed=0) as kit:
        for name, found in data.items():
            judged = {key: values(kit, key, found) for key in models}
            fits = [i for i in range(len(found)) if all(row[i] is not None for row in judged.values())]
            wrong = [found[i].wrong for i in fits]
            if {place is None for place in wrong} != {True, False}:
                raise UserError(f"{name}: too few solutions fit engine.max_model_len {run.recipe.engine.max_model_len}")
            subsets[name] = {"solutions": len(fits), "too_long": len(found) - len(fits)}
            subsets[name] |= {
                name: figures([judged[key][i] for i in fits], wrong, args.threshold) for key, name in names.items()
            }
    mean = {name: float(np.mean([subset[name]["f1"] for subset in subsets.values()])) for name in names.values()}
    return {"threshold": args.threshold, "subsets": subsets, "mean_f1": mean}
