"""LoRA training of the policy, the reviser and the PRM with TRL's `SFTTrainer`.

Nothing here sets torch's number of threads: the launcher does.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from torch.utils.cpp_extension import get_default_build_root
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig

from flywheel.ledger import pairs
from flywheel.models.weights import attention_width
from flywheel.runs.files import names_in, read_json, write_json
from flywheel.runs.malloc import keep_memory
from flywheel.training.checkpoints import (
    ROOM,
    Job,
    TrainReport,
    choose,
    conclude,
    curve_of,
    digest,
    points,
    resume_point,
    save_point,
)
from flywheel.training.examples import OutOfMemory, TrainingError, order, share
from flywheel.training.jit import clear_stale_locks
from flywheel.training.losses import SftTrainer
from flywheel.training.scores import dtype, on_cpu
from flywheel.training.stored import contents, lengths

LOGS_PER_EVAL = 4


class Schedule(TrainerCallback):
    """Logs, validates and saves at evenly spaced steps, and marks each checkpoint when it is complete.

    transformers' own `eval_steps` is a fixed interval plus the last step: 6 points in 31 steps would be
    6, 12, 18, 24, 30, 31 (an interval of 6 leaves a last one of 1), and 8 points in 9 steps would be only 5.
    """

    def __init__(self, job: Job, steps: int, validate: bool, mark: dict, ranks: PartialState, spent: float):
        self.job, self.validate, self.mark, self.ranks = job, validate, mark, ranks
        self.saves, self.logs = (points(steps, job.spec.evals * k) for k in (1, LOGS_PER_EVAL))
        self.started = time.monotonic() - spent

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def on_step_end(self, args, state, control, **kwargs):
        self.job.tell(state.global_step, state.max_steps)
        control.should_log = state.global_step in self.logs
        control.should_save = state.global_step in self.saves
        control.should_evaluate = control.should_save and self.validate

    def on_save(self, args, state, control, **kwargs):
        self.ranks.wait_for_everyone()
        if self.ranks.is_main_process:
            save_point(self.job.out, state.global_step, self.mark, self.seconds)
        self.ranks.wait_for_everyone()


def _config(job: Job, micro: int, accumulate: int, steps: int, show_progress: bool) -> SFTConfig:
    spec, cpu = job.spec, on_cpu()
    return SFTConfig(
        output_dir=str(job.out / "trainer"),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,  # the data set holds all epochs, in training order
        train_sampling_strategy="sequential",
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.scheduler,
        warmup_steps=math.ceil(spec.warmup * steps),
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        optim="adamw_torch",
        seed=job.seed,
        use_cpu=cpu,
        bf16=dtype(job.model.base) == "bfloat16",
        model_init_kwargs={"dtype": dtype(job.model.base), "use_safetensors": True},
        gradient_checkpointing=not cpu,  # a third slower, but GPU memory is scarce
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,  # `rows` checks lengths; nothing is truncated
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        ddp_find_unused_parameters=False,
        logging_nan_inf_filter=False,
        logging_strategy="no",  # `Schedule` decides when to log, validate and save
        save_strategy="no",
        save_total_limit=2,
        report_to="none",
        disable_tqdm=not show_progress,
    )


def _ranked(kind: type[SftTrainer], validation: Dataset, tokens: list[int], batch: int) -> Dataset | None:
    """The rows by their number of tokens, with fillers up to whole batches; None if there are none."""
    if not tokens:
        return None
    ranked = validation.select(sorted(range(len(tokens)), key=tokens.__getitem__))
    filler = [kind.filler(ranked[-1])] * (-len(tokens) % batch)
    return concatenate_datasets([ranked, Dataset.from_list(filler, features=ranked.features)]) if filler else ranked


def _trainer(
    kind: type[SftTrainer], args: SFTConfig, train: Dataset, validation: Dataset | None, job: Job
) -> SftTrainer:
    spec, tokenizer = job.model, AutoTokenizer.from_pretrained(job.model.base)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    trainer = kind(
        model=spec.base,
        args=args,
        data_collator=kind.collator(pad),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=spec.lora_rank, lora_alpha=spec.lora_alpha, target_modules=spec.lora_targets, task_type="CAUSAL_LM"
        ),
    )
    if job.start:
        set_peft_model_state_dict(trainer.model, load_peft_weights(job.start, device="cpu"))
    trainer.processing_class = None  # or checkpoints would hold the tokenizer and training would change the config
    trainer.remove_callback(PrinterCallback)
    return trainer


def with_deepspeed() -> bool:
    """Whether the launcher was told to train with DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether `error` is an out-of-memory error; on a CPU torch has no type for it, only the message."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _make_room(error: RuntimeError, job: Job, micro: int, world: int) -> None:
    """If memory ran out, write a smaller micro batch to disk for the next try; else raises `error` again.

    Raises TrainingError if there is no smaller one, and OutOfMemory if there are several ranks, since the others wait
    in a collective operation that this one will not join, or DeepSpeed, which starts only once in a process.
    """
    if not _out_of_memory(error):
        raise error
    failed, batch = f"out of memory at a micro batch of {micro}", job.spec.batch_size
    if micro == 1:
        section = {"policy": "distill"}.get(job.role, job.role)
        raise TrainingError(f"{failed}: lower {section}.max_length, or train on a larger device") from error
    smaller, _ = share(batch, micro // 2, world)
    line = f"{job.role}: {failed}; going on with {smaller}, the batch stays {batch}"
    write_json(job.out / ROOM, smaller)
    if world > 1 or with_deepspeed():
        raise OutOfMemory(line) from error
    print(line, flush=True)


def _report(trainer: SftTrainer, schedule: Schedule, epochs_per_step: float, tokens: int) -> TrainReport:
    steps, curve = trainer.state.global_step, curve_of(trainer.state.log_history)
    checkpoints, best = choose(schedule.job, schedule.saves, curve, epochs_per_step)
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in trainer.model.parameters()]
    return TrainReport(
        steps=steps,
        epochs=steps * epochs_per_step,
        train_loss=next(point["loss"] for point in reversed(curve) if point["loss"] is not None),
        curve=curve,
        checkpoints=checkpoints,
        best=best,
        tokens=tokens,
        seconds=schedule.seconds,
        parameters_trained=sum(size for size, trained in sizes if trained),
        parameters=sum(size for size, _ in sizes),
    )


