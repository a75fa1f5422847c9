"""The recipe: all settings of a run, typed and strict, from YAML and command-line overrides.

An unknown key is an error that names the nearest known one. A stage's fingerprint holds only the
sections that it reads (`Stage.sections`), so changes elsewhere do not invalidate finished work.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from flywheel.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
T = TypeVar("T")
# those of transformers that take no arguments of their own and heed `warmup`
Scheduler = Literal["cosine", "linear", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"]
Pair = Annotated[
    tuple[T, T], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]  # YAML has lists


class Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in JSON and Python."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class RecipeError(UserError):
    """A faulty recipe; the message is one line with the key, what is wrong and the fix."""


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _one_group(pattern: str) -> str:
    try:
        if re.compile(pattern).groups == 1:
            return pattern
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from None
    raise ValueError("a regular expression with one group wanted")


OneGroup = Annotated[str, AfterValidator(_one_group)]
Gold = Annotated[str, AfterValidator(lambda pattern: pattern if pattern == "boxed" else _one_group(pattern))]
SplitName = Literal["train", "calibrate", "validation", "test"]


class TaskSpec(Spec):
    """A task of reasoning-gym, and how many questions each split gets of it."""

    task: str  # its name in reasoning-gym
    name: str | None = None  # the level of its questions; the task's name if None
    config: dict[str, Any] = {}  # its knobs
    question: OneGroup | None = None  # regular expression whose one group is the question to ask; None: the whole text
    train: Annotated[int, Field(ge=0)] = 0
    calibrate: Annotated[int, Field(ge=0)] = 0
    validation: Annotated[int, Field(ge=0)] = 0
    test: Annotated[int, Field(ge=0)] = 0

    @property
    def level(self) -> str:
        return self.name or self.task


class ProblemSpec(Spec):
    """The problem set. `limits` takes the first n questions of a split (0: all)."""

    format: Literal["jsonl", "datasets", "reasoning_gym"] = "jsonl"
    path: str = ""  # file or folder; for `datasets` also a name on the Hub
    config: str | None = None  # of a data set on the Hub
    revision: str | None = None  # of a data set on the Hub
    tasks: list[TaskSpec] = []  # of reasoning-gym
    seed: int = 0  # of reasoning-gym's questions
    # field name here -> there, e.g. {question: problem}; columns are joined by "{Body} {Question}", `{tests[0]}` is the
    # first of a column of lists; the answer may be a list of columns, which makes a JSON object of them
    fields: dict[str, str | Annotated[list[str], Field(min_length=1)]] = {}
    splits: dict[SplitName, str | Share] = {}  # split here -> name there, or the share to draw
    # cuts the gold answer out of the answer field: its last match, or the last \boxed{}; None: the whole field
    answer: Gold | None = None
    limits: dict[SplitName, Annotated[int, Field(ge=0)]] = {}
    checker: str = "flywheel.problems.grading:same_answer"  # module:function(gold, answer) -> bool
    step_checker: str | None = None  # module:function(question, solution text) -> bool, reported only
    check_seconds: Annotated[float, Field(gt=0)] = 5.0
    check_workers: Positive = 1
    skip_long: bool = False  # leave out and count questions that do not fit the model, instead of refusing the run

    @model_validator(mode="before")
    @classmethod
    def _own_checker(cls, data: Any) -> Any:
        """reasoning_gym's answers are judged by its tasks' scorers, no other's are: a stored recipe names it."""
        own = "flywheel.problems.gym:right"
        if not isinstance(data, dict):
            return data
        if data.get("format") == "reasoning_gym":
            return {"checker": own, **data}
        return {key: value for key, value in data.items() if (key, value) != ("checker", own)}

    @model_validator(mode="after")
    def _place(self) -> ProblemSpec:
        gym = self.format == "reasoning_gym"
        if not (self.tasks if gym else self.path):
            raise ValueError(f"problems.{'tasks' if gym else 'path'}: missing; problems.format {self.format} needs it")
        levels = [task.level for task in self.tasks]
        if twice := {level for level in levels if levels.count(level) > 1}:
            raise ValueError(f"problems.tasks: two are called {min(twice)}; give one another `name`")
        for split in get_args(SplitName) if gym else ():
            if not any(getattr(task, split) for task in self.tasks):
                raise ValueError(f"problems.tasks: no task has {split} questions")
        return self


class ModelSpec(Spec):
    """The frozen base of the run."""

    base: str  # a directory, or a name on the Hub
    revision: str | None = None  # branch, tag or commit, of a name on the Hub
    lora_rank: Positive = 16
    lora_alpha: Positive = 32
    lora_targets: str | list[str] = "all-linear"


