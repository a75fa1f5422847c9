"""Estimate a run's cost before it starts: tokens, time and disk space by stage.

A stage that an earlier round has finished is estimated by its measured figures. Any other is computed from the recipe,
the number of questions, and `Rates`: measured on this machine by the rehearsal, or guessed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from flywheel.recipe import Recipe
from flywheel.runs import cgroup, manifest
from flywheel.runs.files import Damaged, read_json, write_json
from flywheel.runs.shards import shard_dirs
from flywheel.runs.stage import Scheduled

START = 3.0  # seconds to open a stage's engines or trainer, if not measured
CORE_SAMPLING, CORE_TRAINING = 2.2e10, 7e10  # FLOP/s of a CPU core with AVX-512, measured on a model of 0.9M parameters
GPU_SAMPLING, GPU_TRAINING = 2e13, 1e14
STORED = 4  # bytes for a sampled token, compressed
STAGE = 1.0  # seconds of a stage besides: its processes, checks and files
UNCOVERED = 0.4  # of the tokens of all draws that `harvest.extra` allows: the default recipe's first round
ENGINES = {"calibrate": 3, "search": 4}  # models that a stage opens, if more than one
RATES_VERSION = 5  # of what the rehearsal measures: others are not read
SHARED = 0.8  # speed of a process beside those on the other cores; a guess


@dataclass(frozen=True)
class Rates:
    """Speeds in tokens/s of one sampling process (`generate`, `read`) and of one rank's training (`train`).

    open, start: seconds to open an engine, and until a training does its first step. prompt, check, solution: mean
    tokens of a question's prompt, of the PRM's prompt, of a solution; bare: of the base's prompt, with its worked
    examples; 0: as `prompt`; steps: of a solution. right: tokens of a right
    solution, which is what later policies learn to write; 0: not known. train_memory, serve_memory: bytes of the
    largest training, and of a process with policy, PRM, reviser and base open. An unknown speed is NaN, memory 0.
    """

    open: float
    generate: float
    read: float
    start: float
    train: float
    prompt: float
    check: float
    solution: float
    steps: float
    right: float = 0
    bare: float = 0
    train_memory: float = 0
    serve_memory: float = 0
    measured: bool = True


@dataclass(frozen=True)
class Row:
    """`left`: fraction of the stage still to do; `tokens`, `seconds` and `bytes` are of the whole stage."""

    round: int
    stage: str
    state: str
    left: float
    tokens: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Work:
    """Nominal tokens of a stage: `prompt` tokens of all samples, most of which the prefix cache serves."""

    prompt: float = 0
    generated: float = 0
    read: float = 0  # scored by a PRM
    trained: float = 0

    @property
    def tokens(self) -> int:
        return int(self.prompt + self.generated + self.read + self.trained)

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values())))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * value for value in asdict(self).values()))


def planned(recipe: Recipe, rates: Rates, counts: dict[str, int], stage: str, round: int) -> Work:
    """What a stage computes, if later policies write as much as the base does where it is right; else nothing."""
    if rates.right and (round > 1 or (round == 1 and stage in ("distill", "gate", "evaluate"))):
        share = rates.right / rates.solution
        rates = replace(rates, solution=rates.right, steps=max(1.0, rates.steps * share))
    if rates.bare and (round == 0 or (round == 1 and stage in ("sample", "label", "calibrate", "harvest", "search"))):
        rates = replace(rates, prompt=rates.bare)
    train, calibrate, validation, test = (
        counts.get(split, 0) for split in ("train", "calibrate", "validation", "test")
    )
    sample, judged = Work(rates.prompt, rates.solution), Work(read=rates.check + rates.solution)
    example, longer = rates.prompt + rates.solution, rates.check + rates.solution
    labelled = min(train, recipe.label.questions or train) * recipe.label.solutions
    revisers = train * min(recipe.reviser.trajectories, recipe.reviser.samples / 2) * 0.75  # questions ever right
    probes = recipe.reviser.evals * min(validation, recipe.reviser.probe_questions) * recipe.reviser.probe_attempts
    kinds = set()
    for s in recipe.calibrate.strategies:  # all votes of best-of-N at one temperature share their draws
        options = {key: value for key, value in s.options.items() if (s.kind, key) != ("best_of_n", "select")}
        kinds.add((s.kind, s.max_budget, json.dumps(options, sort_keys=True)))
    tried = [
        strategy(kind, min(limit or budget, budget), rates, recipe)
        for kind, limit, _ in kinds
        # one beam search for each budget; of the others the largest, which holds the smaller ones' draws
        for budget in (recipe.calibrate.budgets if kind == "beam" else [max(recipe.calibrate.budgets)])
        if kind != "beam" or budget <= (limit or budget)
    ]
    at_harvest = [strategy(kind, recipe.harvest.budget, rates, recipe) for kind, _, _ in kinds if kind != "beam"]
    one_round = {
        "sample": lambda: sample * (train * recipe.sample.per_question + calibrate * recipe.sample.calibrate),
        "label": lambda: (
            Work(rates.prompt + rates.solution / 2, rates.solution / 2)
            * (labelled * (rates.steps - 1) * recipe.label.rollouts)
        ),
        "train_prm": lambda: Work(trained=labelled * longer * recipe.prm.epochs),
        "train_reviser": lambda: Work(
            trained=revisers * (example + rates.solution * recipe.reviser.context / 2) * recipe.reviser.epochs
        ),
        "choose_reviser": lambda: chain(recipe.reviser.probe_attempts, rates, recipe) * probes,
        "train_head": lambda: Work(
            trained=(train + calibrate) * rates.prompt * (recipe.head.epochs if recipe.head else 0)
        ),
        "calibrate": lambda: sum(tried, Work()) * calibrate,
        "harvest": lambda: (
            sum(at_harvest, Work()) * (train / len(at_harvest)) + sample * (train * recipe.harvest.extra * UNCOVERED)
        ),
        "distill": lambda: Work(trained=train * recipe.harvest.keep / 4 * example * recipe.distill.epochs * round),
        "gate": lambda: sample * (calibrate * recipe.sample.calibrate),
        "evaluate": lambda: sample * (test * recipe.evaluate.samples * (2 if round == 0 else 1)),
        "search": lambda: (
            (
                judged * (2 * recipe.evaluate.samples)  # by the PRM and by the base
                + strategy("beam", recipe.evaluate.budget, rates, recipe)
                + chain(recipe.evaluate.revise_attempts, rates, recipe) * (2 * recipe.evaluate.revise_attempts)
                + (sample + judged) * (2 * recipe.evaluate.budget)
            )
            * test
        ),
    }
    return one_round.get(stage, Work)()


def chain(attempts: int, rates: Rates, recipe: Recipe) -> Work:
    """One attempt of a revision chain, on average over a chain of `attempts`."""
    shown = sum(min(i, recipe.reviser.context) for i in range(attempts)) / attempts
    return Work(rates.prompt + shown * rates.solution, rates.solution)


def strategy(kind: str, budget: int, rates: Rates, recipe: Recipe) -> Work:
    """What a strategy spends on one question. An unknown kind counts as best-of-N."""
    sample, judged = Work(rates.prompt, rates.solution), Work(read=rates.check + rates.solution)
    match kind:
        case "greedy":
            return sample
        case "beam" | "dvts" | "particle":  # every step of every beam is a request of its own, and is scored
            steps = min(rates.steps, recipe.sample.max_steps)
            half = Work(prompt=rates.prompt + rates.solution / 2, read=rates.check + rates.solution / 2)
            return (half * steps + Work(generated=rates.solution)) * budget
        case "revise":
            return (chain(budget, rates, recipe) + judged) * budget
        case "adaptive":  # stops at about half of its budget
            return sample * (budget / 2)
    return (sample + judged) * budget


def parameters(base: str) -> int | None:
    """Number of parameters of a model directory, or of a Hub name in the cache; None if it is not known."""
    folder = Path(base)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(base, "config.json")
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    return sum(map(weights, folder.glob("*.safetensors"))) or by_config(read_json(folder / "config.json") or {})


def weights(path: Path) -> int:
    """The parameters in a safetensors file, by its header."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def by_config(config: dict[str, Any]) -> int | None:
    """The parameters of a decoder with a gated MLP, from its config, to some percent; None if a size is missing."""
    try:
        hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    except KeyError:
        return None
    head = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * head * (heads + config.get("num_key_value_heads", heads))
    embedded = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return embedded + layers * (attention + 3 * hidden * inner)


