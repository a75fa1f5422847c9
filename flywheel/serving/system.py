"""What a run serves after a round: policy, PRM, reviser, and a serve plan if one was made for exactly these models.

The plan of a round is made before its distillation, so it fits the served models only where the gate refused the new
policy. `calibrate` makes one for the new policy: the recipe's strategies on the calibration questions, binned by the
samples that the gate drew of that policy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flywheel.errors import UserError
from flywheel.measure.bins import quantile_bins
from flywheel.records import Grade, ModelRef, Role, SampleScores, Split
from flywheel.runs.files import read_json, write_json
from flywheel.runs.run import Context, Run, records
from flywheel.runs.stage import Input, Stage
from flywheel.runs.worker import fill
from flywheel.search.plan import Plan, Trial, serve_plan
from flywheel.stages.calibrate import probe_edges, try_all
from flywheel.stages.kit import Kit, kit
from flywheel.stages.shared import ids, model_names, pass_rates

FIGURES = "figures.json"


@dataclass(frozen=True)
class System:
    """`models` by role; `plan`: None if there is none for them; `edges`: of the mean score of a probe."""

    run: Run
    round: int
    models: dict[Role, ModelRef]
    plan: Plan | None = None
    edges: list[float] = field(default_factory=list)


def system(run: Run, round: int | None = None) -> System:
    """The system after `round`, by default the last whose gate is finished. Raises UserError."""
    done = [r for r, stage in run.manifests if stage == "gate"]
    if not done:
        raise UserError(f"{run.root}: no round has trained a policy yet; flywheel iterate goes on with it")
    chosen = max(done) if round is None else round
    if chosen not in done:
        finished = ", ".join(map(str, sorted(done)))
        raise UserError(f"{run.root}: round {chosen} has trained no policy; finished: {finished}")
    models = {role: run.model(role, chosen) for role in (Role.POLICY, Role.PRM)}
    if run.figures("choose_reviser", chosen).get("chosen"):
        models[Role.REVISER] = run.model(Role.REVISER, chosen)
    for figures in (read_json(folder(run, chosen) / FIGURES) or {}, run.figures("calibrate", chosen)):
        if figures and (plan := Plan.from_dict(figures["serve"])).models == model_names(models):
            return System(run, chosen, models, plan, figures["probe_edges"])
    return System(run, chosen, models)


def folder(run: Run, round: int) -> Path:
    return run.root / "serving" / f"round_{round}"


def calibrate(run: Run, round: int | None = None) -> System:
    """Make the plan for the system after `round` if it has none. A killed calibration goes on where it stopped."""
    served = system(run, round)
    if served.plan:
        return served
    round = served.round

    def bins(ctx: Context) -> dict[str, int]:
        return quantile_bins(pass_rates(ctx.read(Grade, "gate")), ctx.recipe.calibrate.bins)

    def work(ctx: Context, kit: Kit, questions: Sequence[str]) -> Iterator[object]:
        searcher, found = kit.searcher(reviser=Role.REVISER in served.models), bins(ctx)
        known = {q: Counter() for q in questions}  # for the harvest alone
        return try_all(kit, searcher, {q: found[q] for q in questions}, known, f"r{round}/serving")

    stage = Stage(
        "serving",
        None,
        (Input("gate"),),
        items=lambda ctx: ids(ctx, Split.CALIBRATE),
        open=lambda ctx: kit(ctx, served.models, Split.CALIBRATE),
        work=work,
    )
    ctx = Context(run.recipe, run.root, round, stage)
    ctx.dir = folder(run, round)
    ctx.dir.mkdir(parents=True, exist_ok=True)
    fill(ctx)
    trials, names = list(records(ctx.dir, Trial)), model_names(served.models)
    plan, two_fold = serve_plan(trials, names, run.recipe.calibrate.bins, seed=ctx.seed("folds") % 2**31)
    edges = probe_edges(run.recipe, records(ctx.dir, SampleScores))
    write_json(ctx.dir / FIGURES, {"serve": plan.to_dict(), "two_fold": two_fold, "probe_edges": edges})
    return system(run, round)
