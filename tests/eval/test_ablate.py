"""The ablations of claim 15 change what they say, from round 2 on, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from eval.studies import ablate
from flywheel.records import ModelRef
from flywheel.runs.stage import schedule
from flywheel.search.best_of_n import BestOfN
from flywheel.search.plan import Entry, Plan
from flywheel.stages import stages


def by_name(made) -> dict:
    return {stage.name: stage for stage in made}


@pytest.mark.parametrize(
    "ablation, other, gone", [("first_plan", {"calibrate"}, set()), ("first_prm", {"train_prm"}, {"label"})]
)
def test_only_the_part_that_is_named_differs_and_only_after_round_1(ablation, other, gone):
    made = getattr(ablate, ablation)
    assert made(0) == stages(0) and made(1) == stages(1)
    ordinary, ours = by_name(stages(3)), by_name(made(3))
    assert ordinary.keys() - ours.keys() == gone
    assert {name for name, stage in ours.items() if stage != ordinary[name]} == other | {"search"}
    reads = {scheduled.at: scheduled.reads for scheduled in schedule(made, 3)}
    assert (3, "train_prm") in reads[3, "calibrate"]
    for name in other:
        assert reads[3, name], f"{name} reads nothing, so a change elsewhere would not be seen"


def test_the_first_plan_is_used_with_the_models_of_the_day(tmp_path):
    plans = {
        kind: Plan(kind, {"policy": "policy_0", "prm": "prm_1"}, (Entry(1, 4, BestOfN(4), 10, 0.5, 80.0),)).to_dict()
        for kind in ("serve", "harvest")
    }
    figures = {("calibrate", 1): plans, ("choose_reviser", None): {"chosen": None}}
    ctx = SimpleNamespace(
        round=3,
        rank=0,
        dir=tmp_path,
        figures=lambda stage, round=None: figures[stage, round],
        model=lambda role, round: ModelRef(f"{role}_{round}", "base"),
    )
    made = ablate.keep_plan(ctx)
    assert made["harvest"]["models"] == {"policy": "policy_2", "prm": "prm_3"}
    assert made["harvest"]["entries"] == plans["harvest"]["entries"]
    Plan.from_dict(made["serve"]).check_models({"policy": "policy_2", "prm": "prm_3"})


def test_an_ablation_is_handed_to_the_loop_with_its_arguments(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ablate.iterate, "main", lambda argv, stages: asked.append((argv, stages)) or 3)
    with pytest.raises(SystemExit, match="3"):
        ablate.measure(SimpleNamespace(ablation="first_prm", iterate=["--fork", "old", "--name", "new"]))
    assert asked == [(["--fork", "old", "--name", "new"], "eval.studies.ablate:first_prm")]
