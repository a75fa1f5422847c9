"""Memory and time of each stage's reading side as the data grows.

    python -m eval.bench.growth --sizes 1000 4000 16000 64000 --samples 64 --tokens 300

A synthetic round of each size is written shard by shard: random tokens and texts, a tenth as many calibration and test
questions as training questions. Then each stage reads it in a fresh process as rank 0 does: its items, what one chunk's
work asks for, and its figures; a training makes its examples, and looks at each as the trainer does. No engine is
opened and nothing is trained. Prints a row for each stage: peak memory of the process, of which not mapped from files,
and CPU seconds, at each size.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from flywheel.recipe import Recipe, load
from flywheel.records import Answered, Grade, SampleScores, Solution, Split, StepValues
from flywheel.runs import manifest
from flywheel.runs.files import _bytes, _layout, encode
from flywheel.runs.run import Context, Run
from flywheel.runs.stage import Scheduled, Stage
from flywheel.runs.worker import chunks
from flywheel.search.plan import Trial
from flywheel.search.strategies import strategies
from flywheel.stages import ORDER, calibrate, distill, label, search, stages, train_head, train_prm, train_reviser
from flywheel.stages.shared import difficulties, judged, sampled
from flywheel.training.stored import contents, lengths

STEPS = 12  # of a solution
SPLITS = ("train", "calibrate", "validation", "test")
# of questions; the seed model's tokenizer has them
WORDS = ["+3", "+5", "+8", "+11", "+17", "-2", "-6", "-9", "-13", "*2", "*3", "*5", "*7", "*10"]
METHODS = 16  # of the search stage
MADE = {"train_prm": None, "train_reviser": train_reviser, "train_head": train_head, "distill": distill}


# ---- a synthetic run ----


def write_problems(folder: Path, questions: int) -> None:
    folder.mkdir(parents=True)
    sizes = dict(zip(SPLITS, (questions, questions // 10, 100, questions // 10)))
    number = 0
    for split, size in sizes.items():
        with open(folder / f"{split}.jsonl", "w") as file:
            for i in range(size):
                number += 1
                words = (WORDS[number // len(WORDS) ** place % len(WORDS)] for place in range(6))
                row = {"id": f"{split}-{i:06d}", "question": f"3 {' '.join(words)}", "answer": "7", "split": split}
                file.write(json.dumps(row) + "\n")


def make_recipe(root: Path, samples: int, tokens: int) -> Recipe:
    long = 8 * tokens + 1000
    return load(
        "recipes/chain.yaml",
        [
            f"problems.path={root / 'problems'}",
            "problems.limits={}",
            "problems.step_checker=null",
            f"sample={{per_question: {samples}, calibrate: {samples}, max_tokens: {2 * tokens}}}",
            f"engine.max_model_len={long}",
            "label.questions=0",
            f"reviser.samples={samples}",
            *(f"{section}.max_length={long}" for section in ("prm", "reviser", "distill", "head")),
            "harvest={keep: 4, vote: answer}",
            f"evaluate.samples={samples}",
            "track.mode=disabled",
        ],
    )


class Writer:
    """Writes the shards of one stage."""

    def __init__(self, root: Path, round: int, stage: str, tokens: int):
        self.root, self.at, self.stage, self.tokens = root, round, stage, tokens
        self.dir = manifest.stage_dir(root, round, stage)
        self.rng = np.random.default_rng([round, len(stage)])
        words = self.rng.integers(10, 99, (4096, 4 * tokens // STEPS // 3))
        self.texts = pa.array(["".join(f"{word} " for word in row) + "\n" for row in words])

    def shard(self, index: int, of: int, items: Sequence[str], files: dict[str, bytes]) -> None:
        folder = self.dir / "shards" / f"{index:05d}"
        folder.mkdir(parents=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        sums = {n: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in files.items()}
        about = {"of": of, "items": list(items), "counts": {}, "seconds": 0.0, "verdicts": {}, "files": sums}
        (folder / "shard.json").write_text(json.dumps(about))

    def solutions(self, items: Sequence[str], each: int, purpose: str) -> tuple[pa.Table, pa.Table]:
        """`each` solutions of every question and their grades; a question's share of right ones is random."""
        rows, rng = len(items) * each, self.rng
        questions = np.repeat(np.array(items), each)
        ids = [f"{q}/{purpose}/{i % each}" for i, q in enumerate(questions)]
        right = rng.random(rows) < np.repeat(rng.random(len(items)), each)
        per_step = self.tokens // STEPS
        tokens = pa.array(rng.integers(0, 2000, rows * STEPS * per_step))
        lists = pa.ListArray.from_arrays(np.arange(0, len(tokens) + 1, per_step, dtype=np.int32), tokens)
        texts = self.texts.take(pa.array(rng.integers(0, len(self.texts), rows * STEPS)))
        steps = pa.StructArray.from_arrays([texts, lists], ["text", "tokens"])
        columns = {
            "id": ids,
            "question_id": questions,
            "steps": pa.ListArray.from_arrays(np.arange(0, rows * STEPS + 1, STEPS, dtype=np.int32), steps),
            "finish": ["stop"] * rows,
            "answer": np.where(right, "7", (rng.integers(8, 20, rows)).astype(str)),
            "purpose": [purpose] * rows,
            "model": ["policy_0"] * rows,
            "draw": ids,
            "parent": pa.nulls(rows, pa.string()),
            "attempt": np.ones(rows, dtype=np.int64),
            "unread": np.zeros(rows, dtype=np.int64),
        }
        graded = {
            "solution_id": ids,
            "question_id": questions,
            "verdict": np.where(right, "correct", "incorrect"),
            "purpose": columns["purpose"],
            "rule": np.full(len(right), "number"),
        }
        return pa.table(columns, schema=_layout(Solution)[0]), pa.table(graded, schema=_layout(Grade)[0])

    def sampled(self, items: Sequence[str], chunk: int, parts: Sequence[tuple[int, str]], beside=None) -> None:
        """Solutions of every item: (number, purpose) in `parts`. beside: the other records of a chunk."""
        parted = chunks(items, chunk)
        for index, part in enumerate(parted):
            files = {}
            if parts:
                solutions, grades = zip(*(self.solutions(part, each, purpose) for each, purpose in parts))
                files["Solution.parquet"] = _bytes(pa.concat_tables(solutions))
                files["Grade.parquet"] = _bytes(pa.concat_tables(grades))
            for cls, rows in (beside(part) if beside else {}).items():
                files[f"{cls.__name__}.parquet"] = encode(cls, rows)
            self.shard(index, len(parted), part, files)

    def seal(self, figures: dict | None = None) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        stage = Stage(self.stage, (), (), train=dict)
        manifest.seal(self.root, Scheduled(self.at, stage, (), 0, 1), {}, figures or {}, 0.0, 1)


