import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from synthetic_run import add_round, make_run

from flywheel.report import pictures
from flywheel.report import tables as report
from flywheel.report import wandb as tracking
from flywheel.runs.history import History

KEY = "a" * 40


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """Nobody's W&B key may be found, and nothing may be sent anywhere."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
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


def logged(path: Path) -> tuple[dict, list[dict]]:
    """(the run's record, history rows) of a `.wandb` file, as W&B itself will read it."""
    from wandb.proto import wandb_internal_pb2

    run, rows = {}, []
    for data in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            run = {"id": record.run.run_id, "project": record.run.project}
        elif record.WhichOneof("record_type") == "history":
            rows.append(
                {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            )
    return run, rows


def test_after_a_round_tables_pictures_and_one_offline_history_are_there(tmp_path, capsys):
    run = make_run(tmp_path / "lab", rounds=1)
    report.after_round(run, 1)
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
    report.after_round(run, 2)
    folders = list((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 1, "an offline run cannot be resumed: the former directory must go"
    record, rows = logged(next(folders[0].glob("*.wandb")))
    assert record["id"] == (run / "wandb_id").read_text() and record["project"] == "flywheel"
    ends = [row for row in rows if "bin/1/pass@1" in row]
    assert [row["round"] for row in ends] == [0, 1, 2]
    assert "bin/5/gain" not in ends[0]
    assert ends[1]["bin/5/gain"] == pytest.approx(ends[1]["bin/5/pass@1"] - ends[0]["bin/5/pass@1"])
    assert ends[2]["plan/heat_map/_type"] == "image-file" and ends[2]["harvest/samples/nrows"] == 10
    assert next(row["train_prm/round_2/loss"] for row in rows if "train_prm/round_2/loss" in row) == pytest.approx(
        2 / 3
    )
    assert [row["_step"] for row in rows] == list(range(len(rows)))


def test_the_rows_of_finished_rounds_never_change_so_an_online_run_can_be_continued(tmp_path):
    run = make_run(tmp_path / "lab", rounds=1)
    before = list(tracking.rows(History.of(run)))
    add_round(run, 2)
    assert list(tracking.rows(History.of(run)))[: len(before)] == before


def test_an_unreachable_server_costs_one_line_and_leaves_the_history_offline(tmp_path, monkeypatch):
    with socket.socket() as listener:  # accepts and never answers
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        run = make_run(tmp_path / "lab", rounds=0, recipe={"track": {"mode": "auto"}})
        line = tracking.update(run, deadline=4)
    assert "no answer within 4 s" in line and "wandb sync" in line and "\n" not in line
    (folder,) = (run / "wandb").glob("offline-run-*")
    assert [row["round"] for row in logged(next(folder.glob("*.wandb")))[1]] == [0]
    written = b"".join(p.read_bytes() for p in run.rglob("*") if p.is_file())
    assert KEY.encode() not in written


def test_a_key_that_is_no_key_does_not_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    run = make_run(tmp_path / "lab", rounds=0, recipe={"track": {"mode": "online"}})
    line = tracking.update(run)
    assert line.startswith("W&B: ") and "offline" in line and "\n" not in line


def test_no_secret_of_the_environment_reaches_tables_pictures_or_the_history(tmp_path, monkeypatch, capfd):
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"{name}-PLANTED")
    run = make_run(tmp_path / "lab", rounds=1)
    report.after_round(run, 1)
    assert list((run / "wandb").rglob("*.wandb"))
    out, err = capfd.readouterr()
    assert "PLANTED" not in out + err and not [
        p for p in run.rglob("*") if p.is_file() and b"PLANTED" in p.read_bytes()
    ]


def test_disabled_tracking_writes_nothing(tmp_path):
    run = make_run(tmp_path / "lab", rounds=0, recipe={"track": {"mode": "disabled"}})
    assert tracking.update(run) is None
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
    names = {p.name for p in pictures.draw(History.of(run))}
    assert names == {"pass_by_bin.png", "policy.png", "tokens.png", "training_1.png"}
    assert all((run / "pictures" / name).stat().st_size > 5000 for name in names)


def test_a_cell_of_the_plan_says_its_strategy():
    label = pictures.strategy_label
    assert label({"kind": "best_of_n", "n": 16, "select": "weighted"}) == "best of 16\nweighted"
    assert label({"kind": "beam", "n": 16, "width": 4, "max_rounds": 40}) == "beam of 16\nwidth 4"
    assert label({"kind": "revise", "length": 4, "chains": 2, "select": "majority"}) == "revise 4 x 2\nmajority"


def test_the_share_that_left_the_hardest_bin_is_read_from_the_last_row():
    assert report.left_hardest([[4, 1], [3, 7]]) == (3, 10)
