"""Load models, tokenizers and adapters; merge an adapter into its base; write a PRM as a classifier."""

from __future__ import annotations

import functools
import json
import math
import os
from copy import deepcopy
from pathlib import Path

from flywheel.errors import UserError, first_line
from flywheel.recipe import ModelSpec
from flywheel.records import ModelRef, PrmHead

AFTER_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # what models do with the LM head's logits
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
        raise NotAModel(f"model.base: {base}: no {what} could be loaded: {first_line(error):.200}") from error


def check_length(base: str, wanted: int) -> None:
    """Raises ValueError if the model has fewer positions than `wanted`, the recipe's `engine.max_model_len`."""
    positions = getattr(load_config(base), "max_position_embeddings", None)
    if positions is not None and wanted > positions:
        raise ValueError(f"engine.max_model_len: {wanted} is more than the {positions} positions of {base}")


def check_heads(base: str, parts: int) -> None:
    """Raises ValueError if a model's attention heads cannot be divided among `parts` devices."""
    heads = load_config(base).get_text_config().num_attention_heads
    if heads % parts:
        raise ValueError(f"engine.tensor_parallel: {base} has {heads} attention heads, which {parts} does not divide")


def parameters(ref: ModelRef) -> int:
    """The number of parameters of base and adapter, tied ones counted once. Reads only shapes, no weights."""
    from safetensors import safe_open

    count = _shape(ref.base)[0]
    if ref.adapter is not None:
        adapter_config(ref.adapter)
        with safe_open(Path(ref.adapter) / "adapter_model.safetensors", "pt") as weights:
            names = weights.keys()
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    return count


def attention_width(base: str) -> int:
    """Heads x head dimension, over all layers: what a token attends with. Raises NotAModel."""
    config = load_config(base).get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * config.num_attention_heads * head


@functools.lru_cache  # vLLM alters the classes of some architectures (GPT-NeoX): a process can build them only before
def _shape(base: str) -> tuple[int, str | None]:
    """(number of parameters, see `judge_fault`) of a base without its weights."""
    model, config = _without_weights(base), load_config(base)
    fault = next((name for name in AFTER_HEAD if (getattr(config, name, None) or 1.0) != 1.0), None)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        fault = "a bias of the LM head"
    return sum(weight.numel() for weight in model.parameters()), fault


def _without_weights(base: str):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(base))


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
    drop_sampling_defaults(model)
    return model.to(getattr(torch, dtype)).eval()


def drop_sampling_defaults(model) -> None:
    """Keep only the special tokens of a model's `generation_config.json`.

    Published ones are often invalid (`temperature` without `do_sample`), and transformers refuses to save those.
    """
    from transformers import GenerationConfig

    old = model.generation_config
    kept = {name: getattr(old, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**kept)


def check_targets(spec: ModelSpec) -> None:
    """Raises ValueError if `model.lora_targets`, or one name of its list, fits no module that LoRA can adapt."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import check_target_module_exists

    model = _without_weights(spec.base)
    # the modules with a weight matrix: Linear, GPT-2's Conv1D, Embedding
    modules = [name.removesuffix(".weight") for name, weight in model.named_parameters() if weight.dim() == 2]
    names = ", ".join(sorted({name.rpartition(".")[2] for name in modules}))
    wanted = [spec.lora_targets] if isinstance(spec.lora_targets, str) else spec.lora_targets
    for target in wanted:
        config = LoraConfig(target_modules=target if isinstance(spec.lora_targets, str) else [target])
        if target != "all-linear" and not any(check_target_module_exists(config, name) for name in modules):
            raise ValueError(f"model.lora_targets: {spec.base} has no {target!r}; it has {names}")
    try:
        get_peft_model(model, LoraConfig(target_modules=spec.lora_targets), low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.lora_targets: {first_line(error)}; the modules are {names}") from None


def save_judge(ref: ModelRef, dtype: str, folder: str) -> None:
    """Write the merged model to `folder` as a classifier whose two classes are the labels of `ref`, for vLLM.

    Its output matrix is the two rows of the LM head for the labels, so the softmax over the classes is the value
    that `Engine.score` returns, if `judge_fault` finds nothing. With a value head it is that head's row and a row of
    zeros: the softmax of (x, 0) is the sigmoid of x. transformers need not have such a class: vLLM makes
    one from its own class of the causal model, and the weights keep that model's names.
    """
    import torch

    model = load_merged(ref, "float32")
    head = model.get_output_embeddings()
    named = next(name for name, module in model.named_modules() if module is head)
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith(f"{named}.")}
    if ref.prm_head is PrmHead.VALUE:
        for name, row in value_head(ref.base).items():
            weights[f"score.{name}"] = torch.cat([row, torch.zeros_like(row)])
    else:
        weights["score.weight"] = head.weight.detach()[list(ref.labels)]
    config = deepcopy(model.config)
    config.num_labels, config.tie_word_embeddings, config.dtype = 2, False, getattr(torch, dtype)
    config.architectures = [type(model).__name__.replace("ForCausalLM", "ForSequenceClassification")]
    model.save_pretrained(folder, state_dict={name: weight.to(config.dtype) for name, weight in weights.items()})
    config.save_pretrained(folder)


def value_head(base: str) -> dict:
    """`weight` (1 x hidden) and `bias` (1) of the value head of a model directory, in float32. Raises NotAModel."""
    from safetensors import safe_open

    found = {}
    for file in sorted(Path(base).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            names = weights.keys()
            for name in names:
                if name.startswith("v_head.summary."):
                    found[name.rpartition(".")[2]] = weights.get_tensor(name).float()
    if found.keys() != {"weight", "bias"}:
        raise NotAModel(f"{base}: no value head (v_head.summary.weight and .bias) in its *.safetensors")
    return found


def judge_fault(base: str) -> str | None:
    """What makes a model's logits more than a matrix product, so that `save_judge` does not hold for it, or None."""
    return _shape(base)[1]
