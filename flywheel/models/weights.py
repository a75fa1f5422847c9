"""Load models, tokenizers and adapters; merge an adapter into its base; turn a PRM into a classifier."""

from __future__ import annotations

import json
import math
import os
from copy import deepcopy
from pathlib import Path

from flywheel.errors import UserError
from flywheel.records import ModelRef

MAX_LORA_RANK = 512  # the largest max_lora_rank that vLLM accepts


class NotAModel(UserError, ValueError):
    """A path or name without a model, tokenizer or adapter."""


def load_tokenizer(base: str):
    """The tokenizer of a model directory or Hub name; code that comes with a model is never run. Raises NotAModel."""
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, base, "tokenizer")


def load_config(base: str):
    """The configuration of a model directory or Hub name. Raises NotAModel."""
    from transformers import AutoConfig

    return _load(AutoConfig, base, "model configuration")


def _load(kind, base: str, what: str, **options):
    if not os.path.isdir(base) and (base.startswith((".", "/")) or base.count("/") > 1):
        raise NotAModel(f"model.base: {base}: no such directory")  # else transformers would ask the Hub
    try:
        return kind.from_pretrained(base, trust_remote_code=False, **options)
    except Exception as error:  # OSError, ValueError, KeyError, JSON errors, errors of the tokenizers library
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise NotAModel(f"model.base: {base}: no {what} could be loaded: {reason[0]:.200}") from error


def check_length(base: str, wanted: int) -> None:
    """Raises ValueError if the model has fewer positions than `wanted`, the recipe's `engine.max_model_len`."""
    positions = getattr(load_config(base), "max_position_embeddings", None)
    if positions is not None and wanted > positions:
        raise ValueError(f"engine.max_model_len: {wanted} is more than the {positions} positions of {base}")


def parameters(ref: ModelRef) -> int:
    """The number of parameters of base and adapter, tied ones counted once. Reads only shapes, no weights."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(ref.base))
    count = sum(weight.numel() for weight in model.parameters())
    if ref.adapter is not None:
        adapter_config(ref.adapter)
        with safe_open(Path(ref.adapter) / "adapter_model.safetensors", "pt") as weights:
            names = weights.keys()
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    return count


def adapter_config(adapter: str) -> dict:
    """The configuration of a PEFT adapter directory. Raises NotAModel if a file is missing."""
    folder = Path(adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise NotAModel(f"{adapter}: not a LoRA adapter: {name} is missing")
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def load_merged(ref: ModelRef, dtype: str):
    """The base with its adapter merged in float32, then cast to `dtype`: a transformers model in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a model has few files
    model = _load(AutoModelForCausalLM, ref.base, "model", dtype=torch.float32, use_safetensors=True)
    if ref.adapter is not None:
        from peft import PeftModel

        adapter_config(ref.adapter)
        model = PeftModel.from_pretrained(model, ref.adapter).merge_and_unload()
    return model.to(getattr(torch, dtype)).eval()


def load_judge(ref: ModelRef, dtype: str):
    """The merged model as a token classifier whose two classes are the labels of `ref`.

    Its output matrix is the two rows of the LM head for the labels, so the softmax over the classes
    is the value that `Engine.score` returns.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    model = load_merged(ref, "float32")
    config = deepcopy(model.config)
    config.num_labels, config.tie_word_embeddings = 2, False
    judge = AutoModelForSequenceClassification.from_config(config)
    judge.base_model.load_state_dict(model.base_model.state_dict())
    with torch.no_grad():
        judge.score.weight.copy_(model.get_output_embeddings().weight[list(ref.labels)])
    return judge.to(getattr(torch, dtype)).eval()
