import json
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from synthetic_run import add_round, make_run

from flywheel.report import after_round, pictures
from flywheel.report import wandb as tracking
from flywheel.runs.run import Run

KEY = "a" * 40


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """Nobody's W&B key may be found, and nothing may be sent anywhere. What `write` sets is undone."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_SILENT", "WANDB_ERROR_REPORTING", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb_cache"))


def records(path: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file: a LevelDB log (blocks of 32 KiB; crc, length, type) after 7 bytes of header."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:  # a block's tail too short for a header is padding
            at += room
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def logged(folder: Path) -> tuple[dict, list[dict]]:
    """(the run's record, history rows) of the one session in `folder`, as W&B itself will read it."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("offline-run-*/*.wandb")
    run, rows = {}, []
    for data in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            run = {"id": record.run.run_id, "project": record.run.project, "host": record.run.host, "config": config}
        elif record.WhichOneof("record_type") == "history":
            rows.append(
                {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            )
    return run, rows


def test_after_a_round_tables_pictures_and_one_offline_history_are_there(tmp_path, capsys):
    run = make_run(tmp_path / "lab", rounds=1)
    after_round(Run(run), 1)
    text = capsys.readouterr().out
    assert "policy_0 before, policy_1 after" in text and "W&B: offline; to send it: wandb sync" in text
    assert {p.name for p in (run / "pictures").iterdir()} == {
        "pass_by_bin.png",
        "policy.png",
        "tokens.png",
        "migration_1.png",
        "plan_1.png",
        "training_1.png",
    }

    add_round(run, 2)
    after_round(Run(run), 2)
    record, rows = logged(run / "wandb")  # one: an offline run cannot be resumed, so the former session must go
    assert record["id"] == (run / "wandb_id").read_text() and record["project"] == "flywheel"
    ends = [row for row in rows if "bin/1/pass@1" in row]
    assert [row["round"] for row in ends] == [0, 1, 2]
    assert "bin/5/gain" not in ends[0]
    assert ends[1]["bin/5/gain"] == pytest.approx(ends[1]["bin/5/pass@1"] - ends[0]["bin/5/pass@1"])
    assert ends[2]["plan/heat_map/_type"] == "image-file" and ends[2]["harvest/samples/nrows"] == 10
    losses = [row["train_prm/round_2/loss"] for row in rows if "train_prm/round_2/loss" in row]
    assert losses[0] == pytest.approx(2 / 3)
    assert [row["_step"] for row in rows] == list(range(len(rows)))


def test_the_rows_of_finished_rounds_never_change_so_an_online_run_can_be_continued(tmp_path):
    run = make_run(tmp_path / "lab", rounds=1)
    before = list(tracking.rows(Run(run)))
    add_round(run, 2)
    assert list(tracking.rows(Run(run)))[: len(before)] == before


class TakesNoRows(BaseHTTPRequestHandler):
    """A W&B server that knows the account and the run, and never answers when rows come."""

    def do_POST(self):
        if not self.path.startswith("/graphql"):
            threading.Event().wait()
        query = self.rfile.read(int(self.headers["Content-Length"]))
        project = {"id": "p", "name": "flywheel", "entity": {"id": "e", "name": "me"}}
        if b"upsertBucket" in query:
            names = {"id": "b", "name": "lab", "displayName": "lab", "sweepName": None, "project": project}
            bucket = names | {"config": "{}", "historyLineCount": 0}
            answer = {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        elif b"RunResumeStatus" in query:
            answer = {"data": {"model": project | {"bucket": None}}}
        else:
            answer = {"errors": [{"message": "unknown"}]}
        answer = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        """Nothing on the terminal."""


@pytest.fixture(params=["silent", "takes no rows"])
def bad_server(request):
    """The address of a server that is no use."""
    if request.param == "silent":
        with socket.socket() as listener:  # connects and never answers
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    else:
        server = ThreadingHTTPServer(("127.0.0.1", 0), TakesNoRows)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        server.socket.close()


def test_a_server_that_does_not_answer_costs_one_line_and_leaves_the_history_offline(bad_server, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", bad_server)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run = make_run(tmp_path / "lab", rounds=0, recipe={"track": {"mode": "auto"}})
    line = tracking.update(Run(run), patience=3)
    assert ("Failed to get" in line or "Timed out finishing" in line) and "wandb sync" in line and "\n" not in line
    assert [row["round"] for row in logged(run / "wandb")[1]] == [0]
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert KEY.encode() not in written


def test_a_key_that_is_no_key_does_not_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    run = make_run(tmp_path / "lab", rounds=0, recipe={"track": {"mode": "online"}})
    line = tracking.update(Run(run))
    assert line.startswith("W&B: ") and "; offline; " in line and "\n" not in line


def test_a_wandb_that_never_returns_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "write", lambda run, mode, patience: threading.Event().wait())
    line = tracking.update(Run(make_run(tmp_path / "lab", rounds=0)), patience=0.01)
    assert line == f"W&B: no end; to try again: python -m flywheel.report.wandb {tmp_path / 'lab'}"


def test_nothing_about_the_machine_is_in_the_history(tmp_path, capsys):
    rival = {"model": "/home/me/prm", "format": "qwen"}
    recipe = {
        "problems": {"path": "/home/me/questions"},
        "model": {"base": "/home/me/base"},
        "prm": {"published": rival},
        "engine": {"kind": "server", "servers": ["http://secret-host:8000"]},
    }
    run = make_run(tmp_path / "lab", rounds=0, recipe=recipe)
    assert tracking.main([str(run)]) == 0 and "offline" in capsys.readouterr().out
    record, _ = logged(run / "wandb")
    assert record["host"] == "flywheel"
    assert record["config"]["problems"]["path"] == "questions" and record["config"]["model"]["base"] == "base"
    assert record["config"]["prm"]["published"]["model"] == "prm" and record["config"]["engine"]["servers"] == 1


def test_no_secret_of_the_environment_reaches_tables_pictures_or_the_history(tmp_path, monkeypatch, capfd):
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"{name}-PLANTED")
    run = make_run(tmp_path / "lab", rounds=1)
    after_round(Run(run), 1)
    assert list((run / "wandb").rglob("*.wandb"))
    out, err = capfd.readouterr()
    assert "PLANTED" not in out + err
    assert not [p for p in run.rglob("*") if p.is_file() and b"PLANTED" in p.read_bytes()]


def test_disabled_tracking_writes_nothing(tmp_path):
    run = make_run(tmp_path / "lab", rounds=0, recipe={"track": {"mode": "disabled"}})
    assert tracking.update(Run(run)) is None
    assert not (run / "wandb").exists() and not (run / "wandb_id").exists()


def test_pictures_are_drawn_from_what_there_is(tmp_path):
    run = make_run(tmp_path / "lab", rounds=1)
    path = run / "round_1" / "evaluate" / "manifest.json"
    manifest = json.loads(path.read_text())
    figures = manifest["figures"]
    del figures["migration"], figures["migration_last"], figures["migration_null"]
    figures["fixed_bins"][2] = {"bin": 3, "n": 0}  # an empty bin has no pass@1
    path.write_text(json.dumps(manifest))
    path = run / "round_1" / "calibrate" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "figures": {}}))
    names = {p.name for p in pictures.draw(Run(run))}
    assert names == {"pass_by_bin.png", "policy.png", "tokens.png", "training_1.png"}
    assert all((run / "pictures" / name).stat().st_size > 5000 for name in names)


def test_the_page_of_a_run_under_way_shows_what_there_is(tmp_path, monkeypatch):
    from flywheel.report.html import page

    root = make_run(tmp_path / "run", rounds=2)
    for stage in ("evaluate", "search"):
        (root / "round_2" / stage / "manifest.json").unlink()
    monkeypatch.setattr(Run, "problems", lambda self, *splits: [])
    text = page(Run(root))
    assert "1 rounds finished" in text and "Round 2 is under way: sample," in text
    assert "Round 1</strong>: all figures" in text and "Round 2</strong>: all figures" not in text
    for made in root.glob("round_*/*/manifest.json"):
        made.unlink()
    assert "none is finished yet" in page(Run(root))


def test_a_round_without_its_test_shows_its_calibration_figures(tmp_path, capsys):
    root = make_run(tmp_path / "run", rounds=1)
    for stage in ("evaluate", "search"):
        (root / "round_1" / stage / "manifest.json").unlink()
    after_round(Run(root), 1)
    printed = capsys.readouterr().out
    assert "accuracy, held out" in printed and "gate (calibrate questions): passed" in printed
    assert "test questions were not read" in printed and "on test questions" not in printed
    assert not (root / "pictures").exists()
