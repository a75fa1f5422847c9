"""A real round in micro size: the seed model, vLLM, TRL, the whole way from sampling to the report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import micro

ROOT = Path(__file__).parents[2]
SMALL = [
    "problems.limits={train: 16, calibrate: 10, validation: 4, test: 8}",
    "sample={per_question: 8, calibrate: 8, max_tokens: 96}",
    "label={questions: 8, solutions: 2, rollouts: 2, validation: 0.25}",
    "prm.min_examples=1",
    "prm.epochs=1",
    "prm.evals=1",
    "reviser={samples: 8, trajectories: 4, epochs: 6, batch_size: 8, micro_batch_size: 8, evals: 1}",
    "reviser.probe_questions=4",
    "reviser.probe_attempts=2",
    "reviser.min_examples=1",
    "calibrate.budgets=[4]",
    "harvest={budget: 4, keep: 2}",
    "distill.epochs=1",
    "distill.evals=1",
    "evaluate={samples: 8, budget: 4, probe: 2, revise_attempts: 2, bootstrap: 200}",
    "engine.chunk=8",
    "track.mode=disabled",
]


def iterate(
    runs: Path, *more: str, launcher: tuple[str, ...] = ("-m",), module: str = "flywheel.iterate"
) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, module, "--runs", str(runs), "--name", "micro", "--round", "1"]
    for item in SMALL:
        command += ["--set", item]
    return subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=500)


def rival(runs: Path) -> tuple[str, str]:
    """The option that names a published PRM: the seed model with a random value head."""
    folder = runs.parent / "published"
    if not folder.is_dir():
        micro.with_value_head(ROOT / "data/chain/seed_model", folder)
    return "--set", f"prm.published={{model: {folder}, format: skywork}}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    done = iterate(runs, *rival(runs))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return runs / "micro", done.stdout


def manifest(run: Path, round: int, stage: str) -> dict:
    return json.loads((run / f"round_{round}" / stage / "manifest.json").read_text())


def test_every_stage_of_a_real_round_leaves_its_manifest_and_figures(finished):
    from flywheel.stages import ORDER

    run, printed = finished
    for stage in ORDER:
        assert manifest(run, 1, stage)["figures"], stage
    assert "round 1: the policy, on test questions" in printed
    lines = {tuple(line.split()[:3]): line for line in printed.splitlines() if " s  " in line}
    for stage in set(ORDER) - {"train_prm", "train_reviser", "train_head", "distill"}:
        assert " graded: " in lines["round", "1", stage] and " correct" in lines["round", "1", stage], stage
    assert {p.name for p in (run / "pictures").glob("*.png")} >= {"pass_by_bin.png", "policy.png", "tokens.png"}


def test_the_summary_has_every_figure_that_it_promises(finished):
    run, _ = finished
    done = subprocess.run(
        [sys.executable, "-m", "flywheel.summary", str(run), "--json"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["finished_rounds"] == 1 and [r["round"] for r in data["rounds"]] == [0, 1]
    first = data["rounds"][1]
    assert {
        "policy",
        "fixed_bins",
        "migration",
        "migration_null",
        "search",
        "prm",
        "reviser",
        "harvest",
        "gate",
    } <= first.keys()
    assert {"pass@1", "greedy@1"} <= first["policy"].keys() and "greedy_from_round_0" in first["gain"]
    assert {
        "greedy@1",
        "majority@8",
        "best_of_n_weighted@8",
        "beam@4",
        "adaptive@4",
        "compute_optimal@4_oracle",
        "compute_optimal@4_probe",
    } <= first["search"].keys()
    assert sum(map(sum, first["migration"])) == sum(map(sum, first["migration_null"])) == 8
    assert set(data["ledger"]["tokens"]) == {"policy", "prm", "reviser", "head"} and data["ledger"]["flops"] > 0


def test_a_published_prm_is_a_rival_on_calibration_and_on_test_questions(finished):
    run, _ = finished
    found = manifest(run, 1, "search")["figures"]["search"]
    ours, theirs = (found[f"best_of_n_weighted@4{end}"] for end in ("", "_published_verifier"))
    assert 0 <= theirs <= 1 and found["best_of_n_weighted@4_published_verifier_tokens"] > 0
    [row] = manifest(run, 1, "calibrate")["figures"]["verifiers"]
    assert row["budget"] == 4 and row["published_less_own"][0] == pytest.approx(row["published"][0] - row["own"][0])
    assert ours != theirs or row["own"] != row["published"]  # a random head judges otherwise


def test_the_ledger_of_the_run_is_the_sum_of_its_stages(finished):
    """The summary's tokens are those of the manifests, and a stage's are those of its shards' rows."""
    from flywheel.ledger import total
    from flywheel.runs.files import read_rows
    from flywheel.runs.run import Run

    run, _ = finished
    rows = [row for path in run.rglob("ledger*.parquet") for row in read_rows(path)]
    by_stage = {key: spent.tokens for key, spent in total(rows, "round", "stage")}
    for path in run.glob("round_*/*/manifest.json"):
        found = json.loads(path.read_text())
        assert found["tokens"] == by_stage.get((str(found["round"]), found["stage"]), 0), path
    assert sum(by_stage.values()) == sum(spent.tokens for _, spent in total(Run(run).ledger_rows, "role"))


