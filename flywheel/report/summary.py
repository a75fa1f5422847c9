"""The figures of a run as one dict, from which tables, W&B and the model card are made."""

from __future__ import annotations

from collections import Counter

from flywheel.ledger import total
from flywheel.runs.files import plain
from flywheel.runs.run import Run

LONG = ("curve", "checkpoints")  # figures too long for a summary
PARTS = {
    "sample": ("sample",),
    "label": ("label",),
    "prm": ("train_prm",),
    "reviser": ("train_reviser", "choose_reviser"),
    "head": ("train_head",),
    "harvest": ("harvest",),
    "distill": ("distill",),
}


def summary(run: Run) -> dict:
    """The run as a JSON-serialisable dict (what `flywheel summary --json` prints).

    `base_shown`: worked examples that the base sees with a question, at most; later policies see none. `rounds`: the
    finished rounds (see `_round`). `unfinished`: the finished stages of an unfinished round. Token counts
    include tokens that the prefix cache served. `seconds`: wall time by stage over all rounds; `wall_seconds`: its sum.
    """
    manifests, done = run.manifests, run.rounds
    seconds: Counter[str] = Counter()
    for (_, stage), manifest in manifests.items():
        seconds[stage] += manifest["seconds"]
    roles, stages, purposes = (
        {name: spent for (name,), spent in total(run.ledger_rows, by)} for by in ("role", "stage", "purpose")
    )
    result = {
        "recipe": run.recipe.name,
        "base_shown": max(Counter(e.level for e in run.recipe.prompts.examples).values(), default=0),
        "finished_rounds": max(done, default=0),
        "rounds": [_round(run, r) for r in done],
        "ledger": {
            "tokens": {"policy": 0, "prm": 0, "reviser": 0} | {role: spent.tokens for role, spent in roles.items()},
            "tokens_cached": {role: spent.cached for role, spent in roles.items()},
            "tokens_by_stage": {stage: spent.tokens for stage, spent in stages.items()},
            "tokens_by_purpose": {purpose: spent.tokens for purpose, spent in purposes.items()},
            "flops": sum(row["flops"] for row in run.ledger_rows),
            "flops_by_role": {role: spent.flops for role, spent in roles.items()},
            "seconds": dict(seconds),
        },
        "wall_seconds": seconds.total(),
    }
    under_way: dict[int, list[str]] = {}
    for r, stage in manifests:
        if r not in done:
            under_way.setdefault(r, []).append(stage)
    if under_way:
        result["unfinished"] = [{"round": r, "finished_stages": found} for r, found in under_way.items()]
    return plain(result)


def untested(run: Run, r: int) -> dict:
    """What round r shows without test questions: its parts, its gate, and `serve`, the held-out figures of its plan."""
    return plain({**_round(run, r), "serve": run.figures("calibrate", r).get("two_fold", [])})


def _round(run: Run, r: int) -> dict:
    """One finished round: the figures of `evaluate` and `search`, one key per part in `PARTS`, and the gate.

    A part without figures has no key. The reviser's figures on test questions are under its key `test`.
    """
    tested = run.figures("evaluate", r) | run.figures("search", r)
    on_test = tested.pop("reviser", None)
    out = {"round": r, **tested}
    for part, stages in PARTS.items():
        figures = {key: v for stage in stages for key, v in run.figures(stage, r).items() if key not in LONG}
        if figures:
            out[part] = figures
    if on_test:
        reviser = out.setdefault("reviser", {})
        reviser |= {"test": on_test, "pass@1_by_attempt": on_test["pass@1_by_attempt"]}
    elif chosen := out.get("reviser", {}).get("chosen"):
        out["reviser"]["pass@1_by_attempt"] = chosen["pass@1_by_attempt"]
    if gate := run.figures("gate", r):
        trained = run.figures("distill", r)["trained"]
        out["gate"] = ("passed" if gate["passed"] else "refused") if trained else "nothing to distill"
        out["gate_figures"] = gate
    return out
