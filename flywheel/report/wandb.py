"""Log the history of a run to Weights & Biases after each round; no failure here stops the run.

Everything is derived from the manifests. A run directory is one W&B run with a fixed id. Online, `resume="allow"`
lets each round append the rows that the server lacks. An offline run cannot be resumed (every session creates another
`offline-run-*` folder), so offline the whole history is written again and replaces the previous folder.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from heapq import nsmallest
from pathlib import Path
from threading import Thread

from flywheel.errors import one_line
from flywheel.ledger import total
from flywheel.report.summary import summary
from flywheel.runs.files import ROWS, opened, write_file
from flywheel.runs.manifest import public
from flywheel.runs.run import Run

PATIENCE = 30.0  # seconds
CURVES = ("train_prm", "train_reviser", "train_head", "distill")
SECTIONS = ("policy", "search", "prm", "reviser", "harvest")  # keys of a round's summary
SAMPLES = 10  # harvested solutions to log per round


def update(run: Run, patience: float = PATIENCE) -> str | None:
    """Log the finished rounds to W&B; returns the line to print, or None if tracking is disabled.

    The recipe's `track.mode` decides; `auto` is online if an API key is configured, else offline. The server has
    `patience` seconds to answer and twice that to accept the rows; if it fails, they are written offline. Whatever
    wandb does, this returns within 6 * `patience` seconds and does not raise. Call it in a separate process: it sets
    environment variables and leaves a hanging wandb thread behind.
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
        except Exception as error:  # no error here may stop the run
            said.append(" ".join(str(error).split())[:160] or type(error).__name__)
    return "; ".join(said)


def write(run: Run, mode: str, patience: float) -> str:
    """Write the history in this process; returns a line that says where. Passes on exceptions of wandb."""
    # not available as settings: print nothing, report no errors, keep temporary tables out of the home directory
    folder = run.root / "wandb"
    os.environ |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_DATA_DIR": str(folder.resolve())}
    import wandb

    try:
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE")
            mode = mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        if mode == "disabled":
            return "disabled by WANDB_MODE"
        shutil.rmtree(folder, ignore_errors=True)  # rows that were not sent are written again below
        folder.mkdir()
        session = wandb.init(
            project=run.recipe.track.project,
            name=run.root.resolve().name,
            id=run_id(run),
            resume="allow",
            dir=str(run.root),
            mode=mode,
            config=public(run.recipe),
            # send nothing about the machine: no program, host, git remote, packages, console or usage statistics
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
            if step >= session.starting_step:  # earlier rounds logged the rows before it
                session.log({key: _media(value) for key, value in row.items()}, step=step)
        session.finish()
        if mode == "offline":
            return f"offline; to send it: wandb sync {Path(session.dir).parent}"
        return f"online, {session.url}"
    finally:
        wandb.teardown()  # ends wandb's service; otherwise a failed session would keep the run id in use


def rows(run: Run) -> Iterator[dict]:
    """The W&B history. Later rounds only append: rows and their order never change.

    Values are numbers, a `Path` (a picture) or a list of dicts (a table).
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
    """Up to SAMPLES harvested solutions, those with most votes from each bin."""
    if (path := run.harvest(round)) is None:
        return []
    by_bin: dict[int, list[dict]] = {}
    with opened(path) as file:
        for batch in file.iter_batches(ROWS, columns=["bin", "votes", "question", "solution", "answer"]):
            for row in batch.to_pylist():
                by_bin.setdefault(row["bin"], []).append(row)
            for bin, rows in by_bin.items():
                by_bin[bin] = nsmallest(SAMPLES, rows, key=lambda row: (-row["votes"], row["question"]))
    share = -(-SAMPLES // max(1, len(by_bin)))
    return [row for bin in sorted(by_bin) for row in by_bin[bin][:share]][:SAMPLES]


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
    """The W&B id of this run directory, created at the first call and stored in the file `wandb_id`."""
    path = run.root / "wandb_id"
    if not path.is_file():
        write_file(path, secrets.token_hex(4).encode())
    return path.read_text(encoding="ascii").strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flywheel.report.wandb", description="Write a run's history to W&B."
    )
    parser.add_argument("run", type=Path, help="a run directory, e.g. runs/chain")
    run = parser.parse_args(argv).run
    return one_line(lambda: update(Run(run)) or "W&B: disabled by track.mode of the run's recipe")


if __name__ == "__main__":
    sys.exit(main())