def fit(
    kind: type[SftTrainer],
    train: Dataset,
    validation: Dataset,
    job: Job,
    labels: tuple[int, int] | None = None,
    held: Sequence[dict] = (),
) -> TrainReport:
    """Implements `train_sft` and `train_prm`; takes rows as `rows` and `stored` make them."""
    job = replace(job, seed=job.seed % 2**31)
    if with_deepspeed():
        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
        clear_stale_locks(root, os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"))
    spec, ranks = job.spec, PartialState(cpu=on_cpu())
    if on_cpu():
        keep_memory()
    main, world = ranks.is_main_process, ranks.num_processes
    (room,) = broadcast_object_list([read_json(job.out / ROOM) if main and ROOM in names_in(job.out) else None])
    micro, accumulate = share(spec.batch_size, min(spec.micro_batch_size, room or spec.micro_batch_size), world)
    tokens, checked, judged = lengths(train), lengths(validation), [len(row["input_ids"]) for row in held]
    indices = order(tokens, spec.batch_size, spec.epochs, job.seed)
    steps, epochs_per_step = len(indices) // spec.batch_size, spec.batch_size / len(train)
    args = _config(job, micro, accumulate, steps, show_progress=main and sys.stderr.isatty())
    # without the micro batch, which changes memory use but not the result; the base's content, wherever it lies, is in
    # the stage's fingerprint
    settings = spec.model_dump(exclude={"micro_batch_size"}, exclude_none=True)
    model = job.model.model_dump(exclude={"base", "revision"})
    zero = args.deepspeed_plugin  # its checkpoints are sharded by rank
    mark = {
        "fingerprint": digest(contents(train), contents(validation), model, settings, job.seed, job.keep, labels, held),
        "sharding": zero and f"ZeRO-{zero.zero_stage} on {world} processes",
    }
    report, resume, spent = broadcast_object_list([*resume_point(job.out, mark)] if main else [None] * 3)
    if report is None:
        args.eval_on_start = bool(checked) and resume is None
        ranked = _ranked(kind, validation, checked, args.per_device_eval_batch_size * world)
        trainer = _trainer(kind, args, train.select(indices), ranked, job)
        trainer.label_tokens = labels
        schedule = Schedule(job, steps, bool(checked), mark, ranks, spent)
        trainer.add_callback(schedule)
        try:
            trainer.train(resume_from_checkpoint=resume)
            if main:
                report = _report(trainer, schedule, epochs_per_step, sum(tokens[index] for index in indices))
            (report,) = broadcast_object_list([report])
            if held:  # rank 0 has chosen the adapter and written it
                report = replace(report, held=trainer.held_values(held, str(job.out / "adapter")))
        except RuntimeError as error:
            _make_room(error, job, micro, world)
            report = None
        if report is None:  # after the handler, whose error keeps the tensors of all its frames
            del trainer, schedule
            clear_device_cache(garbage_collection=True)
            return fit(kind, train, validation, job, labels, held)
    if main:
        conclude(job, report, mark["fingerprint"])
        size = {"parameters": report.parameters, "attention": attention_width(job.model.base)}
        attended = sum(pairs(0, tokens[index]) for index in indices)
        trained = report.parameters_trained
        job.ledger.train(job.role, "train", trained=trained, tokens=report.tokens, attended=attended, **size)
        times = sum(p["eval_loss"] is not None for p in report.curve)
        for read, passes, parameters in (
            (checked, times, report.parameters),
            (judged, 1, report.parameters),
            (judged, 1, report.parameters - trained),
        ):
            attended, size["parameters"] = passes * sum(pairs(0, length) for length in read), parameters
            job.ledger.charge(job.role, "validate", scored=passes * sum(read), attended=attended, **size)
    return report
