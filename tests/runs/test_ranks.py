"""What keeps the ranks of a launch together: heartbeats, orders and draws in torch's store, and the lock of a run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from toy import HERE, Project, gone, wait_for

from flywheel.runs import ranks as module
from flywheel.runs.files import Damaged, wait_for_names
from flywheel.runs.ranks import InUse, Launch, LaunchFailed, Ranks, free_port, lock

SERVER = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("there", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def host():
    """(a process that hosts the store, as a launcher's agent does, its port)."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    yield process, port
    process.kill()
    process.wait()


@pytest.fixture
def agent(host, monkeypatch, request):
    """The store's process, and in the environment what a rank finds there."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(host[1]))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", request.node.name)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setattr(module, "BEAT", 0.1)
    monkeypatch.setattr(module, "LAST_WORDS", 1.0)
    yield host[0]
    host[0].send_signal(signal.SIGCONT)


def pair() -> tuple[Launch, Launch]:
    return Launch(Ranks(0, 2)), Launch(Ranks(1, 2))


def failure(launch: Launch, seconds: float = 10.0) -> str:
    """The line with which a waiting rank ends."""
    end = time.monotonic() + seconds
    with pytest.raises(LaunchFailed) as caught:
        while time.monotonic() < end:
            launch.watch()
            time.sleep(0.02)
    return str(caught.value)


def test_orders_and_draws_reach_every_rank_once(agent):
    zero, one = pair()
    zero.order(do="stage", have=[0, 2])
    assert one.next() == {"do": "stage", "have": [0, 2]}
    assert not zero.all_done()
    assert sorted([zero.draw(), one.draw(), one.draw(), zero.draw()]) == [1, 3, 4, 5]
    one.done()
    zero.wait_for_all()
    zero.order(do="stage", have=[])
    one.next()
    assert (one.draw(), zero.draw()) == (0, 1), "each order counts anew"
    one.done()
    zero.order(do="end")
    assert one.next()["do"] == "end"
    assert not zero.all_done()
    one.done()
    zero.wait_for_all()
    for launch in (zero, one):
        launch.stop()


def test_a_rank_that_never_comes_or_falls_silent_is_named(agent, monkeypatch):
    monkeypatch.setattr(module, "SILENCE", 1.5)
    zero = Launch(Ranks(0, 3))
    one = Launch(Ranks(1, 3))
    assert "rank 2 did not come within" in failure(zero)
    zero.stop()
    assert "rank 0 is gone: no sign of life within" in failure(one)
    started = time.monotonic()
    one.fail("?")
    assert not one.told and time.monotonic() - started < 0.5, "nobody is there to print it"


def test_a_failure_ends_all_and_is_printed_by_rank_0(agent):
    zero, one = pair()
    telling = threading.Thread(target=one.fail, args=["no room to write"])
    telling.start()
    assert failure(zero) == "rank 1: no room to write"
    assert not one.told
    zero.fail("rank 1: no room to write")
    telling.join(10)
    assert one.told


def test_a_frozen_store_ends_every_call_with_one_line(agent, monkeypatch):
    """Its host answers the packets, as a stopped one does, so no call of TCPStore's own would come back."""
    zero, one = pair()
    zero.order(do="stage", have=[])
    one.next()
    monkeypatch.setattr(module, "SILENCE", 1.5)
    agent.send_signal(signal.SIGSTOP)
    while Path(f"/proc/{agent.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    started = time.monotonic()
    with pytest.raises(LaunchFailed, match="store at 127.0.0.1:[0-9]+ does not answer .*silent for"):
        one.draw()
    assert "does not answer" in failure(zero)
    assert time.monotonic() - started < 8


def test_a_store_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(module, "SILENCE", 1.0)
    with pytest.raises(LaunchFailed, match="rank 0 is gone or cannot be reached"):
        Launch(Ranks(1, 2))


def test_keys_of_an_earlier_launch_or_of_ranks_before_a_restart_are_not_read(agent, monkeypatch):
    zero, one = pair()
    zero.order(do="end")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = Launch(Ranks(1, 2))
    assert again._read("order_1") is None
    assert "started the ranks of another host again" in failure(zero), "those before it end"
    for launch in (one, again):
        launch.stop()


def test_a_run_has_one_holder_who_is_named(tmp_path):
    code = "import sys, time, pathlib; from flywheel.runs.ranks import lock; held = lock(pathlib.Path(sys.argv[1]))\n"
    code += "print('held', flush=True); time.sleep(600)"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=HERE.parent
    )
    assert other.stdout.readline() == "held\n"
    try:
        with pytest.raises(InUse, match=f"in use by process {other.pid} on "):
            lock(tmp_path)
    finally:
        other.kill()
        other.wait()
    os.close(lock(tmp_path))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_it_says_so_and_goes_on(tmp_path, monkeypatch, capsys, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    os.close(lock(tmp_path))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"{tmp_path}: its file system has no locks ({os.strerror(number)})" in said[0]


def test_a_name_that_another_host_makes_late_is_waited_for(tmp_path):
    later = threading.Timer(0.5, (tmp_path / "shards").mkdir)
    later.start()
    wait_for_names(tmp_path, ["shards"])
    with pytest.raises(Damaged, match="shards/00001: missing"):
        wait_for_names(tmp_path / "shards", ["00001"], seconds=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torch_elastic_continues_a_launch_by_itself(tmp_path, victim):
    """`accelerate launch --max_restarts 1`: a killed rank, and the run ends all the same."""
    project = Project(tmp_path / "project")
    config = str(HERE.parent / "accelerate_configs" / "cpu_2.yaml")
    wrapper = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    wrapper += ["--max_restarts", "1", "--no_python"]
    process = project.start("--round", "1", wrapper=wrapper, TOY_SLEEP=1)
    wait_for(lambda: project.logged("evaluate:0"), 120)
    killed = ranks_of(process.pid)[victim]
    os.kill(killed, signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.rstrip().endswith("is at the end of round 1") and gone(killed)
    assert json.loads((project.stage(1, "gate") / "manifest.json").read_text())["ranks"] == 2


def ranks_of(launcher: int) -> list[int]:
    """The ranks' process ids, by rank."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        for item in Path(f"/proc/{child}/environ").read_text().split("\0"):
            if item.startswith("RANK="):
                found[int(item.removeprefix("RANK="))] = int(child)
    return [found[rank] for rank in sorted(found)]