def guessed(recipe: Recipe) -> Rates:
    """Rates from the model's size and constants; solutions are taken to have half of `sample.max_tokens`."""
    size = parameters(recipe.model.base) or math.nan
    if Path("/dev/nvidia0").exists():
        generate, train = min(GPU_SAMPLING / (2 * size), 30_000), GPU_TRAINING / (6 * size)
    else:
        cores = len(os.sched_getaffinity(0))
        generate, train = CORE_SAMPLING / (2 * size), cores * CORE_TRAINING / (6 * size)
    solution = recipe.sample.max_tokens / 2
    steps = max(1.0, min(recipe.sample.max_steps, solution / 8))
    return Rates(
        START, generate, 5 * generate, START, train, solution / 4, solution / 4, solution, steps, measured=False
    )


def rates_file(key: dict[str, Any]) -> Path:
    """Where the rates measured under `key` are kept: in `flywheel` in XDG_CACHE_HOME, or in ~/.cache."""
    name = sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flywheel" / f"rates-{name}.json"


def measured(key: dict[str, Any]) -> Rates | None:
    """The rates kept under `key`; None if there are none, or they cannot be read."""
    try:
        found = read_json(rates_file(key))
        return Rates(**found) if found else None
    except (Damaged, OSError, RuntimeError, TypeError):  # RuntimeError: no home folder
        return None