def write_run(root: Path, questions: int, samples: int, tokens: int) -> Recipe:
    """A finished round 0 and round 1, without adapters."""
    write_problems(root / "problems", questions)
    recipe = make_recipe(root, samples, tokens)
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    by_split = {split: [p.id for p in Run(root, recipe).problems(Split(split))] for split in SPLITS}
    train, calibrate_, test = by_split["train"], by_split["calibrate"], by_split["test"]
    chunk, tried = recipe.engine.chunk, strategies(recipe.calibrate)
    rng = np.random.default_rng(0)

    def labels(part: Sequence[str]) -> dict:
        values = (*rng.integers(0, 7, STEPS - 1) / 6, 1.0)
        rollouts = (*[6] * (STEPS - 1), 0)
        return {StepValues: [StepValues(f"{q}/sample/{i}", q, values, rollouts) for q in part for i in range(4)]}

    def trials(part: Sequence[str]) -> dict:
        rows = [
            Trial(q, 1 + i % 5, n, s, bool(rng.random() < 0.5), 1, 900) for i, q in enumerate(part) for n, s in tried
        ]
        return {Trial: rows, SampleScores: [SampleScores(q, tuple(rng.random(16))) for q in part]}

    def answers(part: Sequence[str]) -> dict:
        rows = [Answered(q, f"method {m}", bool(rng.random() < 0.5), 900) for q in part for m in range(METHODS)]
        return {Answered: rows, SampleScores: [SampleScores(q, tuple(rng.random(samples))) for q in part]}

    for round, stage, items, parts, beside in (
        (0, "evaluate", test, [(samples, "bin"), (samples, "evaluate"), (1, "greedy")], None),
        (1, "sample", [*train, *calibrate_], [(samples, "sample")], None),
        (1, "label", sorted(train), [], labels),
        (1, "calibrate", calibrate_, [], trials),
        (1, "harvest", train, [(4, "harvest")], None),
        (1, "gate", calibrate_, [(samples, "gate")], None),
        (1, "evaluate", test, [(samples, "evaluate"), (1, "greedy")], None),
        (1, "search", test, [(4, "revise"), (4, "parallel")], answers),
    ):
        writer = Writer(root, round, stage, tokens)
        writer.sampled(items, chunk, parts, beside)
        writer.seal({"passed": False} if stage == "gate" else {"probe_edges": [0.8, 0.6, 0.4, 0.2]})
    for stage, figures in (("distill", {"trained": True}), ("choose_reviser", {"chosen": None}), ("train_prm", {})):
        Writer(root, 1, stage, tokens).seal(figures)
    return recipe


