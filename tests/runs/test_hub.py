"""A base on the Hub: its snapshot in the cache is the base, and the commit is part of what a run is made from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flywheel import iterate
from flywheel.errors import UserError
from flywheel.runs import hub, manifest

SEED_MODEL = Path(__file__).parents[2] / "data" / "chain" / "seed_model"
COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A Hub cache with two versions of somebody/model, offline; main is the first."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = tmp_path / "models--somebody--model"
    for commit in COMMITS:
        shutil.copytree(SEED_MODEL, model / "snapshots" / commit)
    (model / "snapshots" / COMMITS[1] / "tokenizer_config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMITS[0])
    return model


def asked(*sets: str, argv: tuple[str, ...] = ()):
    return iterate.load_recipe(iterate.parser().parse_args([*argv, "--set", *sets]))


def test_a_name_becomes_the_snapshot_of_its_revision_and_its_files_are_fingerprinted(cache):
    main = asked("model.base=somebody/model")
    other = asked("model.base=somebody/model", f"model.revision={COMMITS[1]}")
    assert main.model.base == str(cache / "snapshots" / COMMITS[0])
    assert other.model.base == str(cache / "snapshots" / COMMITS[1])
    first, second = map(manifest.source_files, (main, other))
    assert {key for key in first if first[key] != second[key]} == {"model.base/tokenizer_config.json"}
    assert hub.name_of(main.model.base) == "somebody/model" and hub.name_of("data/model") == "data/model"


def test_a_model_that_neither_cache_nor_hub_gives_is_named(cache):
    with pytest.raises(UserError, match="model.base: nobody/no-such-model is no folder here and not in"):
        asked("model.base=nobody/no-such-model")
    planned = asked("model.base=nobody/no-such-model", argv=("--dry-run",))
    assert manifest.source_files(planned)["model.base"] == "nobody/no-such-model"
