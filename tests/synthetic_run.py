"""A run directory as the stages leave it, with invented figures, for the tests of what reads one."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from flywheel.ledger import Ledger
from flywheel.runs.manifest import FORMAT
from flywheel.stages import ORDER

RECIPE = {
    "name": "made_up",
    "seed": 7,
    "problems": {"path": "problems"},
    "model": {"base": "no/such/base", "lora_rank": 4},
    "prompts": {"solve": "Q {question} ?\nTry ", "check": "Q {question} ?\nCheck ", "again": "\nAgain "},
    "prm": {"labels": ["ok", "no"]},
    "calibrate": {"strategies": [{"kind": "best_of_n"}], "budgets": [4, 16]},
    "track": {"mode": "offline"},
}
BIN_SIZES = (40, 42, 38, 40, 40)


def ci(value: float, half: float = 0.03) -> list[float]:
    return [max(0.0, value - half), min(1.0, value + half)]


def migration(stay: float) -> list[list[int]]:
    rows = []
    for i, size in enumerate(BIN_SIZES):
        row = [0] * 5
        row[i] = round(size * stay)
        row[max(0, i - 1)] += size - row[i]
        rows.append(row)
    return rows


def policy_after(round: int, refused: tuple[int, ...]) -> int:
    return max((r for r in range(1, round + 1) if r not in refused), default=0)


def evaluate(round: int, refused: tuple[int, ...]) -> dict:
    made = policy_after(round, refused)
    policy = {"name": f"policy_{made}", "n": 200, "samples": 64, "verdicts": {"correct": 9, "truncated": 1}}
    for key, value in {
        "pass@1": 0.3 + 0.12 * made,
        "pass@64": 0.9 + 0.02 * made,
        "majority@64": 0.5 + 0.1 * made,
    }.items():
        policy |= {key: value, f"{key}_ci": ci(value)}
    bins = []
    for b, size in enumerate(BIN_SIZES, 1):
        value = min(0.98, 0.9 - 0.2 * (b - 1) + 0.06 * made * b**0.5)
        bins.append({"bin": b, "n": size, "pass@1": value, "pass@1_ci": ci(value, 0.05)})
        if round:
            bins[-1]["gain"] = [0.06 * made, 0.04 * made, 0.08 * made]
            bins[-1]["gain_from_last_round"] = [0.06, 0.04, 0.08]
    figures = {"policy": policy, "fixed_bins": bins}
    if round:
        figures |= {
            "migration": migration(max(0.0, 0.7 - 0.2 * made)),
            "migration_last": migration(0.6),
            "migration_null": migration(0.9),
            "gain": {"from_round_0": [0.12 * made, 0.1 * made, 0.14 * made], "from_last_round": [0.12, 0.1, 0.14]},
        }
    return figures


def search(round: int, refused: tuple[int, ...]) -> dict:
    models = {
        "policy": f"policy_{policy_after(round - 1, refused)}",
        "prm": f"prm_{round}",
        "reviser": f"reviser_{round}",
        "plan": f"serve_{round}",
    }
    figures: dict = {"models": models}
    for i, key in enumerate(
        [
            "majority@64",
            "best_of_n_weighted@64",
            "best_of_n_weighted@16_base_verifier",
            "beam@16",
            "revise@16",
            "compute_optimal@16_oracle",
            "compute_optimal@16_probe",
        ]
    ):
        figures |= {key: 0.5 + 0.02 * i, f"{key}_ci": ci(0.5 + 0.02 * i)}
    figures["beam@16_tokens"] = 2345.5
    attempts = [0.4, 0.44, 0.47, 0.49, 0.5, 0.51, 0.51, 0.52]
    return {
        "search": figures,
        "reviser": {"model": models["reviser"], "pass@1_by_attempt": attempts, "control_by_attempt": [0.4] * 8},
    }


def plan(kind: str, round: int) -> dict:
    kinds = [
        {"kind": "best_of_n", "n": 16, "select": "weighted"},
        {"kind": "beam", "n": 16, "width": 4, "max_rounds": 40},
        {"kind": "revise", "length": 4, "chains": 4, "select": "majority", "context": 4},
    ]
    entries = [
        {
            "bin": b,
            "budget": n,
            "strategy": kinds[(b + n) % 3],
            "questions": 8,
            "score": (1 - 0.15 * b) * (1.0 if kind == "serve" else 0.004),
            "tokens": 30.0 * n,
            "borrowed": [],
        }
        for b in range(1, 6)
        for n in (4, 16)
    ]
    return {"schema": 1, "kind": kind, "models": {"policy": f"policy_{round - 1}"}, "entries": entries}


def curve(round: int) -> list[dict]:
    return [
        {"step": 10 * i, "loss": 2.0 / (i + round), "eval_loss": 2.2 / (i + round) if i % 2 == 0 else None}
        for i in range(1, 9)
    ]


def harvested(round: int) -> list[dict]:
    return [
        {
            "question_id": f"q{i}",
            "question": f"{i} +3 *2",
            "solution": f"{i} +3 ={i + 3}\nAnswer {i}",
            "answer": str(i),
            "bin": 1 + i % 5,
            "round": round,
            "votes": 1 + i % 4,
            "tokens": [1, 2, 3],
        }
        for i in range(20)
    ]


def figures_of(stage: str, round: int, refused: tuple[int, ...]) -> dict:
    match stage:
        case "evaluate":
            return evaluate(round, refused)
        case "search":
            return search(round, refused)
        case "sample":
            verdicts = {"correct": 3000, "incorrect": 9000, "unparsable": 100, "truncated": 30, "undecided": 0}
            return {"questions": 400, "solutions": 12800, "verdicts": verdicts, "pass@1_train": 0.31}
        case "train_prm":
            return {
                "model": f"prm_{round}",
                "auc_within_question": 0.9,
                "auc_within_question_base": 0.7,
                "auc_within_question_min": float("nan"),
                "curve": curve(round),
            }
        case "train_reviser":
            return {
                "trained": True,
                "trajectories": 900,
                "curve": curve(round),
                "checkpoints": [{"step": 10, "path": "c"}],
            }
        case "choose_reviser":
            return {
                "model": f"reviser_{round}",
                "chosen": {"step": 10, "pass@1_by_attempt": [0.4, 0.45]},
                "checkpoints": [],
            }
        case "calibrate":
            return {
                "trials": 100,
                "serve": plan("serve", round),
                "harvest": plan("harvest", round),
                "two_fold": [{"budget": 16, "questions": 80, "accuracy": 0.5, "verified": 1.0, "tokens": 800.0}],
            }
        case "harvest":
            return {"candidates": 9600, "kept": 20, "questions": 20, "step_verified": 0.97}
        case "distill":
            return {"trained": True, "examples": 20 * round, "curve": curve(round)}
        case "gate":
            return {
                "passed": round not in refused,
                "pass@1": [0.3, 0.4],
                "gain": [0.1, 0.08, 0.12],
                "pass@64": [0.9, 0.91],
                "pass@64_gain": [0.01, -0.01, 0.03],
            }
    return {}


def make_run(path: Path, rounds: int = 3, refused: tuple[int, ...] = (), recipe: dict | None = None) -> Path:
    """Rounds 0..`rounds`, all finished. The gate of the rounds in `refused` did not pass."""
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **(recipe or {})}, sort_keys=False))
    for r in range(rounds + 1):
        add_round(path, r, refused)
    return path


def add_round(path: Path, r: int, refused: tuple[int, ...] = ()) -> None:
    for i, stage in enumerate(ORDER if r else ("evaluate",)):
        folder = path / f"round_{r}" / stage
        folder.mkdir(parents=True)
        if stage == "harvest":
            pq.write_table(pa.Table.from_pylist(harvested(r)), folder / "harvest.parquet")
        ledger = Ledger(stage, r)
        role = {
            "label": "policy",
            "train_prm": "prm",
            "choose_reviser": "reviser",
            "train_reviser": "reviser",
            "search": "prm",
        }.get(stage, "policy")
        if stage.startswith("train") or stage == "distill":
            ledger.train(role, stage, parameters=1000, trained=50, tokens=50_000)
            pq.write_table(pa.Table.from_pylist(ledger.take()), folder / "ledger.parquet")
        else:
            for shard in range(2):
                ledger.charge(role, stage, parameters=1000, prompt=1000, cached=100, generated=20_000 * (i + 1))
                (folder / "shards" / f"{shard:05d}").mkdir(parents=True)
                pq.write_table(
                    pa.Table.from_pylist(ledger.take()), folder / "shards" / f"{shard:05d}" / "ledger.parquet"
                )
        manifest = {
            "format": FORMAT,
            "stage": stage,
            "round": r,
            "place": i,
            "of": len(ORDER) if r else 1,
            "counts": {},
            "files": {},
            "fingerprint": {},
            "figures": figures_of(stage, r, refused),
            "seconds": 10.0,
            "ranks": 1,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
