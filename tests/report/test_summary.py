import json
import shutil
import subprocess
import sys

import pytest
import yaml
from synthetic_run import BIN_SIZES, make_run

from flywheel.errors import UserError
from flywheel.report import summary
from flywheel.report.tables import made_by
from flywheel.runs.run import Run
from flywheel.summary import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "lab", rounds=3, refused=(2,))


def test_the_json_has_the_shape_that_was_agreed(run, capsys):
    assert main([str(run), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["recipe"] == "made_up" and data["finished_rounds"] == 3
    assert [item["round"] for item in data["rounds"]] == [0, 1, 2, 3]
    base, last = data["rounds"][0], data["rounds"][3]
    assert base["policy"]["name"] == "policy_0" and base["policy"]["pass@1"] == pytest.approx(0.3)
    assert base["policy"]["pass@1_ci"] == pytest.approx([0.27, 0.33])
    assert not {"search", "gate", "prm", "migration"} & set(base)
    assert [b["n"] for b in last["fixed_bins"]] == list(BIN_SIZES)
    assert len(last["migration"]) == len(last["migration_null"]) == 5
    assert {
        "majority@64",
        "best_of_n_weighted@64",
        "beam@16",
        "compute_optimal@16_oracle",
        "compute_optimal@16_probe",
    } <= set(last["search"])
    assert last["prm"]["auc_within_question"] == 0.9 and last["prm"]["auc_within_question_base"] == 0.7
    assert (
        last["reviser"]["pass@1_by_attempt"][:2] == [0.4, 0.44]
        and len(last["reviser"]["test"]["control_by_attempt"]) == 8
    )
    assert last["harvest"] == {"candidates": 9600, "kept": 20, "questions": 20, "step_verified": 0.97}
    assert [item.get("gate") for item in data["rounds"]] == [None, "passed", "refused", "passed"]


def test_every_figure_of_the_search_names_the_models_of_its_round(run):
    rounds = summary(Run(run))["rounds"]
    # round 2 was refused, so round 3 searches with policy_1
    assert rounds[3]["search"]["models"] == {
        "policy": "policy_1",
        "prm": "prm_3",
        "reviser": "reviser_3",
        "plan": "serve_3",
    }
    models = rounds[3]["search"]["models"]
    assert made_by("majority@64", models) == "policy_1"
    assert made_by("best_of_n_weighted@64", models) == "policy_1, prm_3"
    assert made_by("best_of_n_weighted@16_base_verifier", models) == "policy_1, base as verifier"
    assert made_by("revise@16", models) == "reviser_3, prm_3"
    assert made_by("compute_optimal@16_probe", models) == "policy_1, prm_3, reviser_3, serve_3"


def test_the_ledger_is_the_sum_of_all_shards_and_trainings(run):
    ledger = summary(Run(run))["ledger"]
    rows = Run(run).ledger_rows
    assert sum(ledger["tokens"].values()) == sum(
        r["prompt"] + r["generated"] + r["scored"] + r["trained"] for r in rows
    )
    # round 0 evaluates (2 shards of 21,000); rounds 1-3 run stages 0..11 with 2 x (1,000 + 20,000 (i + 1)),
    # four of which train
    search = 3 * 2 * (1000 + 20_000 * 12)
    assert ledger["tokens_by_stage"]["search"] == search
    assert ledger["tokens"]["prm"] == search + 3 * 50_000
    for source, copy in ((run / "round_1" / "sample", "round_1/sample.old"), (run / "round_1", "round_1.bak")):
        shutil.copytree(source, run / copy)
    assert Run(run).ledger_rows == rows
    for copy in ("round_1/sample.old", "round_1.bak"):
        shutil.rmtree(run / copy)
    assert ledger["seconds"]["evaluate"] == 40.0 and ledger["seconds"]["sample"] == 30.0
    assert summary(Run(run))["wall_seconds"] == (1 + 3 * 12) * 10.0
    assert ledger["flops"] == pytest.approx(sum(ledger["flops_by_role"].values()))


def test_a_figure_that_could_not_be_computed_is_null_not_nan(run):
    prm = summary(Run(run))["rounds"][1]["prm"]
    assert prm["auc_within_question_min"] is None


def test_what_a_manifest_lacks_is_left_out(tmp_path):
    run = make_run(tmp_path / "lab", rounds=1)
    path = run / "round_1" / "evaluate" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["figures"] = {"policy": {"name": "policy_1", "n": 200, "pass@1": 0.5}}
    path.write_text(json.dumps(manifest))
    path = run / "round_1" / "train_prm" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "figures": {}}))
    now = summary(Run(run))["rounds"][1]
    assert now["policy"] == {"name": "policy_1", "n": 200, "pass@1": 0.5}
    assert not {"migration", "fixed_bins", "gain", "prm"} & set(now)


def test_a_round_under_way_is_named_but_not_among_the_finished(tmp_path, capsys):
    run = make_run(tmp_path / "lab", rounds=2)
    (run / "round_2" / "search" / "manifest.json").unlink()
    data = summary(Run(run))
    assert data["finished_rounds"] == 1 and len(data["rounds"]) == 2
    assert data["unfinished"][0]["round"] == 2 and "harvest" in data["unfinished"][0]["finished_stages"]
    assert main([str(run)]) == 0
    assert "round 2 under way: sample, label" in capsys.readouterr().out


def test_nothing_distilled_is_said_so(tmp_path):
    run = make_run(tmp_path / "lab", rounds=1, refused=(1,))
    path = run / "round_1" / "distill" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["figures"] = {"trained": False, "examples": 0}
    path.write_text(json.dumps(manifest))
    assert summary(Run(run))["rounds"][1]["gate"] == "nothing to distill"


def test_the_text_fits_100_columns_and_holds_intervals_and_models(run, capsys):
    assert main([str(run)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for words in (
        "0.660 [0.630, 0.690]",
        "policy_1, prm_3, reviser_3, serve_3",
        "left fixed bin 5 since round 0: 36 of 40 (90%)",
        "refused",
        "30 truncated",
    ):
        assert words in " ".join(text.split()), words


def test_worked_examples_of_the_base_are_said_beside_its_figures(tmp_path, capsys):
    run = make_run(tmp_path / "lab", rounds=1)
    assert main([str(run)]) == 0 and "worked examples" not in capsys.readouterr().out
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    levels = ["sum", "sum", "product"]
    recipe["prompts"]["examples"] = [{"question": "1 + 1", "solution": "2", "level": level} for level in levels]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main([str(run)]) == 0
    said = "policy_0, the base, is shown 2 worked examples with a question; later policies none"
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["missing", "empty", "a_file"])
def test_a_path_that_is_no_run_gives_one_line_and_status_1(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").write_text("x")
    assert main([str(tmp_path / name)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "not a run" in err


def test_a_broken_manifest_is_named(tmp_path):
    run = make_run(tmp_path / "lab", rounds=0)
    path = run / "round_0" / "evaluate" / "manifest.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json"):
        summary(Run(run))


def test_the_summary_needs_no_heavy_library(run):
    heavy = {"torch", "vllm", "wandb", "matplotlib"}
    code = f"import sys; from flywheel.summary import main; main([{str(run)!r}]); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
