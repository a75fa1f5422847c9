"""A toy project on disk (questions, a base's config, a recipe) and a way to run its loop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

HERE = Path(__file__).parent
# a launch leaves a signal ignored that it inherits ignored (nohup): a test in the background would interrupt nothing
signal.signal(signal.SIGINT, signal.default_int_handler)
SPLITS = {"train": 20, "calibrate": 4, "validation": 4, "test": 6}


class Project:
    def __init__(self, root: Path):
        self.root, self.runs, self.log = root, root / "runs", root / "log"
        (root / "base").mkdir(parents=True)
        (root / "base" / "config.json").write_text("{}")
        (root / "base" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        rows = [
            {"id": f"{split}{i:02d}", "question": f"{split} {i}?", "answer": str(i % 5), "split": split}
            for split, n in SPLITS.items()
            for i in range(n)
        ]
        (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = {
            "name": "toy",
            "problems": {"path": "questions.jsonl"},
            "model": {"base": "base"},
            "engine": {
                "kind": "toy_stages:none",
                "chunk": 2,
                "workers": 1,
            },  # none: nothing is trained and served before a run
            "prompts": {"solve": "{question}", "check": "{question}", "again": "\n"},
            "calibrate": {"strategies": [{"kind": "best_of_n"}], "budgets": [4, 16]},
        }
        (root / "toy.yaml").write_text(yaml.safe_dump(recipe))

    @property
    def run_dir(self) -> Path:
        return self.runs / "toy"

    def stage(self, round: int, name: str) -> Path:
        return self.run_dir / f"round_{round}" / name

    def start(self, *argv: str, wrapper: Sequence[str] = (), **env: object) -> subprocess.Popen:
        clean = {
            k: v
            for k, v in os.environ.items()
            if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
            and not k.startswith("ACCELERATE_")
        }
        path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
        command = [
            *wrapper,
            sys.executable,
            str(HERE / "toy_run.py"),
            "--recipe",
            str(self.root / "toy.yaml"),
            "--runs",
            str(self.runs),
            *argv,
        ]
        return subprocess.Popen(
            command,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.root,
            env={**clean, "PYTHONPATH": path, "TOY_LOG": str(self.log), **{k: str(v) for k, v in env.items()}},
        )

    def run(self, *argv: str, **env: object) -> subprocess.CompletedProcess:
        process = self.start(*argv, **env)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()  # one that hangs ends with its processes
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def logged(self, kind: str) -> list[list[str]]:
        """The log's lines that begin with `kind`, as [what, rank, pid]."""
        return (
            [line.split() for line in self.log.read_text().splitlines() if line.startswith(kind)]
            if self.log.exists()
            else []
        )

    def shards(self, round: int = 1, stage: str = "sample") -> list[Path]:
        return sorted(p for p in (self.stage(round, stage) / "shards").glob("*") if p.name.isdigit())

    def tables(self) -> dict[str, bytes]:
        """All parquet of the run, by path."""
        return {str(p.relative_to(self.run_dir)): p.read_bytes() for p in sorted(self.run_dir.rglob("*.parquet"))}


def finish(tmp_path_factory) -> Project:
    """A run at the end of round 2, with what it printed."""
    project = Project(tmp_path_factory.mktemp("finished") / "project")
    done = project.run("--round", "2")
    assert done.returncode == 0, done.stderr
    project.output = done.stdout
    return project


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether process `pid` has ended (a zombie that nobody waits for has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True
