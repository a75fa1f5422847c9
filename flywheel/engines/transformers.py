"""Plain transformers `generate`, a batch of whatever waits: simple and right rather than quick."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig

from flywheel.engines.base import Backend, EngineDied, ModelRef, Sampling
from flywheel.engines.driver import Drawn, Driver, Reading, Served
from flywheel.engines.open import check_length, load_merged, load_tokenizer, parameters, usable_threads
from flywheel.ledger import Ledger
from flywheel.recipe import EngineSpec
from flywheel.records import Finish


def open_backend(spec: EngineSpec, models: Mapping[str, ModelRef], ledger: Ledger, seed: int, scratch: Path) -> Backend:
    """See `flywheel.engines.open.open_backend`."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        torch.set_num_threads(usable_threads())
    dtype = spec.dtype if spec.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    devices, engines = {}, {}
    for role, ref in models.items():
        key = (ref.base, ref.adapter)
        if key not in devices:
            check_length(ref.base, spec.max_model_len)
            model = load_merged(ref, dtype).to("cuda" if on_gpu else "cpu")
            devices[key] = TransformersDevice(model, load_tokenizer(ref.base), ref.name, spec.max_running)
        engines[role] = Served(role, ref.name, parameters(ref), spec.max_model_len, devices[key], ledger)
    return Driver(engines, list(devices.values()), seed)


LOGIT_ROWS = 1024  # positions whose whole vocabulary of logits is held at once: 0.6 GB at 150,000 words


class TransformersDevice:
    """One model in memory; see `flywheel.engines.driver.Device`. A step answers up to `batch` like requests."""

    one_pass = True

    def __init__(self, model, tokenizer, name: str, batch: int):
        self._model, self._name, self._batch = model, name, batch
        ends = model.generation_config.eos_token_id
        self._eos = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        model.generation_config = GenerationConfig()  # else the model's own top_k or penalties would apply
        self._waiting: list[tuple[asyncio.Future[Drawn], list[int], Sampling | Reading]] = []

    def submit(self, prompt: Sequence[int], ask: Sampling | Reading, adapter: None) -> asyncio.Future[Drawn]:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((future, list(prompt), ask))
        return future

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    @property
    def busy(self) -> bool:
        return any(not future.done() for future, _, _ in self._waiting)

    def step(self) -> None:
        waiting = [item for item in self._waiting if not item[0].done()]
        alike = lambda ask: ask if isinstance(ask, Sampling) else ask.labels  # noqa: E731
        ask = waiting[0][2]
        batch = [item for item in waiting if alike(item[2]) == alike(ask)][: self._batch]
        prompts = [prompt for _, prompt, _ in batch]
        try:
            with torch.inference_mode():
                drawn = self._sample(prompts, ask) if isinstance(ask, Sampling) else self._label(prompts, [ask for _, _, ask in batch])
        except Exception as error:
            raise EngineDied(f"transformers failed while it served {self._name}: {type(error).__name__}: {error}") from error
        for (future, _, _), one in zip(batch, drawn, strict=True):
            future.set_result(one)
        self._waiting = [item for item in waiting if not item[0].done()]

    def _padded(self, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        width = max(map(len, prompts))
        ids = [[self._pad] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = self._model.device
        return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}

    def _sample(self, prompts: Sequence[Sequence[int]], ask: Sampling) -> list[Drawn]:
        inputs, ends = self._padded(prompts), self._eos | ask.stop
        heat = {"temperature": ask.temperature, "top_p": ask.top_p, "top_k": 0} if ask.temperature > 0 else {}
        config = GenerationConfig(
            max_new_tokens=ask.max_tokens,
            do_sample=ask.temperature > 0,
            eos_token_id=sorted(ends) or None,
            pad_token_id=self._pad,
            **heat,
        )
        width = inputs["input_ids"].shape[1]
        return [self._drawn(row, ask) for row in self._model.generate(**inputs, generation_config=config)[:, width:].tolist()]

    def _drawn(self, row: list[int], ask: Sampling) -> Drawn:
        for i, token in enumerate(row):
            if token in self._eos or token in ask.stop:
                return Drawn(tuple(row[: i + 1]), Finish.STOP, token in self._eos)
        return Drawn(tuple(row), Finish.LENGTH, False)

    def _label(self, prompts: Sequence[Sequence[int]], asked: Sequence[Reading]) -> list[Drawn]:
        """In parts, so that the logits of all rows at all columns that any row reads stay within LOGIT_ROWS vocabularies."""
        rows = max(1, LOGIT_ROWS // len({len(prompt) - read for prompt, ask in zip(prompts, asked) for read in ask.reads}))
        parts = (slice(at, at + rows) for at in range(0, len(prompts), rows))
        return [one for part in parts for one in self._label_part(prompts[part], asked[part])]

    def _label_part(self, prompts: Sequence[Sequence[int]], asked: Sequence[Reading]) -> list[Drawn]:
        inputs, (good, bad) = self._padded(prompts), asked[0].labels
        width = inputs["input_ids"].shape[1]
        columns = [[width - len(prompt) + read - 1 for read in ask.reads] for prompt, ask in zip(prompts, asked)]
        read = sorted({column for row in columns for column in row})  # a vocabulary of logits for these alone
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        keep = torch.tensor(read, device=inputs["input_ids"].device)
        logits = self._model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=keep).logits.float()
        values = (logits[..., good] - logits[..., bad]).sigmoid().tolist()
        at = {column: i for i, column in enumerate(read)}
        return [Drawn((), Finish.LENGTH, False, 0, tuple(row[at[c]] for c in wanted)) for row, wanted in zip(values, columns)]

    def close(self) -> None:
        self._model, self._waiting = None, []
