"""The history of a run in Weights & Biases, written after each round and never in the way of the run.

The manifests are the truth, W&B a view of them. A run directory is one W&B run: its id never changes, and online
`resume="allow"` lets each round append the rows that the server lacks. An offline run cannot be resumed (every session
leaves one more `offline-run-*` folder), so offline the whole history is written afresh and replaces the former folder.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

from flywheel.errors import UserError
from flywheel.ledger import total
from flywheel.report.summary import summary
from flywheel.runs.files import write_file
from flywheel.runs.manifest import PATHS
from flywheel.runs.run import Run

PATIENCE = 30.0  # seconds
CURVES = ("train_prm", "train_reviser", "distill")
SECTIONS = ("policy", "search", "prm", "reviser", "harvest")  # of a round's summary
SAMPLES = 10  # harvested solutions in a round's table


def update(run: Run, patience: float = PATIENCE) -> str | None:
    """Bring W&B up to date with the finished rounds; returns the line to print, None where tracking is disabled.

    `track.mode` of the recipe decides; `auto` is online where a key is configured, offline otherwise. A server has
    `patience` seconds to answer and twice that to take the rows; what it does not take is written offline. Whatever
    wandb does, this returns within 6 * `patience` seconds and raises nothing. It is meant for a process of its own:
    it sets variables of the environment, and a wandb that hangs is left behind.
    """
    if run.recipe.track.mode == "disabled":
        return None
    lines: list[str] = []
    writer = Thread(target=lambda: lines.append(_write_or_fall_back(run, patience)), daemon=True)
    writer.start()
    writer.join(6 * patience)
    return "W&B: " + (lines[0] if lines else f"no end; to try again: python -m flywheel.report.wandb {run.root}")


def _write_or_fall_back(run: Run, patience: float) -> str:
    said = []
    for mode in (run.recipe.track.mode, "offline"):
        try:
            return "; ".join([*said, write(run, mode, patience)])
        except Exception as error:  # of any class: nothing that goes wrong here may stop the run
            said.append(" ".join(str(error).split())[:160] or type(error).__name__)
    return "; ".join(said)


def write(run: Run, mode: str, patience: float) -> str:
    """Write the history in this process; returns what was done. Raises what wandb raises."""
    # what no setting says: print nothing, report no errors, and stage tables here rather than in the home directory
    folder = run.root / "wandb"
    os.environ |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_DATA_DIR": str(folder.resolve())}
    import wandb

    try:
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE")
            mode = mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        if mode == "disabled":
            return "disabled by WANDB_MODE"
        shutil.rmtree(folder, ignore_errors=True)  # whatever of it was not sent is written again below
        folder.mkdir()
        session = wandb.init(
            project=run.recipe.track.project,
            name=run.root.resolve().name,
            id=run_id(run),
            resume="allow",
            dir=str(run.root),
            mode=mode,
            config=_config(run),
            # nothing about the machine: no program, host, git remote, packages, console or usage statistics
            settings=wandb.Settings(
                program="flywheel",
                host="flywheel",
                console="off",
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                save_code=False,
                init_timeout=patience,
                finish_timeout=2 * patience,
                finish_timeout_raises=True,
            ),
        )
        session.define_metric("round")
        for prefix in ("bin", "gain", "gate", "ledger", "plan", *SECTIONS):
            session.define_metric(f"{prefix}/*", step_metric="round")
        for stage in CURVES:
            session.define_metric(f"{stage}/*", step_metric=f"step/{stage}")
        for step, row in enumerate(rows(run)):
            if step >= session.starting_step:  # the others are there since an earlier round
                session.log({key: _media(value) for key, value in row.items()}, step=step)
        session.finish()
        if mode == "offline":
            return f"offline; to send it: wandb sync {Path(session.dir).parent}"
        return f"online, {session.url}"
    finally:
        wandb.teardown()  # its service goes, and with it a session that failed: else the id would be in use


def _config(run: Run) -> dict:
    """The recipe; of a path of this machine its last part alone."""
    config = run.recipe.model_dump(mode="json")
    for section, key in (path.split(".") for path in PATHS):
        if (path := Path(config[section][key])).is_absolute():
            config[section][key] = path.name
    return config


def rows(run: Run) -> Iterator[dict]:
    """The W&B history, the same rows in the same order at every replay; a later round only appends.

    Values are numbers, a `Path` to a picture or a list of dicts (a table).
    """
    before: dict[int, float] = {}
    for item in summary(run)["rounds"]:
        r = item["round"]
        for stage in CURVES:
            for point in run.figures(stage, r).get("curve", []):
                losses = {key: point[key] for key in ("loss", "eval_loss") if point.get(key) is not None}
                named = {f"{stage}/round_{r}/{key}": loss for key, loss in losses.items()}
                yield {f"step/{stage}": point["step"], **named}
        row: dict = {"round": r}
        for b in item["fixed_bins"]:
            number = b["bin"]
            if (rate := b.get("pass@1")) is not None:
                row[f"bin/{number}/pass@1"] = rate
                if number in before:
                    row[f"bin/{number}/gain"] = rate - before[number]
                before[number] = rate
        for section in SECTIONS:
            row |= {f"{section}/{key}": value for key, value in item.get(section, {}).items() if _is_number(value)}
        row |= {f"gain/{key}": gain for key, (gain, _, _) in item.get("gain", {}).items()}
        if "gate" in item:
            row["gate/passed"] = int(item["gate"] == "passed")
        charged = [charge for charge in run.ledger_rows if charge["round"] == r]
        row |= {f"ledger/{role}_tokens": spent.tokens for (role,), spent in total(charged, "role")}
        if (picture := run.root / "pictures" / f"plan_{r}.png").is_file():
            row["plan/heat_map"] = picture
        if samples := _samples(run, r):
            row["harvest/samples"] = samples
        yield row


def _samples(run: Run, round: int) -> list[dict]:
    """A few harvested solutions, from every bin in turn, the most voted first."""
    if (path := run.harvest(round)) is None:
        return []
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path).read(columns=["bin", "votes", "question", "solution", "answer"]).to_pylist()
    by_bin: dict[int, list[dict]] = {}
    for row in sorted(table, key=lambda row: (row["bin"], -row["votes"], row["question"])):
        by_bin.setdefault(row["bin"], []).append(row)
    share = -(-SAMPLES // max(1, len(by_bin)))
    return [row for group in by_bin.values() for row in group[:share]][:SAMPLES]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _media(value):
    import wandb

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
        write_file(path, secrets.token_hex(4).encode())
    return path.read_text(encoding="ascii").strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flywheel.report.wandb", description="Write a run's history to W&B."
    )
    parser.add_argument("run", type=Path, help="a run directory, e.g. runs/chain")
    try:
        print(update(Run(parser.parse_args(argv).run)) or "W&B: disabled by track.mode of the run's recipe")
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
