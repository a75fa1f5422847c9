"""What a run serves after a round: policy, PRM, reviser, and a serve plan if one was made for exactly these models.

The plan of a round is made before its distillation, so it fits the served models only where the gate refused the new
policy. `calibrate` makes one for the new policy: the recipe's strategies on the calibration questions, binned by the
samples that the gate drew of that policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from flywheel.errors import UserError
from flywheel.measure.bins import quantile_bins
from flywheel.records import ModelRef, Role, SampleScores, Split
from flywheel.runs.files import read_json, sha256, write_json
from flywheel.runs.manifest import MANIFEST
from flywheel.runs.reading import Written
from flywheel.runs.run import Context, Run
from flywheel.runs.shards import shard_dirs
from flywheel.runs.stage import Input, Stage
from flywheel.runs.worker import fill
from flywheel.search.plan import Plan, Trial, serve_plan
from flywheel.search.strategy import Strategy
from flywheel.stages.calibrate import probe_edges, try_all
from flywheel.stages.kit import Kit, kit, published_model
from flywheel.stages.shared import head_model, ids, model_names, pass_rates

FIGURES, ORIGIN = "figures.json", "made_from.json"
EXPORTED = "system.json"  # in an export


@dataclass(frozen=True)
class System:
    """`models` by role; `plan`: None if there is none for them; `edges`: of the mean score of a probe.

    `head`: the difficulty head by its role, or empty. It tells the bins of the round's samples, drawn before the policy
    was trained; as quantiles, they order questions for the new policy too.
    """

    run: Run
    round: int
    models: dict[Role, ModelRef]
    plan: Plan | None = None
    edges: list[float] = field(default_factory=list)
    head: dict[Role, ModelRef] = field(default_factory=dict)

    def check(self, strategy: Strategy | None) -> None:
        """Raises UserError if `strategy` needs a model that the round does not have."""
        if strategy and strategy.maker not in self.models:
            raise UserError(f"{strategy.name}: round {self.round} has no {strategy.maker}; name another --strategy")


def system(run: Run, round: int | None = None) -> System:
    """The system of a run after `round` (by default the last whose gate is finished) or of an export.

    Raises UserError.
    """
    if (run.root / EXPORTED).is_file():
        return exported(run, round)
    done = [r for r, stage in run.manifests if stage == "gate"]
    if not done:
        raise UserError(f"{run.root}: no round has trained a policy yet; flywheel iterate --round 1 does")
    chosen = max(done) if round is None else round
    if chosen not in done:
        finished = ", ".join(map(str, sorted(done)))
        raise UserError(f"{run.root}: round {chosen} has trained no policy; finished: {finished}")
    models = {role: run.model(role, chosen) for role in (Role.POLICY, Role.PRM)}
    if run.figures("choose_reviser", chosen).get("chosen"):
        models[Role.REVISER] = run.model(Role.REVISER, chosen)
    own = read_json(folder(run, chosen) / FIGURES) or {}
    if own and own["made_from"] != made_from(run, chosen):
        raise UserError(f"{folder(run, chosen)}: a plan for models that were made anew since; remove this folder")
    for figures in (own, run.figures("calibrate", chosen)):
        if "probe_edges" in figures and (plan := Plan.from_dict(figures["serve"])).models == model_names(models):
            return System(run, chosen, models, plan, figures["probe_edges"], head_model(run, chosen))
    return System(run, chosen, models)


def to_dict(served: System) -> dict:
    """What an export keeps of a system beside its adapters and its recipe."""
    return {
        "round": served.round,
        "models": model_names(models := {**served.models, **served.head}),
        "adapters": sorted(role for role, ref in models.items() if ref.adapter),
        "plan": served.plan.to_dict() if served.plan else None,
        "probe_edges": served.edges,
    }


def exported(run: Run, round: int | None) -> System:
    """The system of an export; `run` is its directory. Raises UserError."""
    kept = read_json(run.root / EXPORTED)
    if round not in (None, kept["round"]):
        raise UserError(f"{run.root}: an export of round {kept['round']} alone; --round {round} needs the run")
    models = {}
    for role, name in kept["models"].items():
        adapter = run.root / "adapters" / role if role in kept["adapters"] else None
        if adapter and not (adapter / "adapter_config.json").is_file():
            raise UserError(f"{adapter}: missing, and the export's {role} is this adapter on {run.recipe.model.base}")
        models[Role(role)] = ModelRef(name, run.recipe.model.base, adapter and str(adapter))
    head = {Role.HEAD: models.pop(Role.HEAD)} if Role.HEAD in models else {}
    plan = Plan.from_dict(kept["plan"]) if kept["plan"] else None
    return System(run, kept["round"], models, plan, kept["probe_edges"], head)


def by_published(served: System) -> System:
    """The system with the recipe's published PRM in place of the round's, which no plan fits. Raises UserError."""
    if not (rival := published_model(served.run)):
        raise UserError(f"{served.run.root}: its recipe names no prm.published")
    own = {role: ref for role, ref in served.models.items() if role != Role.PRM}
    return replace(served, models={**own, **rival}, plan=None, head={})


def made_from(run: Run, round: int) -> dict[str, str]:
    """sha256 of the manifests of the stages that made the round's models."""
    return {stage: sha256(run.path(stage, round) / MANIFEST) for stage in ("train_prm", "choose_reviser", "gate")}


def folder(run: Run, round: int) -> Path:
    return run.root / "serving" / f"round_{round}"


def calibrate(run: Run, round: int | None = None) -> System:
    """Make the plan for the system after `round` if it has none. A killed calibration goes on where it stopped."""
    served = system(run, round)
    if served.plan:
        return served
    if (run.root / EXPORTED).is_file():
        raise UserError(f"{run.root}: an export without a plan; flywheel solve RUN --calibrate, then export again")
    round = served.round

    found = cache(lambda: quantile_bins(pass_rates(ctx, "gate", round), ctx.recipe.calibrate.bins))

    async def work(ctx: Context, kit: Kit, questions: Sequence[str]) -> list[object]:
        known = {q: () for q in questions}  # for the harvest alone
        searcher = kit.searcher(reviser=Role.REVISER in served.models)
        return await try_all(kit, searcher, {q: found()[q] for q in questions}, known, f"r{round}/serving")

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
    origin = made_from(run, round)
    if shard_dirs(ctx.dir) and read_json(ctx.dir / ORIGIN) != origin:
        raise UserError(f"{ctx.dir}: begun with models that were made anew since; remove this folder")
    write_json(ctx.dir / ORIGIN, origin)
    fill(ctx)
    trials, names = list(Written(ctx.dir).records(Trial)), model_names(served.models)
    plan, two_fold = serve_plan(trials, names, run.recipe.calibrate.bins, seed=ctx.seed("folds") % 2**31)
    edges = probe_edges(run.recipe, Written(ctx.dir).records(SampleScores))
    figures = {"made_from": origin, "serve": plan.to_dict(), "two_fold": two_fold, "probe_edges": edges}
    write_json(ctx.dir / FIGURES, figures)
    return system(run, round)
