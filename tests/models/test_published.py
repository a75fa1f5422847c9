"""Published PRMs: tiny random models of each format, served by vLLM, against transformers' own forward pass."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch

from flywheel.errors import UserError
from flywheel.ledger import Ledger
from flywheel.models.backend import open_backend
from flywheel.models.published import QWEN_SYSTEM, Form, PublishedPrm, form, preflight
from flywheel.recipe import EngineSpec, PublishedSpec
from flywheel.records import Question, Step
from tests import families

QUESTION = Question("q", "What is 3 and 5? 3 + 5")
TEXTS = ["3 then 5.", "3 + 5 = 8\nso 8", "\n", "Answer 8"]
STEPS = [Step(f"{text}\n", ()) for text in TEXTS]  # the third is blank
SHOWN = [text for text in TEXTS if text.strip()]
FORMATS = ("math_shepherd", "rlhflow", "qwen", "skywork")


def metaspace():
    """A tokenizer in the manner of Mistral's: words with their space before them, `ки` among them, and BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    lines, spaces = pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([lines, spaces]), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator(["What is 3 and 5? 3 + 5 = 8 - 0 . Answer 8 then ки\nso 8 ки\n"] * 20, trainer)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def model(format: str, folder: Path) -> PublishedSpec:
    """A tiny random model with the files, names and config of the published one."""
    from safetensors.torch import load_file, save_file

    family = {"math_shepherd": "mistral", "rlhflow": "llama3"}.get(format, "qwen2.5")
    words = metaspace() if format == "math_shepherd" else families.tokenizer(family)
    if format == "qwen":
        words.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    families.model(family, folder, seed=5, vocab_size=len(words), tie_word_embeddings=format == "skywork")
    (folder / "chat_template.jinja").unlink()  # the family's; it is written again with a tokenizer that has one
    words.save_pretrained(folder)
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    torch.manual_seed(6)
    if format == "qwen":
        sizes = {"0.weight": (64, 64), "0.bias": (64,), "2.weight": (2, 64), "2.bias": (2,)}
        weights |= {f"score.{name}": torch.randn(size) * 0.3 for name, size in sizes.items()}
        del weights["lm_head.weight"]
        config["architectures"] = ["Qwen2ForProcessRewardModel"]
    if format == "skywork":
        weights |= {"v_head.summary.weight": torch.randn(1, 64) * 0.3, "v_head.summary.bias": torch.tensor([0.7])}
        config["architectures"] = ["Qwen2ForPrmModel"]
    if family == "qwen2.5":  # code that comes with a model is never run
        config["auto_map"] = {"AutoConfig": "configuration_qwen2_rm.C", "AutoModel": "modeling_qwen2_rm.M"}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return PublishedSpec(model=str(folder), format=format)


