"""The entry point as a person and a launcher meet it: real processes, killed and resumed."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_stages
from toy import HERE, Project, finish, gone, wait_for

from flywheel.recipe import load
from flywheel.runs import cgroup, isolate
from flywheel.runs.processes import run_stage
from flywheel.runs.ranks import Launch, Ranks, free_port
from flywheel.runs.run import Context
from flywheel.runs.terminal import Progress


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path / "project")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Project:
    """A run at the end of round 2. Tests copy it."""
    return finish(tmp_path_factory)


@pytest.fixture
def copy(finished, tmp_path) -> Project:
    shutil.copytree(finished.root, tmp_path / "copy")
    copied = object.__new__(Project)
    copied.root, copied.runs, copied.log = tmp_path / "copy", tmp_path / "copy" / "runs", tmp_path / "copy" / "log"
    return copied


def one_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("flywheel: "), text
    return lines[0]


# ---- what a person sees ----


def test_help_answers_within_a_second():
    started = time.monotonic()
    out = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "flywheel.iterate", "--help"],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert time.monotonic() - started < 1 and out.returncode == 0 and "--dry-run" in out.stdout
    loaded = {line.rpartition("|")[2].strip() for line in out.stderr.splitlines()}
    assert "flywheel.runs.isolate" in loaded and not loaded & {"torch", "vllm", "pydantic", "pyarrow", "transformers"}


def test_a_run_reaches_the_end_of_its_round(finished):
    lines = finished.output.splitlines()
    assert any(line.startswith("round 1  sample ") and "220 tokens, solutions 20" in line for line in lines)
    assert [line for line in lines if line.startswith("report of")] == [f"report of round {r}" for r in (0, 1, 2)]
    assert lines[-1].endswith("is at the end of round 2")
    manifest = json.loads((finished.stage(1, "gate") / "manifest.json").read_text())
    assert manifest["figures"]["environment"] == {"RANK": None, "WANDB_MODE": "disabled", "DO_NOT_TRACK": "1"}
    assert not (finished.stage(1, "distill") / "trainer").exists()


def test_a_stage_that_shares_takes_over_the_processes_of_the_one_before(finished, project):
    """Only in the launch that made both, and with the same records."""
    pids = {stage: {pid for _, _, pid in finished.logged(f"{stage}:1")} for stage in ("sample", "label", "evaluate")}
    assert pids["sample"] == pids["label"] and not pids["sample"] & pids["evaluate"]
    broken = project.run("--round", "2", TOY_FAULT="label:train04:bug")
    assert broken.returncode == 1 and project.run("--round", "2").returncode == 0
    assert len({pid for _, _, pid in project.logged("label:1")}) == 2  # the first had made what came before train04
    assert project.tables() == finished.tables()


def test_a_finished_run_says_so_and_computes_nothing(copy):
    before = len(copy.log.read_text().splitlines())
    done = copy.run("--round", "2")
    assert done.returncode == 0 and "nothing to do" in done.stdout and "summary of toy at round 2" in done.stdout
    assert len(copy.log.read_text().splitlines()) == before


def test_a_finished_run_goes_on_to_a_later_round(copy):
    before = len(copy.logged("sample:"))
    done = copy.run("--round", "3")
    assert done.returncode == 0, done.stderr
    assert len(copy.logged("sample:3")) == 10 and len(copy.logged("sample:")) == before + 10


def test_without_its_test_a_run_reads_no_test_question_until_it_is_asked_to(project):
    done = project.run("--round", "2", "--no-test")
    assert done.returncode == 0, done.stderr
    assert project.logged("sample:2") and not project.logged("evaluate:")
    again = project.run("--round", "2", "--no-test")
    assert again.returncode == 0 and "nothing to do" in again.stdout
    before = len(project.logged("sample:"))
    whole = project.run("--round", "2")
    assert whole.returncode == 0, whole.stderr
    assert {line[0].split(":")[1] for line in project.logged("evaluate:")} == {"0", "1", "2"}
    assert len(project.logged("sample:")) == before


def test_a_dry_run_writes_nothing(project):
    done = project.run("--round", "1", "--dry-run")
    assert done.returncode == 0 and not project.runs.exists()
    assert "sample" in done.stdout and "to do: about" in done.stdout and "train 20" in done.stdout


def test_the_overview_counts_what_is_there(copy):
    shutil.rmtree(copy.stage(2, "evaluate"))
    shutil.rmtree(copy.stage(2, "gate"))
    done = copy.run("--round", "2", "--dry-run")
    states = {
        (line.split()[0], line.split()[1]): line for line in done.stdout.splitlines() if line[:5].strip().isdigit()
    }
    assert (
        " done " in states["2", "distill"] and " to do " in states["2", "gate"] and " to do " in states["2", "evaluate"]
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--set", "sampel.max_tokens=3"], "did you mean sample"),
        (["--set", "sample.max_tokens=many"], "sample.max_tokens"),
        (["--set", "model.base=no/such/model"], "model.base"),
        (["--problems", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--recipe", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["--name", "../up"], "--name"),
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(project, argv, message):
    done = project.run(*argv)
    assert done.returncode == 1 and message in one_line(done.stderr) and done.stdout == ""
    assert not project.runs.exists()


def test_a_new_run_is_rehearsed_once(project):
    """A fault leaves nothing behind, so the mended recipe starts under the same name; a dry run finds it too."""
    for argv in ((), ("--dry-run",)):
        failed = project.run("--round", "0", *argv, TOY_FAULT="rehearsal")
        assert failed.returncode == 1 and "prompts.answer" in one_line(failed.stderr)
        assert not project.runs.exists()
    forced = project.run("--round", "0", "--force", TOY_FAULT="rehearsal")
    assert forced.returncode == 0, forced.stderr
    shutil.rmtree(project.stage(0, "evaluate"))
    assert project.run("--round", "0", TOY_FAULT="rehearsal").returncode == 0
    assert [line[0] for line in project.logged("rehearsal:")] == ["rehearsal:False"] * 2 + ["rehearsal:True"]


def test_ones_own_questions(project):
    (project.root / "mine.jsonl").write_text(
        "".join(json.dumps({"question": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(60))
    )
    done = project.run("--round", "0", "--problems", "mine.jsonl", "--name", "mine")
    assert done.returncode == 0, done.stderr
    assert (project.runs / "mine" / "round_0" / "evaluate" / "manifest.json").exists()
    assert str(project.root / "mine.jsonl") in (project.runs / "mine" / "recipe.yaml").read_text()


# ---- what must not be continued ----


def test_a_changed_recipe_names_the_key(copy):
    done = copy.run("--round", "2", "--set", "sample.temperature=0.5")
    assert done.returncode == 1
    line = one_line(done.stderr)
    assert "sample.temperature = 1.0, now it is 0.5" in line and "--name" in line


def test_how_a_run_is_tracked_may_change(copy):
    assert copy.run("--round", "2", "--set", "track.project=other").returncode == 0


def test_changed_questions_are_noticed(copy):
    with open(copy.root / "questions.jsonl", "a") as file:
        file.write(json.dumps({"id": "new", "question": "new?", "answer": "1", "split": "train"}) + "\n")
    done = copy.run("--round", "2")
    assert done.returncode == 1 and "round_0/evaluate was made with problems.path = 'sha256 " in one_line(done.stderr)


def test_a_run_moves_with_its_files(copy):
    assert "nothing to do" in copy.run("--round", "2").stdout  # the copy lies elsewhere


def test_half_a_round_deleted_is_named_with_the_mend(copy):
    shutil.rmtree(copy.stage(1, "sample"))
    done = copy.run("--round", "2")
    line = one_line(done.stderr)
    assert done.returncode == 1 and "round_1/label was made from round_1/sample, which is not there" in line
    mend = line.partition("rm -r ")[2].split()
    assert str(copy.stage(1, "label")) in mend and str(copy.stage(2, "evaluate")) in mend
    for directory in mend:
        shutil.rmtree(directory)
    assert copy.run("--round", "2").returncode == 0


def test_a_deleted_leaf_is_made_again(copy):
    before = copy.tables()
    shutil.rmtree(copy.stage(2, "evaluate"))
    assert copy.run("--round", "2").returncode == 0
    assert copy.tables() == before


@pytest.mark.parametrize(
    "harm, message",
    [(lambda path: path.unlink(), "missing"), (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes")],
)
def test_a_damaged_shard_is_named(copy, harm, message):
    path = copy.shards()[3] / "Solution.parquet"
    harm(path)
    done = copy.run("--round", "2")
    line = one_line(done.stderr)
    assert done.returncode == 1 and str(path) in line and message in line and "to redo the stage" in line


def test_an_altered_input_is_found_before_a_stage_reads_it(copy):
    path = copy.shards(2, "sample")[3] / "Solution.parquet"
    for later in ("label", "distill", "gate", "evaluate"):
        shutil.rmtree(copy.stage(2, later))
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    done = copy.run("--round", "2")
    assert done.returncode == 1 and "sha256" in done.stderr and str(path) in done.stderr


# ---- killed, stopped, failed ----


def stamps(project: Project) -> dict[str, tuple[int, int]]:
    """Inode and time of every shard's files."""
    return {
        str(p): (p.stat().st_ino, p.stat().st_mtime_ns)
        for shard in project.run_dir.rglob("shards/[0-9]*")
        for p in [shard, *shard.iterdir()]
    }