def test_test_questions_enter_no_stage_but_those_that_measure(finished):
    """Not one record of a training or harvesting stage names a test question."""
    run, _ = finished
    for stage in ("sample", "label", "calibrate", "harvest", "gate", "choose_reviser"):
        for shard in (run / "round_1" / stage / "shards").glob("[0-9]*"):
            items = json.loads((shard / "shard.json").read_text())["items"]
            assert items and not any("test-" in item for item in items)
    assert all(
        "test-" in i
        for s in (run / "round_1/evaluate/shards").glob("[0-9]*")
        for i in json.loads((s / "shard.json").read_text())["items"]
    )


def test_a_finished_run_says_that_there_is_nothing_to_do(finished):
    run, _ = finished
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*.parquet")}
    done = iterate(run.parent, *rival(run.parent))
    assert done.returncode == 0 and "nothing to do" in done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*.parquet")}


@pytest.mark.slow
def test_a_deleted_shard_alone_is_made_again_and_draws_the_same(finished):
    """A chunk is seeded by what it asks, so the harvest of a run that lost a shard is the same harvest."""
    import shutil

    run, _ = finished
    stage = run / "round_1" / "search"  # the last stage: nothing was made from it
    table = stage / "shards" / "00000" / "Answered.parquet"
    before = table.read_bytes()
    kept = stage.parent / "kept"
    shutil.copytree(stage, kept)
    try:
        (stage / "manifest.json").unlink()
        shutil.rmtree(stage / "shards" / "00000")
        assert iterate(run.parent, *rival(run.parent)).returncode == 0
        assert table.read_bytes() == before
    finally:
        shutil.rmtree(kept)


def test_the_studies_read_a_finished_run(finished):
    run, _ = finished
    loop = studied("seeds", run)
    assert [row["round"] for row in loop["rounds"]] == [0, 1] and loop["questions"] == 8
    low, high = loop["rounds"][1]["pass@1"]["ci"]
    assert low <= loop["rounds"][1]["pass@1"]["mean"] <= high
    same = studied("compare", run, run, "--without", "label", "train_prm")
    course, against = same["runs"][str(run)], same["first_less_others"][str(run)]
    assert [row["round"] for row in course] == [0, 1] and course[0]["flops"] == 0 < course[1]["flops"]
    assert course[1]["pass@1"][0] == pytest.approx(loop["rounds"][1]["pass@1"]["mean"])
    ends, [within] = against["last_rounds"], against["within_the_other_s_flops"]
    assert (
        ends["pass@1"] == [0, 0, 0] and ends["flops"][0] > ends["flops"][1]
    )  # the PRM's and its labels' are left out of the other's
    assert within["rounds"] == [0, 1]  # so the first run's round 1 had cost more than the other's
    verifiers = studied("verifiers", run)
    judges = {"base", "monte_carlo", "true_steps", "published"}
    assert {"majority@8", *(f"{judge}:product" for judge in judges)} <= verifiers["accuracy"].keys()
    [f1] = verifiers["step_f1"]
    assert f1.keys() == judges and all(0 <= value <= 1 for value in f1.values())
    search = manifest(run, 1, "search")["figures"]["search"]  # the same samples and the same PRM, by another path
    assert verifiers["accuracy"]["majority@8"][0] == pytest.approx(search["majority@8"])
    assert verifiers["accuracy"]["monte_carlo:product"][0] == pytest.approx(
        search["best_of_n_weighted@8"], abs=0.13
    )  # one question of eight


