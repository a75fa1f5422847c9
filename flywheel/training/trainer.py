"""The adapter to TRL: `SFTTrainer` for both losses, with exact averages and safe checkpoints.

With `values.py` the module of `training/` that imports torch at its top.
It never sets torch's thread count: that is the launcher's (TRAPS: vLLM re-imports modules).
"""

from __future__ import annotations

import gc
import math
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from flywheel.ledger import Ledger
from flywheel.recipe import ModelSpec, TrainSpec
from flywheel.runs.files import read_json, write_json
from flywheel.training.checkpoints import (
    MARK,
    ROOM,
    Keep,
    TrainingError,
    TrainReport,
    conclude,
    copy_adapter,
    curve_of,
    digest,
    order,
    points,
    settle,
    share,
    standing,
    sums,
)
from flywheel.training.scores import PrmCollator, dtype, label_margins, on_cpu

LOGS_PER_EVAL = 4


class SftTrainer(SFTTrainer):
    """TRL's loss, summed over the global batch and divided by its trained tokens."""

    loss_is_scaled_for_ga = True  # divided by the items of all micro batches, so not by their number

    def items(self, batch: dict) -> torch.Tensor:
        """What the loss is a mean over: the tokens that are predicted."""
        return batch["labels"][:, 1:].ne(-100).sum()

    @staticmethod
    def collator(pad: int):
        return DataCollatorForLanguageModeling(pad_token_id=pad)

    @staticmethod
    def filler(row: dict) -> dict:
        """The row without any loss: fills the last validation batches, so that averages stay exact."""
        return {**row, "labels": [-100] * len(row["labels"])}

    def _get_num_items_in_batch(self, batch_samples, device):
        count = torch.stack([self.items(batch) for batch in batch_samples]).sum().to(device)
        return self.accelerator.reduce(count, "sum")

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """The exact mean over all items of all ranks; the stock loop averages the batches' means."""
        model = self.model_wrapped
        model.eval()
        sums = torch.zeros(2, device=self.args.device)
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            with torch.no_grad():
                loss = self.compute_loss(model, batch, num_items_in_batch=1)
            sums += torch.stack([loss.float() / self.accelerator.num_processes, self.items(batch).float()])
        loss, items = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": loss / items}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset))

    def log(self, logs, start_time=None):
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise TrainingError(
                    f"the {'training' if name == 'loss' else 'validation'} loss is {logs[name]} at step {self.state.global_step}: "
                    f"lower the learning rate (now {self.args.learning_rate:g})"
                )
        super().log(logs, start_time)

    def floating_point_ops(self, inputs):
        """The ledger counts FLOPs; the stock count walks over all modules at every step."""
        return 0

    def create_model_card(self, *args, **kwargs):
        """No card for a trainer's checkpoint: `flywheel.export` writes the one for the model."""

    def _send_telemetry(self):
        """No usage ping."""