@pytest.mark.parametrize("victim", ["child", "rank"])
def test_a_killed_run_resumes_to_the_same_bytes(project, finished, victim):
    """Killed again and again at random moments, it ends as one that was left alone, with no shard made twice."""
    rng = random.Random(victim)
    kept: dict[str, tuple[int, int]] = {}
    for _ in range(4):
        seen = len(project.log.read_text().splitlines()) if project.log.exists() else 0
        process = project.start("--round", "2", TOY_SLEEP=0.05)
        wait_for(
            lambda: (
                process.poll() is not None
                or (project.log.exists() and len(project.log.read_text().splitlines()) > seen + 2)
            )
        )
        time.sleep(rng.random() * 0.4)
        child = int(project.log.read_text().split()[-1])
        if process.poll() is None and victim == "rank":
            process.kill()
        elif process.poll() is None and not gone(child):
            os.kill(child, signal.SIGKILL)
        process.communicate(timeout=30)
        wait_for(lambda: gone(child))
        now = stamps(project)
        assert kept.items() <= now.items(), "a finished shard was touched"
        kept = now
    assert len(kept) > 10
    done = project.run("--round", "2")
    assert done.returncode == 0, done.stderr
    assert kept.items() <= stamps(project).items()
    assert project.tables() == finished.tables()
    assert not [p for p in project.run_dir.rglob("shards/.*")], "half shards are swept"


