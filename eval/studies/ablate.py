"""The loop with one part as it was in round 1, forked from a finished run: what is that part worth?

    python -m eval ablate first_prm --fork chain --name chain_first_prm --round 3
    python -m eval compare runs/chain runs/chain_first_prm

What follows the first word are the arguments of flywheel.iterate (--dry-run says what would run). `--fork OLD` takes
over every stage that the ablation makes alike, rounds 0 and 1 among them. From round 2 on:

- first_plan: no calibration; round 1's plans are used with the models of the day;
- first_prm: no labels and no training of a PRM; round 1's judges on.

`search`, which only measures, is left out of these rounds. Other ablations are changes of the recipe alone:
`accelerate launch -m flywheel.iterate --fork chain --name chain_restart --round 3 --set prm.start=null
reviser.start=null distill.start=null`; `eval/runs.yaml` lists those whose results are kept.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from contextlib import redirect_stdout

from flywheel import iterate
from flywheel.runs.run import Context
from flywheel.runs.stage import Input, Stage
from flywheel.search.plan import Plan
from flywheel.stages import stages
from flywheel.stages.shared import LAST_POLICY, model_names, search_models


def keep_plan(ctx: Context) -> dict:
    models, first = model_names(search_models(ctx)), ctx.figures("calibrate", 1)
    return {kind: Plan.from_dict({**first[kind], "models": models}).to_dict() for kind in ("serve", "harvest")}


def keep_prm(ctx: Context) -> dict:
    if ctx.rank == 0:
        shutil.copytree(ctx.path("train_prm", 1) / "adapter", ctx.dir / "adapter", dirs_exist_ok=True)
    return {**ctx.figures("train_prm", 1), "model": f"prm_{ctx.round}"}


NO_SEARCH = Stage("search", (), (Input("evaluate"),), train=lambda ctx: {})
ROUND_1_PLAN = (Input("calibrate", of=1), Input("train_prm"), Input("choose_reviser"), *LAST_POLICY)
PARTS: dict[str, dict[str, Stage | None]] = {  # ablation -> stage name -> its replacement; None: left out
    "first_plan": {"calibrate": Stage("calibrate", (), ROUND_1_PLAN, train=keep_plan), "search": NO_SEARCH},
    "first_prm": {
        "label": None,
        "train_prm": Stage("train_prm", (), (Input("train_prm", of=1),), train=keep_prm),
        "search": NO_SEARCH,
    },
}


def changed(ablation: str, round: int) -> list[Stage]:
    parts = PARTS[ablation] if round > 1 else {}
    return [stage for ordinary in stages(round) if (stage := parts.get(ordinary.name, ordinary))]


def first_plan(round: int) -> list[Stage]:
    return changed("first_plan", round)


def first_prm(round: int) -> list[Stage]:
    return changed("first_prm", round)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ablation", choices=PARTS)
    parser.add_argument("iterate", nargs=argparse.REMAINDER, help="arguments of flywheel.iterate")


def measure(args: argparse.Namespace) -> dict:
    """Run the loop and exit with its exit code; does not return."""
    with redirect_stdout(sys.__stdout__):
        sys.exit(iterate.main(args.iterate, stages=f"eval.studies.ablate:{args.ablation}"))
