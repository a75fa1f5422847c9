"""Claims about what the library `datasets` reads, and about the published sets that docs/recipes.md names."""

import json
import re
from pathlib import Path

import pytest
import yaml

from flywheel.errors import UserError
from flywheel.problems.sources import digest, load
from flywheel.recipe import ProblemSpec
from flywheel.records import Split

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real problem sets is not here")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(path: Path, **keys):
    notes: list[str] = []
    spec = ProblemSpec.model_validate({"format": "datasets", "path": str(path), **keys})
    return load(spec, notes), notes


def published(name: str, path: Path):
    """The problem set `name` as the documentation's block has it, read from `path`."""
    blocks = re.findall(r"^    problems: # (\S+).*\n((?:      .*\n)+)", (ROOT / "docs/recipes.md").read_text(), re.M)
    keys = yaml.safe_load(dict(blocks)[name])
    return read(path, **{key: keys[key] for key in keys if key not in ("format", "path")})


def table(count: int = 40):
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "Body": [f"Ann has {i}." for i in range(count)],
            "Question": ["One more?"] * count,
            "n": [i + 1.0 for i in range(count)],
        }
    )


FIELDS = {"question": "{Body} {Question}", "answer": "n"}


@pytest.mark.parametrize("kind", ["csv", "parquet", "json", "disk"])
def test_a_file_of_any_kind_is_cut_by_shares(tmp_path, kind):
    path = tmp_path / f"own.{kind}"
    {"csv": table().to_csv, "parquet": table().to_parquet, "json": table().to_json, "disk": table().save_to_disk}[kind](
        path
    )
    shares = {"train": 0.4, "calibrate": 0.2, "validation": 0.2, "test": 0.2}
    problems, notes = read(path, fields=FIELDS, splits=shares)
    found = {p.question.text: p.answer for group in problems.values() for p in group}
    assert found == {f"Ann has {i}. One more?": str(i + 1) for i in range(40)}
    assert all(len(problems[split]) >= 3 for split in Split) and len(problems[Split.TRAIN]) < 25
    assert "drawn by hash from 40" in notes[0]


def test_a_share_for_one_split_leaves_the_rows_of_others_where_they_are(tmp_path):
    rows = [{"question": f"q{i}", "answer": "1", "split": "test" if i < 100 else "train"} for i in range(1000)]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    problems, _ = read(tmp_path / "own.json", splits={"calibrate": 0.3})
    assert {p.question.text for p in problems[Split.TEST]} == {f"q{i}" for i in range(100)}
    assert 230 < len(problems[Split.CALIBRATE]) < 310 and len(problems[Split.VALIDATION]) < 70
    with pytest.raises(UserError, match="problems.splits: the shares leave no question for train"):
        read(tmp_path / "own.json", splits={"calibrate": 0.96, "validation": 0.05})


def test_splits_are_mapped_and_others_left_out(tmp_path):
    from datasets import DatasetDict

    rows = table()
    parts = {"train": rows.select(range(20)), "dev": rows.select(range(20, 24)), "extra": rows.select(range(24, 40))}
    DatasetDict(parts).save_to_disk(tmp_path / "own")
    names = {"train": "train", "test": "dev", "calibrate": 0.5}
    problems, _ = read(tmp_path / "own", fields=FIELDS, splits=names)
    assert [p.answer for p in problems[Split.TEST]] == ["21", "22", "23", "24"]
    assert sum(map(len, problems.values())) == 24 and len(problems[Split.CALIBRATE]) > 5
    with pytest.raises(UserError, match="no split tain in it; it has dev, extra, train"):
        read(tmp_path / "own", fields=FIELDS, splits={"train": "tain"})
    with pytest.raises(UserError, match="extra row 0: unknown split 'extra'"):
        read(tmp_path / "own", fields=FIELDS)


def test_a_file_of_another_kind_is_one_line(tmp_path):
    (tmp_path / "own.txt").write_text("1")
    with pytest.raises(UserError, match=r"own.txt: of no kind .*: .jsonl, .json, .csv, .parquet"):
        read(tmp_path / "own.txt")
    (tmp_path / "own.parquet").write_text("PAR1")
    with pytest.raises(UserError, match=r"own.parquet: cannot be read as a data set: ") as error:
        read(tmp_path / "own.parquet")
    assert "\n" not in str(error.value)


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch):
    from huggingface_hub import HfApi, constants

    def refuse(*_, **__):
        raise RuntimeError("Name or service not known")

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        UserError, match="problems.path: some/set is not here and the Hub cannot be reached .*HF_HUB_OFFLINE=1"
    ):
        read("some/set")
    with pytest.raises(UserError, match=r"\./some/set: no such file or folder \(problems.path\)"):
        read("./some/set")


def test_the_digest_of_a_source_changes_with_its_content(tmp_path):
    def of(count: int) -> str:
        table(count).to_parquet(tmp_path / f"{count}.parquet")
        keys = {"format": "datasets", "path": str(tmp_path / f"{count}.parquet"), "fields": FIELDS}
        return digest(ProblemSpec.model_validate(keys))

    assert of(20) == of(20) != of(21)


@needs_data
def test_the_published_sets_are_read_as_documented():
    gsm8k, notes = published("GSM8K", DATA / "gsm8k")
    assert len(gsm8k[Split.TEST]) == 1319 and sum(map(len, gsm8k.values())) == 7473 + 1319 and len(notes) == 2
    assert "test-602 the most: 67% with train-1314" in notes[1]
    assert all(p.answer.lstrip("-").replace(",", "").isdigit() for found in gsm8k.values() for p in found)
    math, notes = published("MATH", DATA / "math")
    assert sum(map(len, math.values())) == 6753 + 747 - 2 - 1 and len(math[Split.VALIDATION]) == 747
    assert [note[:2] for note in notes[:2]] == ["2 ", "1 "]
    assert {p.level for found in math.values() for p in found} >= {f"Level {i}" for i in range(1, 6)}
    svamp, _ = published("SVAMP", DATA / "bench" / "svamp.jsonl")
    texts = {p.question.text: p.answer for found in svamp.values() for p in found}
    assert len(texts) > 990 and all(answer.lstrip("-").isdigit() for answer in texts.values())
    assert any(text.endswith("into 93 groups How big is each group of bananas?") for text in texts)
    math500, _ = published("MATH-500", DATA / "math500" / "test.jsonl")
    assert sum(map(len, math500.values())) == 500 and all(len(found) > 10 for found in math500.values())
