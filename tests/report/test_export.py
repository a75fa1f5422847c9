import json

import pytest
from synthetic_run import make_run

from flywheel.errors import UserError
from flywheel.export import export, main
from flywheel.report import summary
from flywheel.runs.run import Run

PROMPT = [3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Qwen2 of two layers with a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    path = tmp_path_factory.mktemp("base")
    words = ["<unk>", "<eos>", "<pad>", *map(str, range(29))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    # as of published models, and invalid: transformers do not save a temperature without do_sample
    (path / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false}')
    return path


def add_adapter(base, folder, seed: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.3)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """Two rounds; the gate refused the second one."""
    run = make_run(
        tmp_path_factory.mktemp("runs") / "lab",
        rounds=2,
        refused=(2,),
        recipe={"model": {"base": str(base), "lora_rank": 4}},
    )
    for r in (1, 2):
        for i, stage in enumerate(("distill", "train_prm", "choose_reviser")):
            add_adapter(base, run / f"round_{r}" / stage / "adapter", 10 * r + i)
    return run


@pytest.fixture(scope="module")
def out(run, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_PLANTED")
        patch.setenv("WANDB_API_KEY", "PLANTED" + "0" * 33)
        return export(Run(run), tmp_path_factory.mktemp("exports") / "lab")


def logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits


def test_the_merged_policy_is_the_base_with_the_last_adapter_that_passed_its_gate(base, run, out):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = logits(AutoModelForCausalLM.from_pretrained(out / "policy"))
    first, refused = (
        logits(
            PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(base), str(run / f"round_{r}" / "distill" / "adapter")
            )
        )
        for r in (1, 2)
    )
    torch.testing.assert_close(merged, first, atol=1e-4, rtol=1e-4)
    assert (merged - refused).abs().max() > 0.1
    assert (out / "policy" / "model.safetensors").is_file()
    assert AutoTokenizer.from_pretrained(out / "policy").encode("0 1", add_special_tokens=False) == [3, 4]


@pytest.mark.parametrize(
    ("role", "source"),
    [("policy", "round_1/distill"), ("prm", "round_2/train_prm"), ("reviser", "round_2/choose_reviser")],
)
def test_each_adapter_loads_with_peft_and_is_the_right_one(base, run, out, role, source):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ours, theirs = (
        logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(path)))
        for path in (out / "adapters" / role, run / source / "adapter")
    )
    torch.testing.assert_close(ours, theirs)
    config = json.loads((out / "adapters" / role / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["r"] == 4


def test_the_harvest_of_all_rounds_loads_as_a_dataset(out, tmp_path):
    from datasets import load_dataset

    rows = load_dataset(str(out / "harvest"), cache_dir=str(tmp_path))["train"]
    assert rows.column_names == ["question_id", "question", "solution", "answer", "bin", "round", "votes"]
    assert len(rows) == 40 and set(rows["round"]) == {1, 2}
    assert rows[0]["solution"] == "0 +3 =3\nAnswer 0"


def test_the_card_says_how_it_was_made_with_the_figures_of_the_run(run, out):
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and "`policy_1`: a LoRA adapter" in card
    assert (
        "| 1 | policy_1 | 0.420 | 0.390 to 0.450 | passed |" in card
        and "| 2 | policy_1 | 0.420 | 0.390 to 0.450 | refused |" in card
    )
    assert "compute_optimal@16_probe" in card and "policy=adapters/policy" in card
    assert f"{summary(Run(run))['ledger']['tokens']['prm']:,} tokens" in card
    assert "name: made_up" in card and "40 verified solutions" in card


def test_no_secret_of_the_environment_is_exported(out):
    files = [p for p in out.rglob("*") if p.is_file()]
    assert len(files) > 10 and not [p for p in files if b"PLANTED" in p.read_bytes()]


def test_without_a_passed_gate_the_policy_is_the_base_and_the_card_says_so(base, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    run = make_run(tmp_path / "lab", rounds=1, refused=(1,), recipe={"model": {"base": str(base)}})
    add_adapter(base, run / "round_1" / "distill" / "adapter", 1)
    out = export(Run(run), tmp_path / "out")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(out / "policy")), logits(AutoModelForCausalLM.from_pretrained(base))
    )
    assert not (out / "adapters" / "policy").exists()
    assert "the base itself" in (out / "README.md").read_text()


def test_an_earlier_round_can_be_exported(run, tmp_path):
    out = export(Run(run), tmp_path / "out", round=1)
    import pyarrow.parquet as pq

    assert pq.read_table(out / "harvest" / "train.parquet").num_rows == 20
    assert "| 2 |" not in (out / "README.md").read_text()


def test_a_directory_with_something_in_it_is_never_touched(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert main([str(run), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"] and [p.name for p in tmp_path.iterdir()] == [
        "out"
    ]


def test_a_base_that_cannot_be_loaded_leaves_nothing_behind(tmp_path):
    run = make_run(
        tmp_path / "runs" / "lab", rounds=1, refused=(1,), recipe={"model": {"base": str(tmp_path / "gone")}}
    )
    with pytest.raises(UserError, match=r"model\.base .*gone.* cannot be loaded"):
        export(Run(run), tmp_path / "exports" / "out")
    assert list((tmp_path / "exports").iterdir()) == []


@pytest.mark.parametrize(
    ("rounds", "wanted", "words"),
    [(0, None, "nothing to export"), (1, 3, "round 3 cannot be exported; finished: 1"), (1, 0, "round 0 cannot")],
)
def test_a_round_that_is_not_there_is_refused(tmp_path, rounds, wanted, words):
    run = make_run(tmp_path / "lab", rounds=rounds)
    with pytest.raises(UserError, match=words):
        export(Run(run), tmp_path / "out", wanted)


def test_a_path_that_is_no_run_gives_one_line(tmp_path, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "not a run" in capsys.readouterr().err


def test_an_adapter_that_is_missing_is_named(base, tmp_path):
    run = make_run(tmp_path / "lab", rounds=1, recipe={"model": {"base": str(base)}})
    with pytest.raises(UserError, match="the policy's adapter is missing"):
        export(Run(run), tmp_path / "out")


def test_the_exported_policy_samples_as_its_figures_were_measured(base, tmp_path):
    from transformers import GenerationConfig

    changes = {
        "model": {"base": str(base)},
        "sample": {"temperature": 0.7, "top_p": 0.9, "min_p": 0.05, "max_tokens": 48, "repetition_penalty": 1.1},
    }
    out = export(Run(make_run(tmp_path / "lab", rounds=1, refused=(1,), recipe=changes)), tmp_path / "out")
    config = GenerationConfig.from_pretrained(out / "policy")
    assert (config.do_sample, config.temperature, config.top_p, config.min_p) == (True, 0.7, 0.9, 0.05)
    assert (config.top_k, config.repetition_penalty, config.max_new_tokens) == (0, 1.1, 48)
    told = "temperature 0.7, top_p 0.9, top_k 0, min_p 0.05, repetition_penalty 1.1, max_tokens 48"
    assert told in (out / "README.md").read_text()


def test_an_export_is_pushed_whole(run, monkeypatch, capsys):
    from huggingface_hub import HfApi

    from flywheel import push

    asked = []
    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **options: asked.append((repo, options)) or "there")
    monkeypatch.setattr(
        HfApi,
        "upload_folder",
        lambda self, repo_id, folder_path, commit_message: asked.append(
            (repo_id, commit_message, {str(path.relative_to(folder_path)) for path in folder_path.rglob("*")})
        ),
    )
    assert push.main([str(run), "me/lab", "--private"]) == 0
    assert capsys.readouterr().out == "uploaded to there\n"
    assert asked[0] == ("me/lab", {"private": True, "exist_ok": True})
    repo, message, files = asked[1]
    assert (repo, message) == ("me/lab", "flywheel: lab")
    assert {
        "README.md",
        "policy/model.safetensors",
        "adapters/prm/adapter_config.json",
        "harvest/train.parquet",
    } <= files


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("LocalTokenNotFoundError", "no token for the Hub: run `hf auth login`"),
        ("OfflineModeIsEnabled", "the Hub cannot be reached"),
        ("ConnectError", "the Hub cannot be reached"),
        ("HFValidationError", "not a name of a repository"),
    ],
)
def test_without_token_network_or_name_a_push_is_one_line(run, monkeypatch, capsys, error, words):
    import httpx2
    from huggingface_hub import HfApi, errors

    from flywheel import push

    def refuse(self):
        raise (getattr(errors, error, None) or getattr(httpx2, error))("because")

    monkeypatch.setattr(HfApi, "whoami", refuse)
    assert push.main([str(run), "me/lab"]) == 1
    told = capsys.readouterr().err
    assert words in told and told.startswith("flywheel: me/lab: ") and told.count("\n") == 1