def out_of_memory(error: BaseException) -> bool:
    """On a CPU torch has no type for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class PrmTrainer(SftTrainer):
    """Soft binary cross-entropy at the read positions, on the logits of two label tokens."""

    label_tokens: tuple[int, int]

    def items(self, batch: dict) -> torch.Tensor:
        return batch["weights"].sum()

    @staticmethod
    def collator(pad: int):
        return PrmCollator(pad)

    @staticmethod
    def filler(row: dict) -> dict:
        return {**row, "weights": [0.0] * len(row["weights"])}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        margins = label_margins(model, inputs, self.label_tokens)
        loss = binary_cross_entropy_with_logits(margins, inputs["values"], weight=inputs["weights"], reduction="sum")
        if num_items_in_batch is None:
            num_items_in_batch = self.accelerator.reduce(self.items(inputs), "sum")
        # the ranks' gradients are averaged, while `num_items_in_batch` counts all ranks' items
        return loss * self.accelerator.num_processes / num_items_in_batch


class _Timeline(TrainerCallback):
    """Logs, validates and saves at chosen steps, and makes each checkpoint safe to resume from."""

    def __init__(
        self, out: Path, steps: int, evals: int, validate: bool, mark: dict, state: PartialState, spent: float
    ):
        self.out, self.validate, self.mark, self.ranks = out, validate, mark, state
        self.evals = set(points(steps, evals))
        self.logs = self.evals | set(points(steps, evals * LOGS_PER_EVAL))
        self.started, self.spent = time.monotonic(), spent

    @property
    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.started

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = state.global_step in self.logs
        control.should_save = state.global_step in self.evals
        control.should_evaluate = control.should_save and self.validate

    def on_save(self, args, state, control, **kwargs):
        self.ranks.wait_for_everyone()
        if self.ranks.is_main_process:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            copy_adapter(checkpoint, self.out / "checkpoints" / f"step-{state.global_step}")
            write_json(checkpoint / MARK, {**self.mark, "seconds": self.seconds, "files": sums(checkpoint)})
        self.ranks.wait_for_everyone()


def fit(
    kind: type[SftTrainer],
    train: list[dict],
    validation: list[dict],
    *,
    base: str,
    model: ModelSpec,
    spec: TrainSpec,
    out: Path,
    seed: int,
    keep: Keep,
    role: str,
    ledger: Ledger,
    start: str | None = None,
    label_tokens: tuple[int, int] | None = None,
) -> TrainReport:
    """The training behind `train_sft` and `train_prm`, whose docstrings hold the contract."""
    if not train:
        raise TrainingError(f"no training example for the {role}")
    if keep != "last" and not validation:
        raise TrainingError(f"keep={keep!r} chooses by validation loss, but there is no validation example")
    out, seed = Path(out), seed % 2**31
    ranks = PartialState(cpu=on_cpu())
    (room,) = broadcast_object_list([read_json(out / ROOM) if ranks.is_main_process else None])
    if room:  # an earlier start ran out of memory
        spec = spec.model_copy(update={"micro_batch_size": min(spec.micro_batch_size, room["micro_batch_size"])})
    micro, accumulate = share(spec.batch_size, spec.micro_batch_size, ranks.num_processes)
    lengths = [len(row["input_ids"]) for row in train]
    indices = order(lengths, spec.batch_size, spec.epochs, seed)
    steps = len(indices) // spec.batch_size

    args = SFTConfig(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,  # `indices` hold all epochs
        train_sampling_strategy="sequential",
        learning_rate=spec.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(spec.warmup * steps),
        weight_decay=spec.weight_decay,
        optim="adamw_torch",
        seed=seed,
        use_cpu=on_cpu(),
        bf16=dtype() == "bfloat16",
        model_init_kwargs={"dtype": dtype(), "use_safetensors": True},
        gradient_checkpointing=not on_cpu(),  # costs a third of the speed; device memory is what is short
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,  # checked, never cut
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu(),
        ddp_find_unused_parameters=False,
        logging_nan_inf_filter=False,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",  # _Timeline says when
        save_total_limit=2,
        report_to="none",
        disable_tqdm=not (ranks.is_main_process and sys.stderr.isatty()),
    )
    zero = args.deepspeed_plugin
    mark = {
        # not the micro batch: it changes memory, not what is learned
        "fingerprint": digest(
            train,
            validation,
            base,
            model.model_dump(),
            spec.model_dump(exclude={"micro_batch_size"}, exclude_none=True),
            seed,
            keep,
            label_tokens,
        ),
        "sharding": zero
        and f"ZeRO-{zero.zero_stage} on {ranks.num_processes} processes",  # its checkpoints are cut by rank
    }

    def finished(report: TrainReport) -> TrainReport:
        if ranks.is_main_process:
            conclude(out, keep, report, mark["fingerprint"])
            ledger.train(role, "train", parameters=report.parameters, tokens=report.tokens)
            passes = sum(point["eval_loss"] is not None for point in report.curve)
            validated = passes * sum(len(row["input_ids"]) for row in validation)
            ledger.charge(role, "validate", parameters=report.parameters, scored=validated)
        return report

    done, resume, spent = broadcast_object_list(
        list(standing(out, mark) if ranks.is_main_process else (None, None, 0.0))
    )
    if done:
        return finished(done)

    tokenizer = AutoTokenizer.from_pretrained(base)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    args.eval_on_start = bool(validation) and resume is None
    timeline = _Timeline(out, steps, spec.evals, bool(validation), mark, ranks, spent)
    short = -len(validation) % (micro * ranks.num_processes)
    ranked = sorted(validation, key=lambda row: len(row["input_ids"]))
    trainer = kind(
        model=base,
        args=args,
        data_collator=kind.collator(pad),
        train_dataset=Dataset.from_list(train).select(indices),
        eval_dataset=Dataset.from_list(ranked + [kind.filler(ranked[-1])] * short) if ranked else None,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=model.lora_rank,
            lora_alpha=model.lora_alpha,
            target_modules=model.lora_targets,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        ),
        callbacks=[timeline],
    )
    if start:
        set_peft_model_state_dict(trainer.model, load_peft_weights(start, device="cpu"))
    trainer.label_tokens = label_tokens
    trainer.processing_class = None  # lest every checkpoint hold the tokenizer, and training change the model's config
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        smaller = next((m for m in range(micro // 2, 0, -1) if spec.batch_size % m == 0), None)
        if smaller is None:
            section = {"policy": "distill"}.get(role, role)
            raise TrainingError(
                f"out of memory at a micro batch of {micro}: lower {section}.max_length, or train on a larger device"
            ) from error
        write_json(out / ROOM, {"micro_batch_size": smaller})
        if ranks.num_processes > 1:  # the other ranks are in a collective that this one will not join
            raise TrainingError(
                f"out of memory at a micro batch of {micro}: the same command goes on with {smaller}, the batch stays {spec.batch_size}"
            ) from error
        trainer = None
    else:
        smaller = None
    if smaller:  # outside the handler: the traceback holds the tensors of the failed step
        gc.collect()
        torch.cuda.empty_cache()
        print(
            f"{role}: out of memory at a micro batch of {micro}; going on with {smaller}, the batch stays {spec.batch_size}",
            flush=True,
        )
        return fit(
            kind,
            train,
            validation,
            base=base,
            model=model,
            spec=spec,
            out=out,
            seed=seed,
            keep=keep,
            role=role,
            ledger=ledger,
            start=start,
            label_tokens=label_tokens,
        )
    report = None
    if ranks.is_main_process:
        curve, epochs_per_step = curve_of(trainer.state.log_history), spec.batch_size / len(train)
        checkpoints, best = settle(out, keep, curve, epochs_per_step)
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in trainer.model.parameters()]
        report = TrainReport(
            steps=steps,
            epochs=steps * epochs_per_step,
            train_loss=next(point["loss"] for point in reversed(curve) if point["loss"] is not None),
            curve=curve,
            checkpoints=checkpoints,
            best=best,
            tokens=sum(lengths[index] for index in indices),
            seconds=timeline.seconds,
            parameters_trained=sum(size for size, trained in sizes if trained),
            parameters=sum(size for size, _ in sizes),
        )
    (report,) = broadcast_object_list([report])
    return finished(report)