def test_a_child_killed_for_memory_is_one_line(project):
    done = project.run("--round", "1", TOY_FAULT="sample:train04:kill")
    line = one_line(done.stderr)
    assert (
        done.returncode == 1
        and "round_1/sample: its process was killed by SIGKILL (out of memory, most often)" in line
        and "the same command continues" in line
    )
    assert len(project.shards()) == 2


def test_a_users_fault_in_a_stage_is_its_line(project):
    done = project.run("--round", "1", TOY_FAULT="sample:train04:user")
    assert done.returncode == 1 and one_line(done.stderr) == "flywheel: round_1/sample: toy: this is what you did wrong"


def test_a_bug_in_a_stage_is_one_line_and_a_log(project):
    done = project.run("--round", "1", TOY_FAULT="sample:train04:bug")
    log = project.stage(1, "sample") / "rank_0.log"
    assert done.returncode == 1 and "KeyError: 'toy bug'" in one_line(done.stderr) and str(log) in done.stderr
    assert "Traceback" in log.read_text() and "toy_stages.py" in log.read_text()


def test_an_engine_that_dies_is_opened_again_once_and_its_chunk_is_the_same(project, finished):
    done = project.run("--round", "2", TOY_FAULT="sample:train04:engine once")
    assert done.returncode == 0, done.stderr
    tables = {name: data for name, data in finished.tables().items() if "ledger" not in name}
    assert {name: data for name, data in project.tables().items() if "ledger" not in name} == tables
    log = (project.stage(1, "sample") / "rank_0.log").read_text()
    assert "the toy engine died; opened again for 2 questions from train04" in log
    assert len(project.logged("tools:sample")) == 4  # once in each round, and again after each death
    spent = [name for name, data in project.tables().items() if "ledger" in name and data != finished.tables()[name]]
    assert spent == [], "the toy's engine dies before it has drawn anything of its chunk"