def keep(key: dict[str, Any], rates: Rates) -> None:
    """Keep `rates` for later runs; where that cannot be done they are measured again."""
    try:
        rates_file(key).parent.mkdir(parents=True, exist_ok=True)
        write_json(rates_file(key), asdict(rates))
    except (OSError, RuntimeError) as error:
        print(f"the speeds measured cannot be kept for the next run ({error})", flush=True)


def cpu_name() -> str:
    """The CPU's model, and its number of cores that this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name} x {len(os.sched_getaffinity(0))}"


def estimate(
    recipe: Recipe, run: Path, plan: Sequence[Scheduled], counts: dict[str, int], rates: Rates, ranks: int, workers: int
) -> list[Row]:
    """One row per stage. A finished stage has its own figures, which also serve as the estimate for later rounds.

    ranks: processes of the launch; workers: sampling processes of each.
    """
    done = {scheduled.at: made for scheduled in plan if (made := manifest.load(run, *scheduled.at))}
    rows = []
    for scheduled in plan:
        r, stage = scheduled.round, scheduled.stage
        like = [made for (_, name), made in done.items() if name == stage.name and made["round"] > 0] or None
        made = done.get((r, stage.name))
        state, left = progress_of(manifest.stage_dir(run, r, stage.name), made)
        if made or like:
            source = made or like[-1]
            size = sum(file["bytes"] for file in source["files"].values())
            grown = 1.0 if made or stage.name != "distill" else r / source["round"]
            rows.append(Row(r, stage.name, state, left, int(source["tokens"] * grown), source["seconds"] * grown, size))
            continue
        work, many = planned(recipe, rates, counts, stage.name, r), ranks * workers // recipe.engine.tensor_parallel
        if stage.train:
            seconds, size = STAGE + rates.start + work.trained / (rates.train * ranks), adapter_bytes(recipe)
        else:
            spent = work.generated / rates.generate + work.read / rates.read
            opened = 0 if stage.shares else rates.open * ENGINES.get(stage.name, 1)
            seconds, size = STAGE + opened + spent / (many * (SHARED if many > 1 else 1)), STORED * work.tokens
        rows.append(Row(r, stage.name, state, left, work.tokens, seconds, size))
    return rows


def adapter_bytes(recipe: Recipe) -> float:
    return 12 * recipe.model.lora_rank * int((parameters(recipe.model.base) or 0) ** 0.5) * 8


def progress_of(directory: Path, made: dict[str, Any] | None) -> tuple[str, float]:
    """(state in words, fraction still to do) of a stage; `made` is its manifest, if finished."""
    if made:
        return "done", 0.0
    shards = shard_dirs(directory)
    if shards:
        of = (read_json(shards[0] / "shard.json") or {"of": len(shards)})["of"]
        return f"{len(shards)} of {of} shards", 1 - len(shards) / of
    return ("begun" if any((directory / name).exists() for name in manifest.SCRATCH) else "to do"), 1.0


def overview(
    recipe: Recipe, run: Path, plan: Sequence[Scheduled], counts: dict[str, int], rates: Rates, ranks: int, workers: int
) -> str:
    """The table of all stages and their cost, printed before the first stage."""
    rows = estimate(recipe, run, plan, counts, rates, ranks, workers)
    questions = ", ".join(f"{split} {count}" for split, count in counts.items())
    lines = [
        f"{run}: recipe {recipe.name}, to the end of round {max(row.round for row in rows)}, ranks: {ranks}",
        f"questions: {questions}; base: {recipe.model.base}",
        f"{'round':5s}  {'stage':14s}  {'state':16s}  {'tokens':>8s}  {'time':>8s}  {'disk':>8s}",
    ]
    for row in rows:
        lines.append(
            f"{row.round:5d}  {row.stage:14s}  {row.state:16s}  {short(row.tokens):>8s}"
            f"  {clock(row.seconds):>8s}  {short(row.bytes):>7s}B"
        )
    if any(row.left for row in rows):
        tokens, seconds, size = (
            sum(row.left * getattr(row, name) for row in rows) for name in ("tokens", "seconds", "bytes")
        )
        begun = any(row.state == "done" for row in rows)
        grounds = "from what this run measured, where it did" if begun else "rough: nothing is measured yet"
        if rates.measured:
            grounds = f"{'from what this run measured, else' if begun else 'by'} this machine's speed with the base"
        elif math.isnan(rates.generate):
            grounds += f"; the size of {recipe.model.base} is not known before its download, so no time is"
        lines.append(f"to do: about {short(tokens)} tokens, {clock(seconds)}, {short(size)}B ({grounds})")
    if rates.measured:
        lines.append(
            f"memory: up to {short(rates.train_memory)}B to train, {short(rates.serve_memory)}B to search"
            + (f" in each of {workers} processes" if workers > 1 else "")
        )
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed, there = here * max(workers * rates.serve_memory, rates.train_memory), cgroup.memory()
        if needed > there:
            lines.append(
                f"memory: {short(needed)}B are needed together and {short(there)}B there:"
                " lower engine.workers, engine.kv_cache_mb or a training's micro_batch_size"
            )
    return "\n".join(lines)


def short(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def clock(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
