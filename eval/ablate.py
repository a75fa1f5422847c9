"""The loop with one part as it was in round 1: python -m eval.ablate first_plan|first_prm --round 3 --name NAME [...]

Ablations of claim 15; what follows the first word are the arguments of flywheel.iterate. Round 1 is
the ordinary one, so its directories may be copied from a run of the same recipe and seed. From round 2 on:

- first_plan: no calibration; round 1's plans are used with the models of the day;
- first_prm: no labels and no training of a PRM; round 1's judges on.

(Adapters from the base or from the last policy are the recipe's: `--set prm.start=null reviser.start=null distill.start=null`.)

`search`, which only measures, is left out of these rounds; `eval.compare` reads what the others made.
"""

from __future__ import annotations

import shutil
import sys

from flywheel import iterate
from flywheel.runs.run import Context, Stage
from flywheel.search.plan import Plan
from flywheel.stages import stages
from flywheel.stages.kit import plan_models


def changed(round: int, parts: dict[str, Stage | None]) -> list[Stage]:
    """The stages of a round with `parts` in the place of those of their names; None leaves one out."""
    if round < 2:
        return stages(round)
    parts = {"search": Stage("search", (), ("evaluate",), train=lambda ctx: {}), **parts}
    return [stage for ordinary in stages(round) if (stage := parts.get(ordinary.name, ordinary))]


def keep_plan(ctx: Context) -> dict:
    first, made = ctx.figures("calibrate", 1), {}
    for kind in ("serve", "harvest"):
        plan = Plan.from_dict({**first[kind], "models": plan_models(ctx)})
        made[kind] = plan.to_dict()
    return made


def first_plan(round: int) -> list[Stage]:
    return changed(
        round,
        {
            "calibrate": Stage(
                "calibrate",
                (),
                ("calibrate@1", "train_prm", "choose_reviser", "gate@-1?", "distill@-1?"),
                train=keep_plan,
            )
        },
    )


def keep_prm(ctx: Context) -> dict:
    if ctx.rank == 0:
        shutil.copytree(ctx.path("train_prm", 1) / "adapter", ctx.dir / "adapter", dirs_exist_ok=True)
    return {**ctx.figures("train_prm", 1), "model": f"prm_{ctx.round}"}


def first_prm(round: int) -> list[Stage]:
    return changed(round, {"label": None, "train_prm": Stage("train_prm", (), ("train_prm@1",), train=keep_prm)})


ABLATIONS = ("first_plan", "first_prm")


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in ABLATIONS:
        print(
            f"python -m eval.ablate: {' or '.join(ABLATIONS)} wanted first, then the arguments of flywheel.iterate",
            file=sys.stderr,
        )
        return 2
    return iterate.main(argv[1:], stages=f"eval.ablate:{argv[0]}")


if __name__ == "__main__":
    sys.exit(main())