class EngineSpec(Spec):
    # `vllm` in this process, `server` for those of `servers`, or module:function of another engine (see
    # `flywheel.models.backend.open_backend`)
    kind: Annotated[str, Field(pattern=r"^(vllm|server|[\w.]+:\w+)$")] = "vllm"
    # `http://host:port` of every `vllm serve` (docs/gpus_and_nodes.md); may change during a run
    servers: list[Annotated[str, Field(pattern=r"^https?://[^/]+$")]] = []
    # How LoRA adapters are served. merged: each is merged into the base, one engine per model; runtime: one engine
    # serves the base with all its adapters; auto: merged on a CPU, runtime on a GPU.
    adapters: Literal["auto", "merged", "runtime"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: Positive = 1024
    kv_cache_mb: Positive = 256  # KV cache per engine; only on a CPU
    gpu_memory: Share = 0.9  # fraction of the GPU's memory for all engines together
    max_running: Positive = 256  # sequences decoded concurrently; of servers: on each, for each rank
    # questions a shard: what a process draws at a time; 0: a 256th of the stage's, 8 to 64
    chunk: Annotated[int, Field(ge=0)] = 0
    # sampling processes per rank; 0: one per core on a CPU with a small model, else one
    workers: Annotated[int, Field(ge=0)] = 0
    # devices that hold one engine together, for a model larger than one: every k-th rank of a host samples, on its own
    # device and those of the next k-1 ranks
    tensor_parallel: Positive = 1
    # CPU threads of a rank, shared by its sampling processes, and of its trainings; 0: OMP_NUM_THREADS if it is set,
    # and one for the training of a tiny model. Never more than affinity and the cgroup's CPU quota allow.
    threads: Annotated[int, Field(ge=0)] = 0


class ExampleSpec(Spec):
    """A worked example. With a `level` (a task of reasoning_gym, MATH's level) only questions of it are shown it."""

    question: str
    solution: str
    level: str = ""


class PromptSpec(Spec):
    chat: bool = False
    system: str | None = None
    solve: str
    check: str
    again: str | None = None  # between two attempts of a revision chain; with chat, None takes the template's turns
    chat_template_kwargs: dict[str, Any] = {}  # variables of the chat template, e.g. {enable_thinking: false}
    step: str = "\n"
    stop: list[Annotated[str, Field(min_length=1)]] = []  # texts that end a solution, besides EOS
    # how an answer is found: `boxed`, `hashes`, `answer_is`, `code`, a regular expression with one group, or a list
    # of such rules in order (see `find` in problems/extract.py)
    answer: str | Annotated[list[str], Field(min_length=1)] = "boxed"
    end_at_answer: bool = True  # a solution ends with the step that holds its answer
    examples: list[ExampleSpec] = []  # worked examples, shown to the base alone: what it learns replaces them


class SampleSpec(Spec):
    per_question: Positive = 16  # samples per training question
    calibrate: Positive = 64  # samples per calibration question, also for the new policy in the gate
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: all tokens
    min_p: Share = 0.0  # tokens less probable than this share of the most probable one's are never drawn
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0  # of tokens in prompt or answer; 1: none
    max_tokens: Positive = 96
    max_steps: Positive = 40


class LabelSpec(Spec):
    """Monte Carlo labels (Snell et al., appendix D)."""

    questions: Annotated[int, Field(ge=0)] = 0  # 0: all training questions
    prefer: Pair[Share] = (0.0, 1.0)  # questions with a pass rate in this range are labelled first
    solutions: Positive = 4  # sampled solutions to label per question
    rollouts: Positive = 8  # per distinct step prefix
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1  # fraction of the labelled questions


class TrainSpec(Spec):
    start: Literal["policy"] | None = None  # adapter to start from: the last policy's; None: a fresh one on the base
    epochs: Annotated[float, Field(gt=0)] = 3
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    batch_size: Positive = 32  # global: over all ranks and accumulation steps
    micro_batch_size: Positive = 32  # sequences per device and forward pass
    evals: Positive = 8  # number of validation points
    warmup: Share = 0.05  # fraction of the steps
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    scheduler: Scheduler = "cosine"  # of the learning rate, by transformers' name
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # longer gradients are clipped; 0: none is
    max_length: Positive = 1024


Aggregate = Literal["last", "min", "product", "mean", "odds"]


class PublishedSpec(Spec):
    """A published PRM, a rival of the round's own: it judges the same solutions, and nothing is trained by it."""

    model: str  # directory, or name on the Hub
    format: Literal["math_shepherd", "rlhflow", "qwen", "skywork"]  # how it reads a solution: models/published.py
    aggregate: Aggregate = "min"


class PrmSpec(TrainSpec):
    labels: Pair[str] = ("+", "-")  # good, bad: single tokens
    min_examples: Positive = 16  # labelled solutions to train on; with fewer the round has no PRM, and the base judges
    target: Literal["value", "progress", "ratio"] = (
        "value"  # the label of a step: see `targets` in training/examples.py
    )
    aggregate: Aggregate = "last"
    published: PublishedSpec | None = None


class ReviserSpec(TrainSpec):
    min_examples: Positive = 16  # trajectories to train on; with fewer the round has no reviser
    samples: Positive = 16  # samples per question to build trajectories from
    trajectories: Positive = 8  # per question, at most
    context: Positive = 4  # attempts in the prompt, at most
    probe_questions: Positive = 40  # validation questions for choosing the checkpoint
    probe_attempts: Positive = 4  # length of the revision chains for choosing the checkpoint
    choose: Literal["level", "change"] = "level"  # checkpoint by its attempts' pass@1, or by how much revising adds


class HeadSpec(TrainSpec):
    epochs: Annotated[float, Field(gt=0)] = 6


class StrategySpec(BaseModel):
    """A strategy to try in calibration; other keys are its options, which `search/strategies.py` checks."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    kind: str
    max_budget: Positive | None = None  # larger ones of `calibrate.budgets` are not tried; None: all are

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra)


class CalibrateSpec(Spec):
    strategies: Annotated[list[StrategySpec], Field(min_length=1)]
    budgets: Annotated[list[Positive], Field(min_length=1)]  # numbers of generated final answers
    bins: Positive = 5
    edges: list[Share] = [0.8, 0.6, 0.4, 0.2]  # edges of the fixed bins on pass@1, descending


class HarvestSpec(Spec):
    budget: Positive = 16
    keep: Positive = 4  # traces per question, at most
    vote: Literal["answer", "trace"] = "answer"  # what independent draws vote for: their answer, or their very text
    min_votes: Positive = 2  # draws that must agree: what was drawn once is often luck
    extra: Annotated[int, Field(ge=0)] = 0  # more samples, at most, until a question has `min_votes` right ones
    balance: Annotated[float, Field(ge=1)] = 3.0  # a bin's limit, in units of the mean size of non-empty bins


class EvaluateSpec(Spec):
    samples: Positive = 64  # per test question
    budget: Positive = 16  # of the searches
    probe: Positive = 4  # samples that predict a question's bin
    revise_attempts: Positive = 8  # number of attempts in pass@1 by attempt
    bootstrap: Positive = 2000  # resamples


class TrackSpec(Spec):
    project: str = "flywheel"
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"


class Recipe(Spec):
    name: str
    seed: int = 0
    problems: ProblemSpec
    model: ModelSpec
    engine: EngineSpec = EngineSpec()
    prompts: PromptSpec
    sample: SampleSpec = SampleSpec()
    label: LabelSpec = LabelSpec()
    prm: PrmSpec = PrmSpec()
    reviser: ReviserSpec = ReviserSpec()
    head: HeadSpec | None = None  # guesses a question's difficulty from the question alone; None: none is trained
    calibrate: CalibrateSpec
    harvest: HarvestSpec = HarvestSpec()
    distill: TrainSpec = TrainSpec(epochs=3)
    evaluate: EvaluateSpec = EvaluateSpec()
    track: TrackSpec = TrackSpec()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for fault in self._faults():
            raise ValueError(fault)
        return self

    def _faults(self) -> Iterator[str]:
        """Contradictions between keys, one line per fault."""
        edges, bins, budgets = self.calibrate.edges, self.calibrate.bins, self.calibrate.budgets
        if len(edges) != bins - 1 or any(a <= b for a, b in itertools.pairwise(edges)):
            yield f"calibrate.edges: {bins - 1} falling numbers wanted, got {edges}"
        for key in ("harvest", "evaluate"):
            if (budget := getattr(self, key).budget) not in budgets:
                yield f"{key}.budget: {budget} is not among calibrate.budgets {budgets}; a plan has no strategy for it"
        for key in ("budget", "probe"):
            if self.evaluate.samples < (least := getattr(self.evaluate, key)):
                yield f"evaluate.samples: {self.evaluate.samples} is fewer than evaluate.{key} {least}"
        if self.prompts.again is None and not self.prompts.chat:
            yield "prompts.again: missing, the text between two attempts; only with prompts.chat it can be left out"
        if self.engine.tensor_parallel > 1 and self.engine.workers > 1:
            yield "engine.workers: 1 with engine.tensor_parallel; the devices hold one engine"
        if (self.engine.kind == "server") != bool(self.engine.servers):
            yield "engine.servers: the addresses of engine.kind server, which needs them and which alone has them"
        if self.engine.kind == "server" and self.engine.adapters == "merged":
            yield "engine.adapters: a server has adapters at run time only; leave the key out"
        if self.sample.max_tokens >= self.engine.max_model_len:
            yield "sample.max_tokens: must be below engine.max_model_len"
        largest = {s.kind: 0 for s in self.calibrate.strategies}
        for s in self.calibrate.strategies:
            largest[s.kind] = max(largest[s.kind], s.max_budget or max(budgets))
            if s.max_budget is not None and s.max_budget < min(budgets):
                yield (
                    f"calibrate.strategies: {s.kind} with max_budget {s.max_budget} is never tried;"
                    f" the smallest of calibrate.budgets is {min(budgets)}"
                )
        if largest.get("best_of_n", 0) < max(budgets):
            at = f" at budget {max(budgets)}" if "best_of_n" in largest else ""
            yield (
                f"calibrate.strategies: best_of_n is missing{at};"
                " a round without a reviser has nothing else, and all else is measured against it"
            )
        revising = [s.options.get("context", 4) for s in self.calibrate.strategies if s.kind == "revise"]
        if any(isinstance(shown, int) and shown > self.reviser.context for shown in revising):
            yield f"calibrate.strategies: revise shows more attempts than reviser.context {self.reviser.context}"
        fitting = {"progress": ("product", "min"), "ratio": ("odds", "min")}.get(self.prm.target)
        if fitting and self.prm.aggregate not in fitting:
            yield (
                f"prm.aggregate: {self.prm.aggregate} does not sum up a PRM of prm.target {self.prm.target},"
                f" which judges each step alone; {' or '.join(fitting)} does"
            )
        if self.reviser.choose == "change" and self.reviser.probe_attempts < 2:
            yield "reviser.probe_attempts: 2 or more wanted for reviser.choose change"
        if self.label.prefer[0] > self.label.prefer[1]:
            yield f"label.prefer: a rising pair wanted, got {list(self.label.prefer)}"
        for key, spec in self.trainings.items():
            if spec.batch_size % (micro := spec.micro_batch_size):
                yield f"{key}.batch_size: {spec.batch_size} is not a multiple of {key}.micro_batch_size {micro}"

    @property
    def trainings(self) -> dict[str, TrainSpec]:
        """The sections of the trainings, by key."""
        every = {"prm": self.prm, "reviser": self.reviser, "head": self.head, "distill": self.distill}
        return {key: spec for key, spec in every.items() if spec}


def load(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `section.key=value` overrides (values are YAML).

    A recipe that `extends` another file, relative to its own, says only what differs: sections are merged key by key.
    Raises RecipeError, naming the file and the key.
    """
    data = _read(Path(path))
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise RecipeError(f"override {item!r}: write section.key=value")
        try:
            _set(data, key.split("."), yaml.load(value, Loader))
        except yaml.YAMLError:
            raise RecipeError(f"override {item!r}: the value is not YAML") from None
    return parse(data, str(path))


def _read(path: Path, extending: tuple[Path, ...] = ()) -> dict:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        named = f"{extending[-1]}: extends: {path}" if extending else str(path)
        raise RecipeError(f"{named}: no such recipe") from None
    except (UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, got {type(data).__name__}")
    if (other := data.pop("extends", None)) is None:
        return data
    if not isinstance(other, str) or path in extending:
        raise RecipeError(f"{path}: extends: the path of another recipe wanted, got {other!r}")
    merged = _read(path.parent / other, (*extending, path))
    for section, value in data.items():
        both = isinstance(value, dict) and isinstance(merged.get(section), dict)
        merged[section] = {**merged[section], **value} if both else value
    return merged


def parse(data: dict, source: str = "recipe") -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_one_line(error)}") from None


def _set(data: dict, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if data.get(key) is None:  # an optional section that a stored recipe leaves out is null in it
            data[key] = {}
        data = data[key]
        if not isinstance(data, dict):
            raise RecipeError(f"override {'.'.join(keys)}: {key} is not a section")
    data[keys[-1]] = value


def _one_line(error: ValidationError) -> str:
    """One fault as `key: what is wrong`: the first unknown key, with the nearest known one, else the first fault."""
    faults = error.errors()
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    parts = [str(part) if str(part).strip() and str(part).isprintable() else repr(part) for part in fault["loc"]]
    where, more = ".".join(parts), f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        near = nearest_key(where)
        return f"{where}: unknown key" + (f"; did you mean {near}?" if near else "") + more
    if not where:
        return fault["msg"].removeprefix("Value error, ") + more
    return f"{where}: {fault['msg']} (got {fault.get('input')!r:.60})" + more


def nearest_key(written: str) -> str | None:
    """The known key nearest to `written`, else the one whose last part is nearest to its last part, else None."""
    known = known_keys()
    if near := difflib.get_close_matches(written, known, 1, 0.5):
        return near[0]
    last = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = difflib.get_close_matches(written.rpartition(".")[2], list(last), 1, 0.6)
    return last[near[0]] if near else None


def known_keys() -> list[str]:
    """Every dotted key of the schema."""
    keys = []
    for section, info in Recipe.model_fields.items():
        keys.append(section)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += [f"{section}.{key}" for key in info.annotation.model_fields]
    return keys
