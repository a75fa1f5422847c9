"""Disks that fill up or cannot be written, clocks that lie, other machines, and runs cut off anywhere."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from toy import Project, finish, wait_for

from flywheel.stages import ORDER

ELSEWHERE = ["unshare", "--uts", "--pid", "--fork", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh"]


def allowed(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def may_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        return allowed("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder) and allowed("umount", folder)


can_mount = pytest.mark.skipif(not may_mount(), reason="this user may not mount a file system")
SLOW = pytest.mark.slow
can_unshare = pytest.mark.skipif(not allowed(*ELSEWHERE, "true"), reason="this user may not make a namespace")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Project:
    return finish(tmp_path_factory)


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path / "project")


@contextmanager
def small_disk(path: Path, size: str):
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)


def the_line(done: subprocess.CompletedProcess) -> str:
    """A failed run's only line on stderr."""
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("flywheel: "), done.stderr
    return lines[0]


@can_mount
@pytest.mark.parametrize("size", [pytest.param("48k", marks=SLOW), "160k", pytest.param("320k", marks=SLOW)])
def test_a_full_disk_is_one_line_and_room_alone_mends_it(project, finished, size):
    with small_disk(project.runs, size):
        assert "no room to write" in the_line(project.run("--round", "2"))
        assert not [p for p in project.runs.rglob("*.tmp")]
        kept = {p: p.stat().st_mtime_ns for p in project.runs.rglob("shards/[0-9]*/*")}
        remount(project.runs, "size=16m")
        done = project.run("--round", "2")
        assert done.returncode == 0, done.stderr
        assert project.tables() == finished.tables()
        assert kept.items() <= {p: p.stat().st_mtime_ns for p in project.runs.rglob("shards/[0-9]*/*")}.items()


@can_mount
def test_a_disk_that_turns_read_only_is_one_line(project, finished):
    with small_disk(project.runs, "16m"):
        assert project.run("--round", "1").returncode == 0
        remount(project.runs, "ro")
        assert "read-only file system" in the_line(project.run("--round", "2")).lower()
        remount(project.runs, "rw")
        assert project.run("--round", "2").returncode == 0
        assert project.tables() == finished.tables()


@can_unshare
def test_a_run_that_another_machine_works_on_is_refused_until_it_dies(project):
    """Two machines with process ids and names of their own and one file system: what containers are."""
    first = project.start("--round", "1", TOY_SLEEP=0.5)
    wait_for(lambda: project.logged("evaluate:0"))

    def second() -> subprocess.CompletedProcess:
        process = project.start("--round", "1", wrapper=ELSEWHERE)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    assert f"is in use by process {first.pid} on {os.uname().nodename}" in the_line(second())
    first.kill()
    first.communicate()
    done = second()
    assert done.returncode == 0, done.stderr
    assert "on elsewhere" in (project.run_dir / ".lock").read_text()
    assert "nothing to do" in project.run("--round", "1").stdout  # what a process of the other machine left is no lock


def test_the_clock_decides_nothing(project, finished):
    """Files from tomorrow, and from 1970, as a clock set back and forth leaves them: nothing is made again."""
    assert project.run("--round", "1").returncode == 0
    rng = random.Random(0)
    for path in project.run_dir.rglob("*"):
        when = rng.choice([0, time.time() + 86400])
        os.utime(path, (when, when))
    seen = {p: p.stat().st_mtime_ns for p in project.run_dir.rglob("shards/[0-9]*/*")}
    done = project.run("--round", "2")
    assert done.returncode == 0, done.stderr
    assert project.tables() == finished.tables()
    assert seen.items() <= {p: p.stat().st_mtime_ns for p in project.run_dir.rglob("shards/[0-9]*/*")}.items()


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=SLOW) for seed in range(2, 6))])
def test_any_beginning_of_a_run_goes_on_to_the_same_end(finished, project, seed):
    """All that was made after a random moment is taken away: later rounds, later stages, some of a stage's chunks."""
    shutil.copytree(finished.root, project.root, dirs_exist_ok=True)
    recipe = project.run_dir / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(finished.root), str(project.root)))
    rng = random.Random(seed)
    made = sorted(
        project.run_dir.glob("round_*/*/manifest.json"), key=lambda p: (p.parts[-3], ORDER.index(p.parts[-2]))
    )
    cut = rng.randrange(len(made))
    for manifest in made[cut + 1 :]:
        shutil.rmtree(manifest.parent)
    made[cut].unlink()
    chunks = sorted((made[cut].parent / "shards").glob("[0-9]*"))
    for chunk in rng.sample(chunks, rng.randrange(len(chunks) + 1)):
        shutil.rmtree(chunk)
    done = project.run("--round", "2")
    assert done.returncode == 0, done.stderr
    assert project.tables() == finished.tables()


def test_no_secret_of_the_environment_is_written_anywhere(project):
    secrets = {
        "HF_TOKEN": "hf_SECRETabcdefghijklmnopqrstuvwxyz0123",
        "OPENAI_API_KEY": "sk-SECRET0123456789",
        "AWS_SECRET_ACCESS_KEY": "SECRETaws/0123456789",
    }
    process = project.start("--round", "1", **secrets, WANDB_API_KEY="SECRET" + "0" * 34)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    written = [out.encode(), err.encode(), *(p.read_bytes() for p in project.root.rglob("*") if p.is_file())]
    assert len(written) > 40 and not [text for text in written if b"SECRET" in text]
