"""TRL's trainer with flywheel's losses: exact means over the global batch, whatever the ranks and micro batches."""

from __future__ import annotations

import math
from functools import partial

import torch
from accelerate import PartialState
from peft import load_peft_weights, set_peft_model_state_dict
from peft.utils.integrations import gather_params_ctx
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from flywheel.training.examples import TrainingError
from flywheel.training.scores import PrmCollator, label_margins, on_cpu, values_of


class SftTrainer(SFTTrainer):
    """TRL's loss, summed over the global batch and divided by its number of trained tokens."""

    loss_is_scaled_for_ga = True  # already divided by the items of all micro batches: do not divide by their number

    def items(self, batch: dict) -> torch.Tensor:
        """The denominator of the loss, a scalar: the number of predicted tokens in the batch."""
        return batch["labels"][:, 1:].ne(-100).sum()

    @staticmethod
    def collator(pad: int):
        return DataCollatorForLanguageModeling(pad_token_id=pad)

    @staticmethod
    def filler(row: dict) -> dict:
        """A copy of the row that contributes no loss, to fill up the last validation batches."""
        return {**row, "labels": [-100] * len(row["labels"])}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """On a CPU, logits at the trained positions only.

        TRL's chunked head saves memory, which is what a GPU lacks. With 135M parameters on two CPU cores it took a
        third of a step, for entropy and accuracy too, which nobody reads.
        """
        if not on_cpu():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        at = labels.ne(-100).any(0).nonzero().squeeze(1)
        texts = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        logits = model(**texts, logits_to_keep=at, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), labels[:, at].flatten(), reduction="sum")
        return loss * self.accelerator.num_processes / num_items_in_batch

    def _get_num_items_in_batch(self, batch_samples, device):
        count = torch.stack([self.items(batch) for batch in batch_samples]).sum().to(device)
        return self.accelerator.reduce(count, "sum")

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """The exact mean loss over all items of all ranks; the stock loop averages the means of batches."""
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
        for key, name in (("loss", "training"), ("eval_loss", "validation")):
            if not math.isfinite(logs.get(key, 0.0)):
                raise TrainingError(
                    f"the {name} loss is {logs[key]} at step {self.state.global_step}: "
                    f"lower the learning rate (now {self.args.learning_rate:g})"
                )
        super().log(logs, start_time)

    def floating_point_ops(self, inputs):
        """Not needed: the ledger counts FLOPs. The stock count takes 14 ms per micro batch with 24 layers."""
        return 0

    def create_model_card(self, *args, **kwargs):
        """Disabled for checkpoints: `flywheel.export` writes the model card."""

    def _send_telemetry(self):
        """Disabled."""


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
        # the ranks' gradients are averaged, while `num_items_in_batch` counts all ranks' items
        return loss * self.accelerator.num_processes / num_items_in_batch

    def held_values(self, rows: list[dict], adapter: str) -> list[list[tuple[float, ...]]]:
        """The values of `rows` after the training: with the weights of `adapter`, and with the base alone.

        By all ranks and the trained model: the base may be divided among the ranks, too large for one of them.
        """
        ranks, args = PartialState(), self.args
        with gather_params_ctx([p for p in self.model.parameters() if p.requires_grad]):
            set_peft_model_state_dict(self.model, load_peft_weights(adapter, device="cpu"))
        read = partial(
            values_of, self.model_wrapped, rows, self.label_tokens, args.per_device_eval_batch_size, args.device,
            ranks.process_index, ranks.num_processes,
        )  # fmt: skip
        ours = read()
        with self.model.disable_adapter():
            return [ours, read()]