def test_an_engine_that_dies_again_fails_with_its_questions(project):
    done = project.run("--round", "1", TOY_FAULT="sample:train05:engine")
    line = one_line(done.stderr)
    assert done.returncode == 1 and "the toy engine died (twice, on questions train04 train05)" in line
    assert len(project.shards()) == 2 and project.run("--round", "1").returncode == 0


def test_a_bug_between_stages_ends_the_processes_that_the_first_has_left(project):
    """Else Python waits at its end for them, and they for it."""
    done = project.run("--round", "1", TOY_FAULT="bug_between")
    assert done.returncode == 1 and "flywheel: KeyError: 'no such key'" in done.stderr
    assert project.logged("tools:sample") and not project.logged("tools:label")


def test_a_failed_report_loses_nothing(project):
    done = project.run("--round", "0", TOY_FAULT="report")
    assert (
        done.returncode == 1
        and "no way to the tracker" in done.stderr
        and "report of round 0; the same command makes it again" in done.stderr
    )
    again = project.run("--round", "0")
    assert again.returncode == 0 and "report of round 0" in again.stdout and len(project.logged("evaluate:0")) == 3


def test_a_training_goes_on_where_it_was_killed(project):
    done = project.run("--round", "1", TOY_FAULT="distill:6:kill")
    assert done.returncode == 1 and len(list((project.stage(1, "distill") / "trainer").iterdir())) == 6
    started = time.monotonic()
    again = project.run("--round", "1", TOY_SLEEP=0.0)
    assert again.returncode == 0 and time.monotonic() - started < 20
    assert len(project.logged("distill:1")) == 2 and len(project.logged("sample:1")) == 10


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_within_seconds_and_says_how_to_go_on(project, number, code):
    process = project.start("--round", "1", TOY_SLEEP=600)  # seconds a chunk: its end is not waited for
    wait_for(lambda: project.logged("evaluate:0"))
    child = int(project.logged("evaluate:0")[-1][2])
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and gone(child)
    line = one_line(err)
    assert f"stopped by {number.name} in round_0/evaluate" in line and "run the same command again" in line


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_neither_child_nor_grandchild_outlives_the_rank(project, end):
    process = project.start("--round", "1", TOY_FAULT="sample:train02:orphan")
    wait_for(lambda: len(project.logged("sample:1")) >= 2)
    child = int(project.logged("sample:1")[-1][2])
    wait_for(lambda: grandchildren(child))
    family = [child, *grandchildren(child)]
    process.send_signal(end)
    process.wait(10)
    wait_for(lambda: all(map(gone, family)), 5)


def grandchildren(pid: int) -> list[int]:
    found = [Path(p).read_text() for p in Path("/proc").glob(f"{pid}/task/{pid}/children")]
    return [int(number) for text in found for number in text.split()]


def test_a_process_that_was_asked_to_end_and_cannot_ends_all_the_same():
    """As where a library waits for its own threads, downloads for example."""
    code = (
        "import time\nfrom flywheel.runs import loop\nloop.LAST = 0.5\n"
        "try:\n    with loop.signals():\n        print('ready', flush=True)\n        time.sleep(60)\n"
        "finally:\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE.parent
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 1 and "Timeout" in told and "line 9" in told


def test_an_orphan_of_the_launcher_stops(project):
    """accelerate's simple launcher dies of SIGTERM without telling the rank."""
    code = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
    rank = [
        str(HERE / "toy_run.py"),
        "--recipe",
        str(project.root / "toy.yaml"),
        "--runs",
        str(project.runs),
        "--round",
        "1",
    ]
    env = {
        **os.environ,
        "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
        "TOY_LOG": str(project.log),
        "TOY_SLEEP": "2",
        "ACCELERATE_MIXED_PRECISION": "no",
    }
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, *rank], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: len(project.logged("sample:1")) >= 1 or len(project.logged("evaluate:0")) >= 1)
    child, (pid,) = int(project.logged("evaluate:0")[0][2]), grandchildren(launcher.pid)
    launcher.terminate()
    launcher.wait(5)
    wait_for(lambda: gone(pid) and gone(child), 5)