@pytest.mark.slow
def test_the_claims_are_measured_on_a_finished_run(finished, tmp_path):
    run, _ = finished
    sizes = ["--questions", "5", "--oracle", "8", "--judged", "4", "--pool", "8", "--budgets", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    early = subprocess.run(
        [sys.executable, "-m", "eval", "claims", str(run), *sizes],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert early.returncode == 1 and "python -m eval study" in early.stderr and not list(tmp_path.iterdir())
    for command in (["study", "--chunk", "2"], ["claims"]):
        done = subprocess.run(
            [sys.executable, "-m", "eval", *command, str(run), *sizes],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    claims = {c["id"]: c for c in json.loads((tmp_path / "eval/results/budgets_4/claims.json").read_text())}
    assert {"1.gross@4", "3.search@4", "9.weighted@4", "14.hardest"} <= claims.keys()
    verdicts = ("holds", "no difference", "undecided", "fails")
    assert all(c["low"] <= c["ours"] <= c["high"] and c["verdict"] in verdicts for c in claims.values())


@pytest.mark.slow
def test_verifiers_with_and_without_the_history_judge_the_same_chains(finished):
    run, _ = finished
    found = studied("history_verifier", run, "--attempts", "2")
    assert (
        found["questions"] == 8
        and {"majority", "prm:product", "prm+history:product", "own:last", "own+history:last"}
        <= found["accuracy"].keys()
    )
    assert studied("history_verifier", run, "--attempts", "2") == found  # chains and adapters are kept


@pytest.mark.slow
def test_a_prm_trained_on_the_same_labels_twice_is_no_better_than_itself(finished):
    run, _ = finished
    found = studied("foreign_prm", run, run, "--other", run)
    assert found["questions"] == 8 and found["own_less_other"]["weighted"].keys() == {"1", "2", "4", "8"}
    assert all(gain == [0, 0, 0] for how in ("weighted", "best") for gain in found["own_less_other"][how].values())
    assert found["command"].startswith("python -m eval foreign_prm ")


@pytest.mark.slow
def test_revisers_of_both_kinds_of_data_play_the_same_questions(finished):
    run, _ = finished
    found = studied("on_policy_reviser", run, "--attempts", "5")
    curves = found["pass@1_by_attempt"]
    assert (
        found["questions"] == 8 and found["trajectories"][0] >= 2 and {len(curve) for curve in curves.values()} == {5}
    )
    slopes = {name: curve[4] - curve[0] for name, curve in curves.items()}
    assert {name: slope[0] for name, slope in found["slope"].items()} == pytest.approx(slopes)
    assert found["on_less_off_policy"]["slope"][0] == pytest.approx(slopes["on_policy"] - slopes["off_policy"])


def studied(study: str, *arguments: str | Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "eval", study, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_export_loads_as_peft_and_transformers_load_things(finished, tmp_path):
    run, _ = finished
    out = tmp_path / "exported"
    done = subprocess.run(
        [sys.executable, "-m", "flywheel.export", str(run), "--out", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(ROOT / "data/chain/seed_model")
    adapters = sorted(p.parent for p in out.rglob("adapter_config.json"))
    assert len(adapters) >= 2
    for adapter in adapters:
        PeftModel.from_pretrained(base, adapter)
    assert AutoTokenizer.from_pretrained(next(out.rglob("tokenizer.json")).parent).encode("Q 5 +3 ?")


def flywheel(*argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "flywheel", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


def test_a_file_of_questions_is_answered_graded_billed_and_not_asked_again(finished, tmp_path):
    run, _ = finished
    rows = [json.loads(line) for line in (ROOT / "data/chain/problems/test.jsonl").read_text().splitlines()[:6]]
    asked, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    asked.write_text("".join(json.dumps({k: r[k] for k in ("id", "question", "answer")}) + "\n" for r in rows))
    command = ("solve", str(run), "--problems", str(asked), "--out", str(out), "--calibrate", "--tokens", "900")
    done = flywheel(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["id"] for row in found} == {row["id"] for row in rows}
    assert {row["guide"] for row in found} <= {"head", "probe", "plan"}
    for row in found:
        assert 0 < row["tokens"] == row["prompt"] + row["generated"] + row["scored"] <= 900
        assert 0 <= row["share"] <= 1 and isinstance(row["right"], bool)
        assert (row["bin"] in range(1, 6)) == (row["guide"] in ("head", "probe"))
    total, right = sum(row["tokens"] for row in found), sum(row["right"] for row in found)
    assert f"6 answered, {total:,} tokens, {right} of 6 right" in done.stderr
    out.write_text("".join(line + "\n" for line in out.read_text().splitlines()[:4]) + '{"id"')
    again = flywheel(*command)
    assert again.returncode == 0 and again.stderr.splitlines()[-1].startswith("2 answered")
    assert len(out.read_text().splitlines()) == 6
    assert "nothing to do" in flywheel(*command).stderr


@pytest.mark.slow
def test_an_export_answers_as_its_run_does(finished, tmp_path):
    run, _ = finished
    rows = [json.loads(line) for line in (ROOT / "data/chain/problems/test.jsonl").read_text().splitlines()[:6]]
    asked, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    asked.write_text("".join(json.dumps({k: r[k] for k in ("id", "question", "answer")}) + "\n" for r in rows))
    done = flywheel("solve", str(run), "--problems", str(asked), "--out", str(out), "--calibrate", "--tokens", "900")
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in out.read_text().splitlines()]
    exported, theirs = tmp_path / "exported", tmp_path / "theirs.jsonl"
    assert flywheel("export", str(run), "--out", str(exported)).returncode == 0
    done = flywheel("solve", str(exported), "--problems", str(asked), "--out", str(theirs), "--tokens", "900")
    assert done.returncode == 0, done.stderr[-3000:]
    alike = [json.loads(line) for line in theirs.read_text().splitlines()]
    kept = ("id", "answer", "strategy", "guide", "bin", "tokens", "share")
    assert sorted([row[k] for k in kept] for row in alike) == sorted([row[k] for k in kept] for row in found)
    unread = flywheel("solve", str(run), "--question", "two and two")
    assert unread.returncode == 1 and "tokenizer cannot write" in json.loads(unread.stdout.splitlines()[-1])["error"]


@pytest.mark.slow
def test_a_published_prm_can_judge_new_questions(finished):
    run, _ = finished
    row = json.loads((ROOT / "data/chain/problems/test.jsonl").read_text().splitlines()[0])
    command = ("solve", str(run), "--question", row["question"], "--strategy", "best_of_n:3", "--show")
    own, published = (flywheel(*command, "--verifier", verifier) for verifier in ("own", "published"))
    assert own.returncode == published.returncode == 0, published.stderr
    ours, theirs = (json.loads(done.stdout.splitlines()[-1])["candidates"] for done in (own, published))
    assert [len(c["values"]) for c in ours] == [len(c["values"]) for c in theirs] and any(c["values"] for c in theirs)
    assert [c["values"] for c in ours] != [c["values"] for c in theirs]


def test_a_server_answers_openai_s_client_and_ends_when_its_request_has(finished):
    import signal
    import threading
    import time

    import httpx
    import openai

    run, _ = finished
    command = [sys.executable, "-m", "flywheel", "serve", str(run), "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in server.stdout if line.startswith("chain-1 at "))
        port = line.split("/v1")[0].rpartition(":")[2]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60)
        [model] = client.models.list()
        taken = flywheel("serve", str(run), "--port", port)
        assert taken.returncode == 1 and f"--port {port}: " in taken.stderr and "in use" in taken.stderr
        question = {"model": model.id, "messages": [{"role": "user", "content": "5 +3 *2 -6"}]}
        assert model.id == "chain-1"
        greedy = [client.chat.completions.create(**question, temperature=0) for _ in range(2)]
        assert greedy[0].choices[0].message.content == greedy[1].choices[0].message.content != ""
        assert greedy[0].usage.scored_tokens == 0 < greedy[0].usage.completion_tokens
        parts = list(client.chat.completions.create(**question, temperature=0, stream=True))
        told = [part.choices[0].delta.content for part in parts if part.choices[0].delta.content]
        assert "".join(told) == greedy[0].choices[0].message.content and len(told) > 2
        assert parts[-1].usage.total_tokens == greedy[0].usage.total_tokens
        answers = []
        slow = {"strategy": "best_of_n:64"}
        asking = threading.Thread(
            target=lambda: answers.append(client.chat.completions.create(**question, extra_body=slow))
        )
        asking.start()
        while not httpx.get(f"http://127.0.0.1:{port}/health").json()["under_way"] and not answers:
            time.sleep(0.005)
        server.send_signal(signal.SIGTERM)
        asking.join(timeout=100)
        assert answers[0].usage.total_tokens > 64 and server.wait(timeout=60) == 0
    finally:
        server.kill()


def test_the_page_shows_every_test_question_and_needs_nothing_from_outside(finished, tmp_path):
    run, _ = finished
    out = tmp_path / "page.html"
    done = flywheel("report", str(run), "--out", str(out))
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    rows = [json.loads(line) for line in (ROOT / "data/chain/problems/test.jsonl").read_text().splitlines()[:8]]
    assert all(f'data-text="test  {row["id"]} {row["question"]}"' in text for row in rows)
    assert text.count('<details class="question"') > 8 and "hsl(" in text  # training questions with step values, too
    assert "compute_optimal@4_probe" in text and 'src="data:image/png;base64,' in text and "http" not in text
    if browser := shutil.which("chromium"):
        for width in (360, 1440):
            assert fits(browser, text, width, tmp_path)


def fits(browser: str, html: str, width: int, folder: Path) -> bool:
    """Whether a page is no wider than the browser's window, and its search leaves one question of many."""
    probe = """<script>
      const box = document.getElementById("find");
      box.value = "test-0003"; box.dispatchEvent(new Event("input"));
      const left = document.querySelectorAll(".question:not([hidden])").length;
      document.title = [document.documentElement.scrollWidth <= window.innerWidth, left].join();
    </script>"""
    page = folder / f"page_{width}.html"
    page.write_text(html.replace("</body>", probe + "</body>"))
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --dump-dom"
    profile, size = f"--user-data-dir={folder / str(width)}", f"--window-size={width},900"
    command = [browser, *flags.split(), profile, size, page.as_uri()]
    return "<title>true,1</title>" in subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.slow
def test_a_round_without_a_correct_solution_ends_says_so_and_keeps_the_policy(tmp_path):
    rows = [
        json.loads(line)
        for split in ("train", "calibrate", "validation", "test")
        for line in (ROOT / f"data/chain/problems/{split}.jsonl").read_text().splitlines()[:20]
    ]
    unanswerable = tmp_path / "unanswerable.jsonl"
    unanswerable.write_text("".join(json.dumps({**row, "answer": "none of them"}) + "\n" for row in rows))
    done = iterate(tmp_path, "--problems", str(unanswerable), "--force")  # its try-out finds nothing right
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "nothing to distill, the policy stays" in done.stdout
    run = tmp_path / "micro"
    assert manifest(run, 1, "harvest")["figures"]["kept"] == 0
    assert manifest(run, 1, "gate")["figures"]["passed"] is False
    assert manifest(run, 1, "evaluate")["figures"]["policy"]["name"] == "policy_0"
    assert manifest(run, 1, "search")["figures"]["search"]["majority@8"] == 0


@pytest.mark.slow
def test_accelerate_launch_runs_the_same_loop_on_two_processes(tmp_path):
    """Two ranks share every stage of a real round, and train one model together."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "accelerate_configs/cpu_2.yaml",
        "-m",
        "flywheel.iterate",
    ]
    command += ["--runs", str(tmp_path), "--name", "micro", "--round", "1"]
    for item in SMALL:
        command += ["--set", item]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert manifest(tmp_path / "micro", 1, "search")["figures"]["search"]["majority@8"] >= 0
    assert manifest(tmp_path / "micro", 1, "distill")["ranks"] == 2


@pytest.mark.slow
def test_the_shrunken_qwen_turns_a_whole_round_on_gsm8k_like_questions(tmp_path):
    """BPE tokens, a chat template, boxed answers and `+`/`-` labels through every stage."""
    made = subprocess.run(
        [sys.executable, "-m", "data.shrunken", "--out", str(tmp_path / "qwen")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert made.returncode == 0, made.stderr
    command = [
        sys.executable,
        "-m",
        "flywheel.iterate",
        "--recipe",
        str(tmp_path / "qwen/recipe.yaml"),
        "--runs",
        str(tmp_path),
        "--round",
        "1",
    ]
    done = subprocess.run(
        [*command, "--set", "track.mode=disabled"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "shrunken"
    assert manifest(run, 1, "harvest")["figures"]["kept"] > 10
    assert manifest(run, 1, "distill")["figures"]["trained"] is True
