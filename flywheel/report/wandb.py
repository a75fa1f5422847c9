"""Weights & Biases, written by rank 0 after each round and never in the way of a run.

The manifests are the truth and W&B a view of them. Online, the one W&B run of this run
directory (fixed id, resume=allow) gets the rows that it lacks. Offline, a run cannot be
resumed (each process would leave one more `offline-run-*` of the same id), so the whole
history is written afresh and replaces the former directory: one history under one id.

wandb runs in a child process with a deadline: whatever it does (hang, crash, write to the
terminal), the run goes on and prints one line.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from flywheel.errors import UserError
from flywheel.runs.run import Run

DEADLINE = 180.0  # seconds; a healthy update of a few rounds takes under ten
CURVES = ("train_prm", "train_reviser", "distill")
SAMPLES = 10  # harvested solutions in a round's table


def update(run: Run, deadline: float = DEADLINE) -> str | None:
    """Bring W&B up to date with the finished rounds; returns the line to print.

    `track.mode` of the run's recipe decides: `auto` is online where a key is configured,
    offline otherwise. What is not sent within `deadline` seconds is written offline.
    """
    mode = run.recipe.track.mode
    if mode == "disabled":
        return None
    said, trouble = _child(run, mode, deadline)
    if trouble and mode in ("auto", "online"):
        said, again = _child(run, "offline", DEADLINE)
        trouble = f"{trouble}; the history is offline instead" if not again else trouble
    return "W&B: " + "; ".join(part for part in (trouble, said) if part)


def _child(run: Run, mode: str, deadline: float) -> tuple[str, str]:
    """(what was done, what went wrong): one of them is empty."""
    quiet = {
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_DISABLE_GIT": "true",
    }
    quiet["WANDB_DATA_DIR"] = str(run.root.resolve() / "wandb")  # tables are staged there, not in the home directory
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "flywheel.report.wandb", str(run.root), "--mode", mode]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **quiet, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=deadline,
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer within {deadline:.0f} s"
    except OSError as error:
        return "", f"could not be started: {error}"
    lines = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    return (last, "") if done.returncode == 0 else ("", last[:160] or f"ended with status {done.returncode}")


# ---- the child ------------------------------------------------------------------------


def write(run: Run, mode: str) -> str:
    """Write the history to W&B in this process; returns what was done. Raises wandb's errors."""
    import wandb

    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
    if mode == "disabled":
        return "disabled by WANDB_MODE"
    identity = run_id(run)
    if (folder := run.root / "wandb").exists():
        shutil.rmtree(folder)  # whatever of it was not sent is written again below
    folder.mkdir()
    session = wandb.init(
        project=run.recipe.track.project,
        name=run.root.resolve().name,
        id=identity,
        resume="allow",
        dir=str(run.root),
        mode=mode,
        config=run.recipe.model_dump(mode="json"),
        # nothing about the machine: no git remote, host, package list, console or usage statistics
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            save_code=False,
            init_timeout=30,
            finish_timeout=60,
        ),
    )
    session.define_metric("round")
    for prefix in ("bin", "policy", "gain", "search", "prm", "reviser", "harvest", "gate", "ledger", "plan"):
        session.define_metric(f"{prefix}/*", step_metric="round")
    for stage in CURVES:
        session.define_metric(f"{stage}/*", step_metric=f"step/{stage}")
    for step, row in enumerate(rows(run)):
        if step >= session.starting_step:  # the others are there since an earlier round
            session.log({key: _media(wandb, value) for key, value in row.items()}, step=step)
    where, url = Path(session.dir).parent, session.url
    session.finish()
    return f"offline; to send it: wandb sync {where}" if mode == "offline" else f"online, {url}"


def rows(run: Run) -> Iterator[dict]:
    """The W&B history, the same rows in the same order at every replay; a later round only appends.

    Values are numbers, a `Path` to a picture or a list of dicts (a table).
    """
    from flywheel.report.summary import summary

    data = summary(run)
    before: dict[int, float] = {}
    for item in data["rounds"]:
        r = item["round"]
        for stage in CURVES:
            for point in run.figures(stage, r).get("curve") or []:
                losses = {
                    f"{stage}/round_{r}/{key}": point[key]
                    for key in ("loss", "eval_loss")
                    if point.get(key) is not None
                }
                yield {f"step/{stage}": point["step"], **losses}
        row: dict = {"round": r}
        for b in item.get("fixed_bins", []):
            if (value := b.get("pass@1")) is not None:
                row[f"bin/{b['bin']}/pass@1"] = value
                if b["bin"] in before:
                    row[f"bin/{b['bin']}/gain"] = value - before[b["bin"]]
                before[b["bin"]] = value
        for section in ("policy", "search", "prm", "reviser", "harvest"):
            row |= {f"{section}/{key}": value for key, value in (item.get(section) or {}).items() if _is_number(value)}
        row |= {f"gain/{key}": value[0] for key, value in (item.get("gain") or {}).items()}
        if "gate" in item:
            row["gate/passed"] = int(item["gate"] == "passed")
        row |= {f"ledger/{role}_tokens": n for role, n in _tokens(run, r).items()}
        if (picture := run.root / "pictures" / f"plan_{r}.png").is_file():
            row["plan/heat_map"] = picture
        if samples := _samples(run, r):
            row["harvest/samples"] = samples
        yield row


def _tokens(run: Run, round: int) -> dict[str, int]:
    from flywheel.ledger import total

    return {
        role: spent.tokens
        for (role,), spent in total((row for row in run.ledger_rows if row["round"] == round), "role")
    }


def _samples(run: Run, round: int) -> list[dict]:
    """A few harvested solutions, from every bin in turn, the most voted first."""
    if (path := run.harvest(round)) is None:
        return []
    import pyarrow.parquet as pq

    columns = ["bin", "votes", "question", "solution", "answer"]
    table = pq.ParquetFile(path).read(columns=columns).to_pylist()
    by_bin: dict[int, list[dict]] = {}
    for row in sorted(table, key=lambda row: (-row["votes"], row["question"])):
        by_bin.setdefault(row["bin"], []).append(row)
    share = -(-SAMPLES // max(1, len(by_bin)))
    return [row for b in sorted(by_bin) for row in by_bin[b][:share]][:SAMPLES]


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _media(wandb, value):
    match value:
        case Path():
            return wandb.Image(str(value))
        case [dict() as first, *_]:
            return wandb.Table(columns=list(first), data=[list(row.values()) for row in value])
        case _:
            return value


def run_id(run: Run) -> str:
    """The W&B id of this run directory, made at the first call and kept in `wandb_id`."""
    path = run.root / "wandb_id"
    if not path.is_file():
        fresh = path.with_suffix(".new")
        fresh.write_text(secrets.token_hex(4), encoding="ascii")
        fresh.replace(path)
    return path.read_text(encoding="ascii").strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flywheel.report.wandb", description="Write a run's history to W&B."
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--mode", choices=("auto", "online", "offline"), default="auto")
    args = parser.parse_args(argv)
    try:
        run = Run(args.run)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    import wandb

    try:
        print(write(run, args.mode))
    except (wandb.Error, OSError, ValueError) as error:
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