# ---- one stage's process ----


def read(stage: str, ctx: Context) -> None:
    """What the stage's process reads for its first chunk, for its figures, or to train."""
    if stage in MADE:
        if stage == "train_prm":
            prompts, _ = train_prm.prompts_and_reader(ctx)
            problems = {p.id: p for p in ctx.problems(Split.TRAIN)}
            found = train_prm.labelled(ctx, prompts, problems)
            parts = found.fit, found.check
            repr(train_prm.held_samples(ctx, prompts, problems, found.held))  # as the trainer's fingerprint
        else:
            made = MADE[stage].made_examples(ctx)
            parts = made.split(made.figures["questions"][::10])
        for part in parts:
            lengths(part)
            contents(part)
        return
    chunk = next(iter(chunks(ctx.stage.items(ctx), ctx.chunk)), [])
    match stage:
        case "label":
            [label.chosen(ctx, question) for question in chunk]
        case "calibrate":
            [calibrate.known_right(ctx, question) for question in chunk]
            difficulties(ctx)
        case "harvest":
            [sampled(ctx, question) for question in chunk]
            difficulties(ctx)
        case "search":
            dict(judged(ctx, "evaluate", ctx.round - 1, "evaluate", chunk))
            search.oracle_bins(ctx)
    ctx.stage.finish(ctx)


def measure(root: Path, stage: str) -> dict[str, float]:
    """Peak memory (bytes; `own`: not mapped from files) and CPU seconds of the stage; call it in a fresh process."""
    own, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            status = Path("/proc/self/status").read_text()
            own[0] = max(own[0], int(status.partition("RssAnon:")[2].split()[0]) * 1024)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.process_time()
    found = next(s for s in stages(1) if s.name == stage)
    read(stage, Context(load(root / "recipe.yaml"), root, 1, found))
    over.set()
    watcher.join()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak, "own": own[0], "seconds": time.process_time() - started}


MEASURED = [stage for stage in ORDER if stage != "choose_reviser"]  # bounded by probe_questions


def measured(sizes: Sequence[int], samples: int, tokens: int, folder: str | None) -> Iterator[tuple[int, str, dict]]:
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            root = Path(scratch) / "run"
            started = time.monotonic()
            write_run(root, size, samples, tokens)
            stored = sum(path.stat().st_size for path in root.rglob("*.parquet"))
            print(f"{size} questions: {stored / 1e9:.2f} GB in {time.monotonic() - started:.0f} s", flush=True)
            for stage in MEASURED:  # forked from a server that has imported what a stage's process has, as in a run
                with multiprocessing.get_context("forkserver").Pool(1) as pool:
                    yield size, stage, pool.apply(measure, (root, stage))
            shutil.rmtree(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 4000, 16000, 64000], help="training questions")
    parser.add_argument("--samples", type=int, default=64, help="of a question")
    parser.add_argument("--tokens", type=int, default=300, help="of a solution")
    parser.add_argument("--folder", help="where the runs are written (default: the folder for temporary files)")
    args = parser.parse_args()
    multiprocessing.set_forkserver_preload(
        ["__main__", "torch", "transformers.models.auto.tokenization_auto", "datasets"]
    )
    table: dict[str, dict[int, dict]] = {}
    for size, stage, found in measured(args.sizes, args.samples, args.tokens, args.folder):
        table.setdefault(stage, {})[size] = found
        print(f"{size:7d}  {stage:14s} {json.dumps({k: round(v, 1) for k, v in found.items()})}", flush=True)
    print(f"\n{'MiB (own) CPU s':15s}" + "".join(f"{size:>24d}" for size in args.sizes))
    for stage, by_size in table.items():
        cells = [
            f"{found['peak'] / 2**20:.0f} ({found['own'] / 2**20:.0f}) {found['seconds']:.1f}"
            for found in by_size.values()
        ]
        print(f"{stage:15s}" + "".join(f"{cell:>24s}" for cell in cells))


if __name__ == "__main__":
    main()
