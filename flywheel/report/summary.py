"""The figures of a run as data: what tables, pictures, W&B and the exported card are made of."""

from __future__ import annotations

from flywheel.ledger import total
from flywheel.runs.files import plain
from flywheel.runs.run import Run

LONG = ("curve", "checkpoints")  # figures that belong in a picture, not in a summary


def summary(run: Run) -> dict:
    """The run in one JSON-able dict (what `flywheel summary --json` prints).

    `rounds` holds the finished rounds; a round under way is named in `unfinished`. Tokens are
    nominal. `seconds` are wall time by stage over all rounds, `wall_seconds` their sum.
    """
    manifests = run.manifests
    seconds: dict[str, float] = {}
    for (_, stage), manifest in manifests.items():
        seconds[stage] = seconds.get(stage, 0.0) + float(manifest.get("seconds", 0.0))
    done = run.rounds
    result: dict = {
        "recipe": run.recipe.name,
        "finished_rounds": max(done, default=0),
        "rounds": [_round(run, r) for r in done],
        "ledger": {
            "tokens": {"policy": 0, "prm": 0, "reviser": 0}
            | {key: s.tokens for (key,), s in total(run.ledger_rows, "role")},
            "tokens_cached": {key: s.cached for (key,), s in total(run.ledger_rows, "role")},
            "tokens_by_stage": {key: s.tokens for (key,), s in total(run.ledger_rows, "stage")},
            "tokens_by_purpose": {key: s.tokens for (key,), s in total(run.ledger_rows, "purpose")},
            "flops": sum(row["flops"] for row in run.ledger_rows),
            "flops_by_role": {key: s.flops for (key,), s in total(run.ledger_rows, "role")},
            "seconds": seconds,
        },
        "wall_seconds": sum(seconds.values()),
    }
    under_way = {r: [s for at, s in manifests if at == r] for r, _ in manifests if r not in done}
    if under_way:
        result["unfinished"] = [{"round": r, "finished_stages": stages} for r, stages in under_way.items()]
    return plain(result)


def _round(run: Run, r: int) -> dict:
    """One finished round: `evaluate`'s figures, then one key a stage; absent where there is nothing."""
    evaluated, searched = run.figures("evaluate", r), run.figures("search", r)
    tested = {**evaluated, **(searched if "search" in searched else {"search": searched} if searched else {})}
    out = {"round": r, **{k: v for k, v in tested.items() if k not in ("prm", "reviser")}}
    for key, stages in {
        "sample": ["sample"],
        "label": ["label"],
        "prm": ["train_prm"],
        "reviser": ["train_reviser", "choose_reviser"],
        "harvest": ["harvest"],
        "distill": ["distill"],
    }.items():
        figures = {k: v for stage in stages for k, v in run.figures(stage, r).items() if k not in LONG}
        if tested.get(key):  # measured on test questions: kept apart from what training's own questions gave
            figures["test"] = tested[key]
        if figures:
            out[key] = figures
    if reviser := out.get("reviser"):
        for source in (reviser.get("test"), reviser.get("chosen")):  # the first of these that has a curve
            if "pass@1_by_attempt" in (source or {}):
                reviser.setdefault("pass@1_by_attempt", source["pass@1_by_attempt"])
    if r > 0:
        gate, distilled = run.figures("gate", r), run.figures("distill", r)
        if distilled.get("trained") is False:
            out["gate"] = "nothing to distill"
        elif "passed" in gate:
            out["gate"] = "passed" if gate["passed"] else "refused"
        if gate:
            out["gate_figures"] = gate
    return out
