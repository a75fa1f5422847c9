"""Open the engines of a stage: which adapter, which weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from flywheel.errors import UserError
from flywheel.ledger import Ledger
from flywheel.models.engine import Backend
from flywheel.problems.grading import load_function
from flywheel.recipe import EngineSpec
from flywheel.records import ModelRef


class NotAModel(UserError, ValueError):
    """A path or name that holds no model, no tokenizer or no adapter; one line."""


def open_backend(spec: EngineSpec, models: Mapping[str, ModelRef], ledger: Ledger, seed: int, scratch: Path) -> Backend:
    """Open one engine for each role (or other key) of `models`; the ledger's rows carry the key.

    Two keys with the same base and adapter share one engine, unless only one has labels (vLLM on a
    CPU: a judge is another model there). `scratch` holds merged
    weights while the engines start. The caller closes the backend. Raises NotAModel for a
    path that is no model, ValueError where the recipe and the model do not fit, EngineDied
    where the engine does not start.
    """
    if spec.kind == "vllm":
        from flywheel.models.vllm import open_backend as opened
    else:
        opened = load_function(spec.kind, "engine.kind")
    return opened(spec, models, ledger, seed, scratch)


def load_tokenizer(base: str):
    """The tokenizer of a model directory or hub name; code from the model is never run."""
    from transformers import AutoTokenizer

    return _load(base, "tokenizer", lambda: AutoTokenizer.from_pretrained(base, trust_remote_code=False))


def load_config(base: str):
    from transformers import AutoConfig

    return _load(base, "model configuration", lambda: AutoConfig.from_pretrained(base, trust_remote_code=False))


def _load(base: str, what: str, load):
    if os.path.sep in base and not os.path.isdir(base) and (base.startswith((".", os.path.sep)) or base.count("/") > 1):
        raise NotAModel(f"model.base: {base}: no such directory")  # else it would be asked of the hub
    try:
        return load()
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, KeyError, JSON and tokenizers' own errors here
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise NotAModel(f"model.base: {base}: no {what} could be loaded: {reason[0]:.200}") from error


def check_length(base: str, wanted: int) -> None:
    """ValueError if the model has fewer positions than `engine.max_model_len`."""
    positions = getattr(load_config(base), "max_position_embeddings", None)
    if positions is not None and wanted > positions:
        raise ValueError(f"engine.max_model_len: {wanted} is more than the {positions} positions of {base}")


def parameters(ref: ModelRef) -> int:
    """All parameters of base and adapter, tied ones once; nothing is loaded but shapes."""
    import math

    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(ref.base))
    count = sum(weight.numel() for weight in model.parameters())
    if ref.adapter is not None:
        adapter_config(ref.adapter)
        with safe_open(Path(ref.adapter) / "adapter_model.safetensors", "pt") as weights:
            count += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())
    return count


def adapter_config(adapter: str) -> dict:
    """The configuration of a PEFT adapter directory; NotAModel if it is none."""
    folder = Path(adapter)
    missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise NotAModel(f"{adapter}: not a LoRA adapter: {missing[0]} is missing")
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def load_merged(ref: ModelRef, dtype: str):
    """The base with its adapter merged in, as a transformers model in eval mode on the CPU.

    Merging is done in float32, then cast to `dtype`.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # one for each of a model's few files says nothing
    load = lambda: AutoModelForCausalLM.from_pretrained(
        ref.base, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    model = _load(ref.base, "model", load)
    if ref.adapter is not None:
        from peft import PeftModel

        adapter_config(ref.adapter)
        model = PeftModel.from_pretrained(model, ref.adapter).merge_and_unload()
    return model.to(getattr(torch, dtype)).eval()


def load_judge(ref: ModelRef, dtype: str):
    """The merged model as a classifier of its two labels: its output matrix is the labels' rows of the language model's.

    The softmax over the two is then `Engine.score`'s value.
    """
    from copy import deepcopy

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


def usable_threads() -> int:
    """This process's share of the cores it may run on: all of them over the ranks on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