@torch.no_grad()
def direct(spec: PublishedSpec) -> list[float]:
    """The values of `SHOWN` as the model's card computes them, by transformers alone."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(spec.model)
    causal = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32).eval()
    weights, body = load_file(f"{spec.model}/model.safetensors"), causal.model
    if spec.format == "math_shepherd":
        text = f"{QUESTION.text} " + "\n".join(f"{step} ки" for step in SHOWN)
        ids, labels = words(text, return_tensors="pt").input_ids, words.encode("+ -")[1:]
        assert ids[0, 0] == words.bos_token_id and len(labels) == 2
        tag = words.encode("ки")[-1]
        return causal(ids).logits[0][ids[0] == tag][:, labels].softmax(-1)[:, 0].tolist()
    if spec.format == "rlhflow":
        said, found = [], []
        labels = [words.encode(label)[-1] for label in "+-"]
        for i, step in enumerate(SHOWN):
            turn = f"{QUESTION.text} {step}" if i == 0 else step
            said += [{"role": "user", "content": turn}, {"role": "assistant", "content": "+"}]
            ids = words.apply_chat_template(said, return_tensors="pt", return_dict=True).input_ids
            found.append(causal(ids).logits[0, -3, labels].softmax(-1)[0].item())  # +, <|eot_id|> are the last two
        return found
    if spec.format == "qwen":
        turns = [("system", QWEN_SYSTEM), ("user", QUESTION.text)]
        turns.append(("assistant", "<extra_0>".join(SHOWN) + "<extra_0>"))
        text = words.apply_chat_template([{"role": role, "content": text} for role, text in turns], tokenize=False)
        ids = words(text, return_tensors="pt").input_ids
        first, second = (
            lambda x, n=n: torch.nn.functional.linear(x, weights[f"score.{n}.weight"], weights[f"score.{n}.bias"])
            for n in (0, 2)
        )
        logits = second(first(body(ids).last_hidden_state[0]).relu())
        return logits[ids[0] == words.convert_tokens_to_ids("<extra_0>")].softmax(-1)[:, 1].tolist()
    ids, places = words.encode(f"{words.bos_token or ''}{QUESTION.text}\n"), []
    for step in SHOWN:
        ids += [*words.encode(step), *words.encode("\n")]
        places.append(len(ids) - 1)
    hidden = body(torch.tensor([ids])).last_hidden_state[0, places]
    head = weights["v_head.summary.weight"], weights["v_head.summary.bias"]
    return torch.nn.functional.linear(hidden, *head).sigmoid().flatten().tolist()


@pytest.mark.parametrize(
    "format, adapters", [*((format, "merged") for format in FORMATS), ("rlhflow", "runtime"), ("qwen", "runtime")]
)
def test_values_through_vllm_are_those_of_the_model_s_card(format, adapters, tmp_path):
    spec = model(format, tmp_path / format)
    reader, ledger = Form(spec), Ledger("test", 1)
    engines = EngineSpec(dtype="float32", max_model_len=512, kv_cache_mb=16, adapters=adapters)
    backend = open_backend(engines, {"prm:published": reader.ref}, ledger, 0, tmp_path / "scratch")
    try:
        prm = PublishedPrm(backend.engine("prm:published"), reader)
        [(values, last)] = backend.run([0], lambda _: both(prm))
    finally:
        backend.close()
    expected = direct(spec)
    expected.insert(2, expected[1])  # the blank step's
    assert values == pytest.approx(expected, abs=1e-4) and last == pytest.approx(expected[-1], abs=1e-4)
    assert max(values) - min(values) > 0.01
    [row] = ledger.rows()
    assert (row["role"], row["purpose"], row["generated"] > 0) == ("prm", "verify", not prm.engine.device.one_pass)
    assert row["scored"] >= 2 * reader.check(QUESTION, STEPS)[1][-1] and prm.engine.parameters > 50_000


async def both(prm: PublishedPrm) -> tuple[tuple[float, ...], float]:
    return await prm.values(QUESTION, STEPS), (await prm.values(QUESTION, STEPS, since=-1))[0]


def test_a_step_beyond_the_model_s_length_has_the_value_of_the_last_that_fits(tmp_path):
    reader = Form(model("skywork", tmp_path))
    _, reads = reader.check(QUESTION, STEPS)

    class Engine:
        max_model_len = reads[1] + 1

        async def score(self, prompt, asked, labels, *, purpose):
            return [read / 1000 for read in asked]

    prm = PublishedPrm(Engine(), reader)
    assert asyncio.run(prm.values(QUESTION, STEPS)) == tuple(read / 1000 for read in (reads[0], *[reads[1]] * 3))
    Engine.max_model_len = reads[0]
    assert asyncio.run(prm.values(QUESTION, STEPS)) == (0.0,) * 4


def test_what_is_missing_or_of_another_format_is_one_line_before_a_run(tmp_path):
    specs = {format: model(format, tmp_path / format) for format in FORMATS}
    for spec in specs.values():
        preflight(spec, EngineSpec())

    def refused(format: str, said: str, at: Path, length: int = 1024) -> None:
        with pytest.raises(UserError, match=f"^prm.published: .*{said}"):
            preflight(PublishedSpec(model=str(at), format=format), EngineSpec(max_model_len=length))

    refused("qwen", "no such directory", tmp_path / "none")
    refused("qwen", "'<extra_0>' is not a token of .*, so its format is not qwen", tmp_path / "skywork")
    refused("math_shepherd", "'ки' is not a token", tmp_path / "rlhflow")
    refused("rlhflow", "has no chat template", tmp_path / "math_shepherd")
    refused("skywork", "no value head", tmp_path / "qwen")
    refused("skywork", "2048 is more than the 1024 positions", tmp_path / "skywork", 2048)
    with pytest.raises(UserError, match="skywork is served by engine.kind vllm alone"):
        preflight(specs["skywork"], EngineSpec(kind="tests.scripted:open_backend"))
    config = tmp_path / "qwen" / "config.json"
    config.write_text(config.read_text().replace("Qwen2ForProcessRewardModel", "Qwen2ForRewardModel"))
    form.cache_clear()
    refused("qwen", "is a .*Qwen2ForRewardModel.*that of a Qwen2ForProcessRewardModel", tmp_path / "qwen")
    (tmp_path / "rlhflow" / "model.safetensors").rename(tmp_path / "rlhflow" / "pytorch_model.bin")
    form.cache_clear()
    refused("rlhflow", "no .*safetensors .*convert them", tmp_path / "rlhflow")
