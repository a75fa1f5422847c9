"""Loading models: what is refused and how, and how many parameters are counted."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from flywheel.errors import EngineDied
from flywheel.ledger import Ledger
from flywheel.models.backend import open_backend
from flywheel.models.weights import NotAModel, load_merged, load_tokenizer, parameters
from flywheel.recipe import EngineSpec
from flywheel.records import ModelRef, Role
from flywheel.training.scores import score_all
from tests import micro


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("micro")
    base = micro.model(folder / "base")
    return base, micro.adapter(base, folder / "adapter")


def test_a_path_that_is_no_model_is_named(tmp_path, weights):
    base, adapter = weights
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(NotAModel, match=str(path)) as caught:
            load_tokenizer(str(path))
        assert "\n" not in str(caught.value)
    for kind in ("vllm", "tests.scripted:open_backend"):
        with pytest.raises(NotAModel, match=str(tmp_path)):
            open_backend(
                EngineSpec(kind=kind), {Role.POLICY: ModelRef("p", str(tmp_path))}, Ledger("t", 0), 0, tmp_path
            )
    with pytest.raises(NotAModel, match="adapter_config.json is missing"):
        parameters(ModelRef("p", base, str(tmp_path)))
    with pytest.raises(ValueError, match="engine.max_model_len: 1024 .* 256 positions"):
        open_backend(EngineSpec(), {Role.POLICY: ModelRef("p", base)}, Ledger("t", 0), 0, tmp_path)


class Planted:
    """What runs when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return (open, (self.canary, "w"))


def test_pickled_weights_are_loaded_by_nobody(tmp_path, weights):
    canary, folder = tmp_path / "canary", tmp_path / "pickled"
    shutil.copytree(weights[0], folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save({"model.embed_tokens.weight": Planted(canary)}, folder / "pytorch_model.bin")
    with pytest.raises(NotAModel, match=r"no model could be loaded"):
        load_merged(ModelRef("p", str(folder)), "float32")
    with pytest.raises(OSError, match="safetensors"):
        score_all(str(folder), None, [], (9, 10))
    with pytest.raises(EngineDied, match="did not start for p"):
        open_backend(
            EngineSpec(max_model_len=64), {Role.POLICY: ModelRef("p", str(folder))}, Ledger("t", 0), 0, tmp_path
        )
    assert not canary.exists()


def test_parameters_count_base_and_adapter(weights):
    base, adapter = weights
    bare = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(base).parameters())
    assert parameters(ModelRef("p", base)) == bare
    lora = 2 * 8 * (4 * (64 + 64) + 3 * (64 + 128))  # 2 layers, rank 8: q k v o, gate up down
    assert parameters(ModelRef("p", base, adapter)) == bare + lora


def test_an_invalid_generation_config_does_not_keep_a_model_from_being_saved(tmp_path, weights):
    """Published models hold a temperature without do_sample, which transformers do not save."""
    folder = tmp_path / "base"
    shutil.copytree(weights[0], folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false, "eos_token_id": [1, 2]}')
    load_merged(ModelRef("p", str(folder)), "float32").save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 2] and "temperature" not in saved