def test_a_second_process_on_a_run_is_refused(project):
    first = project.start("--round", "1", TOY_SLEEP=0.5)
    wait_for(lambda: project.logged("evaluate:0"))
    second = project.run("--round", "1")
    line = one_line(second.stderr)
    assert second.returncode == 1 and f"in use by process {first.pid} on" in line
    first.kill()
    first.communicate()
    third = project.run("--round", "1")  # what a killed process held is free
    assert third.returncode == 0, third.stderr


def test_a_full_disk_is_one_line(project):
    """A file size limit of the kernel stands for the disk: the write fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, hard))
    try:
        process = project.start("--round", "0", TOY_LOG="")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "no room to write" in one_line(err)
    assert not [p for p in project.run_dir.rglob("*") if p.name.endswith(".tmp")]
    assert project.run("--round", "0").returncode == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_one_line(project):
    project.runs.mkdir(mode=0o500)
    done = project.run("--round", "0")
    assert done.returncode == 1 and "permission denied" in one_line(done.stderr)


def test_a_run_in_place_of_a_file_is_one_line(project):
    project.runs.mkdir()
    project.run_dir.write_text("a file")
    done = project.run("--round", "0")
    assert done.returncode == 1 and "not a directory" in one_line(done.stderr)


# ---- several ranks ----


def start_ranks(
    project: Project, *argv: str, world: int = 2, last: tuple[str, ...] = (), **env: object
) -> list[subprocess.Popen]:
    """last: further options of the last rank."""
    group = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "TOY_SILENCE": 15,
    }
    options = [*[argv] * (world - 1), (*argv, *last)]
    return [project.start(*options[r], RANK=r, LOCAL_RANK=r, TOY_RANK=r, **group, **env) for r in range(world)]


def test_two_ranks_share_the_chunks_and_make_what_one_makes(project, finished):
    ranks = start_ranks(project, "--round", "2", TOY_SLEEP=0.05)
    output = [process.communicate(timeout=180) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], output
    assert output[1] == ("", ""), "rank 0 alone prints"
    chunks = [line for line in project.logged("sample:1")]
    assert len(chunks) == 10 == len({what for what, _, _ in chunks}), "each chunk once"
    assert {rank for _, rank, _ in chunks} == {"0", "1"}
    same = {name: data for name, data in finished.tables().items()}
    assert {name: data for name, data in project.tables().items()} == same
    training = json.loads((project.stage(1, "distill") / "manifest.json").read_text())
    assert training["ranks"] == 2 and training["figures"]["rank"] == "0"
    other = json.loads((project.stage(2, "distill") / "manifest.json").read_text())
    assert training["figures"]["port"] not in (None, other["figures"]["port"]), "each training meets on its own port"
    assert len(project.logged("distill:1")) == 2


@pytest.mark.slow
def test_another_number_of_ranks_continues(project, finished):
    assert project.run("--round", "2", TOY_FAULT="sample:train08:kill").returncode == 1
    kept = stamps(project)
    ranks = start_ranks(project, "--round", "2", world=3)
    assert [process.communicate(timeout=180) and process.returncode for process in ranks] == [0, 0, 0]
    assert kept.items() <= stamps(project).items() and project.tables() == finished.tables()


def test_ranks_of_a_finished_run_all_end_at_once(copy):
    ranks = start_ranks(copy, "--round", "2")
    output = [process.communicate(timeout=180) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0] and "nothing to do" in output[0][0]


def test_a_rank_that_fails_stops_all_and_rank_0_says_why(project):
    ranks = start_ranks(project, "--round", "1", TOY_SLEEP=0.2)
    wait_for(lambda: project.logged("sample:1"))
    ranks[1].terminate()
    out, err = ranks[0].communicate(timeout=180)
    assert ranks[0].returncode == 1 and "rank 1: stopped by SIGTERM" in one_line(err)
    assert ranks[1].wait(30) == 143


def test_a_rank_with_another_recipe_stops_all_before_it_writes_anything(project):
    ranks = start_ranks(project, "--round", "1", last=("--set", "seed=1"))
    output = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1], output
    assert "start all ranks with the same options" in output[0][1] + output[1][1]


def test_a_launcher_of_several_ranks_says_which_are_on_this_host(project):
    done = project.run("--round", "0", RANK=0, WORLD_SIZE=2)
    assert done.returncode == 2 and "must set LOCAL_RANK, LOCAL_WORLD_SIZE too" in done.stderr


def test_the_other_ranks_stop_when_rank_0_is_gone(project):
    ranks = start_ranks(project, "--round", "1", TOY_SLEEP=1)
    wait_for(lambda: project.logged("evaluate:0"))
    ranks[0].kill()
    assert ranks[1].wait(30) == 1
    for process in ranks:
        process.communicate()


def test_the_others_stop_when_rank_0_is_killed_between_stages(project):
    """They hold processes for the next stage then, and their exception keeps all that they hold."""
    ranks = start_ranks(project, "--round", "1", TOY_FAULT="killed_between", TOY_SLEEP=0.2)
    assert [process.wait(60) for process in ranks] == [-signal.SIGKILL, 1]
    assert {rank for _, rank, _ in project.logged("tools:sample")} == {"0", "1"}
    for process in ranks:
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["sample:1", "distill:1"])
def test_rank_0_stops_when_another_rank_is_gone(project, finished, when):
    """No launcher is there to tell it, and a killed rank cannot."""
    ranks = start_ranks(project, "--round", "1", TOY_SLEEP=0.3)
    wait_for(lambda: any(rank == "1" for _, rank, _ in project.logged(when)))
    ranks[1].kill()
    out, err = ranks[0].communicate(timeout=180)
    assert ranks[0].returncode == 1 and "rank 1 is gone: no sign of life within 15 s; the same" in one_line(err)
    ranks[1].communicate()
    ranks = start_ranks(project, "--round", "2")
    assert [process.communicate(timeout=180) and process.returncode for process in ranks] == [0, 0]
    assert project.tables() == finished.tables()


@pytest.mark.slow
def test_a_rank_that_lags_behind_is_waited_for(project):
    ranks = start_ranks(project, "--round", "0", TOY_SLEEP=0.5)
    wait_for(lambda: any(rank == "1" for _, rank, _ in project.logged("evaluate:0")))
    ranks[1].send_signal(signal.SIGSTOP)
    try:
        time.sleep(5)
        assert ranks[0].poll() is None, "rank 0 went, and left rank 1 to believe it dead"
    finally:
        ranks[1].send_signal(signal.SIGCONT)
    assert [process.communicate(timeout=180) and process.returncode for process in ranks] == [0, 0]


def test_the_fork_server_ends_with_its_rank_while_it_still_imports(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)\n"
    )
    code = (
        "import time\nfrom flywheel.runs import isolate\n"
        "if __name__ == '__main__':\n    isolate.start_server(1, ('slow',))\n    time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{tmp_path}"}
    rank = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    rank.kill()
    rank.wait()
    wait_for(lambda: gone(int((tmp_path / "pid").read_text())), 5)


# ---- the environment of a stage ----


def test_a_child_uses_every_core_it_may():
    """accelerate exports OMP_NUM_THREADS=1; a stage must not believe it if the launcher was not told so."""
    code = (
        "import os; os.environ |= {'OMP_NUM_THREADS': '1', 'ACCELERATE_MIXED_PRECISION': 'no'}\n"
        "from flywheel.runs import isolate\n"
        "if __name__ == '__main__':\n"
        "    isolate.start_server(isolate.threads_for(1), ('torch',))\n"
        "    print(isolate.call('toy_threads:used', {'seconds': 1.0}, what='x', threads=isolate.threads_for(1)))\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    env.pop("OMP_NUM_THREADS", None)
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    command = [sys.executable, "-c", launcher, code]
    out = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    busy = json.loads(out.stdout)
    assert len(busy) == len(os.sched_getaffinity(0)), out.stderr
    assert min(busy) > 0.2 * max(busy), "one thread does it all"


def test_a_sampling_rank_sees_its_own_device(monkeypatch):
    from flywheel.runs.processes import environment
    from flywheel.runs.ranks import Ranks

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    ranks = Ranks(rank=1, world=2, local_rank=1, local_world=2, distributed=True)
    sampling, training = environment(ranks, False, 1234), environment(ranks, True, 1234)
    assert sampling["CUDA_VISIBLE_DEVICES"] == "6" and sampling["RANK"] is None and sampling["WORLD_SIZE"] is None
    assert (
        training["MASTER_PORT"] == "1234"
        and training["TORCHELASTIC_USE_AGENT_STORE"] is None
        and "RANK" not in training
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert environment(ranks, False, 1234)["CUDA_VISIBLE_DEVICES"] == "1"
    assert "MASTER_PORT" not in environment(Ranks(), True, 1234)


def test_each_rank_has_its_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert isolate.threads_for(1) == cores and isolate.threads_for(cores * 4) == 1


def test_threads_are_the_least_of_recipe_environment_quota_and_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for key in ("OMP_NUM_THREADS", isolate.THREADS):
        monkeypatch.delenv(key, raising=False)
    assert isolate.threads_for(1) == 8 and isolate.threads_for(1, wanted=3) == 3 and isolate.threads_for(4, 3) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert isolate.threads_for(1) == 2 and isolate.threads_for(1, wanted=3) == 3
    monkeypatch.setattr(isolate, "cpu_quota", lambda: 1.5)
    assert isolate.threads_for(1, wanted=3) == 1
    monkeypatch.setenv(isolate.THREADS, "5")  # a stage's process: what the rank gave it
    assert isolate.threads_for(1, wanted=3) == 5


def test_a_launcher_s_own_default_is_not_what_the_user_said(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert isolate.omp_threads() == 1
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(os, "getppid", os.getpid)  # whose environment can always be read
    said = dict(item.split("=", 1) for item in Path("/proc/self/environ").read_text().split("\0") if "=" in item)
    assert isolate.omp_threads() == int(said.get("OMP_NUM_THREADS", 0))


def test_the_quota_is_the_least_of_the_groups_above(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert cgroup.cpu_quota(tmp_path, own) == float("inf")
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    assert cgroup.cpu_quota(tmp_path, own) == 1.5
    machine = cgroup.memory(tmp_path, own)
    (tmp_path / "a" / "memory.max").write_text("max\n")
    assert cgroup.memory(tmp_path, own) == machine
    (tmp_path / "a" / "memory.max").write_text("8000\n")
    assert cgroup.memory(tmp_path, own) == 8000
    own.write_text("4:memory:/c\n0::/a/b\n")
    (tmp_path / "memory" / "c").mkdir(parents=True)
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("7000\n")
    assert cgroup.memory(tmp_path, own) == 7000


def test_a_long_chunk_gives_signs_of_life_with_its_tokens(project, monkeypatch, capsys):
    ctx = Context(load(project.root / "toy.yaml"), project.run_dir, 1, toy_stages.SAMPLE, tell=Progress("sample").show)
    monkeypatch.setattr("flywheel.runs.run.BEAT", 0.05)
    monkeypatch.setattr(Progress, "EVERY", 0.1)
    with ctx.beating():
        for _ in range(4):
            ctx.ledger.so_far += 1500
            time.sleep(0.15)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3 and all("tokens" in line and "tokens/s" in line for line in lines)
    assert "tokens 6,000" in lines[-1]


def test_the_processes_of_a_stage_share_its_threads(project, monkeypatch):
    """With fewer threads than cores, nobody is bound to a core that may be busy."""
    called = []

    class Child:
        def __init__(self, what, threads, environment):
            self.threads = threads

        def call(self, target, arguments, **how):
            called.append((arguments, self.threads))
            return {}

        def close(self, watch=None):
            self.closed = True

        def end(self):
            assert self.closed

    monkeypatch.setattr(isolate, "Child", Child)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for given, expected in ((3, [2, 1]), (8, [4, 4])):
        called.clear()
        sets = ["engine.workers=2", f"engine.threads={given}"]
        recipe = load(project.root / "toy.yaml", sets)
        at = (project.run_dir, 1, toy_stages.SAMPLE, "toy_stages:stages", 0)
        run_stage(Ranks(), recipe, *at, print, lambda: None, Launch(Ranks()))
        assert sorted((threads for _, threads in called), reverse=True) == expected
        assert all((arguments["cores"] is not None) == (given == 8) for arguments, _ in called)
    called.clear()
    run_stage(
        Ranks(), load(project.root / "toy.yaml", ["engine.threads=3"]), project.run_dir, 1, toy_stages.DISTILL,
        "toy_stages:stages", 0, print, lambda: None, Launch(Ranks()),
    )  # fmt: skip
    assert [threads for _, threads in called] == [3]
