"""Records on disk, shards, fingerprints and what a stage may see (in one process)."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import toy_stages
from toy import Project
from toy_stages import Trial

from flywheel.iterate import load_recipe, parser
from flywheel.recipe import ProblemSpec, PublishedSpec
from flywheel.records import Candidate, Finish, Grade, Outcome, Problem, Role, Solution, Split, Step
from flywheel.runs import manifest
from flywheel.runs.files import Damaged, encode, plain, read_table, write_table
from flywheel.runs.ranks import Launch, Ranks
from flywheel.runs.run import Context, TestSplitForbidden
from flywheel.runs.shards import Shards, shard_dirs
from flywheel.runs.stage import Input, Scheduled, Stage
from flywheel.runs.worker import cut, perform
from flywheel.search.beam import Beam
from flywheel.search.best_of_n import BestOfN
from flywheel.search.revise import Revise

SOLUTION = Solution(
    "q/0",
    "q",
    (Step("1 +2 =3\n", (1, 2, 3)), Step("Answer 3", (4,))),
    Finish.STOP,
    None,
    "sample",
    "toy",
    "q/0",
    parent="p",
)


@pytest.fixture
def recipe(tmp_path):
    project = Project(tmp_path / "project")
    return load_recipe(parser().parse_args(["--recipe", str(project.root / "toy.yaml")]))


def finished(run: Path, round: int, stage: str, figures: dict) -> None:
    manifest.stage_dir(run, round, stage).mkdir(parents=True, exist_ok=True)
    manifest.seal(run, scheduled(round, Stage(stage, (), (), train=dict)), {}, figures, 0.0, 1)


def scheduled(round: int, stage: Stage, *reads: tuple[int, str]) -> Scheduled:
    return Scheduled(round, stage, reads, 0, 1)


# ---- tables ----


def test_records_come_back_from_parquet_as_they_were(tmp_path):
    rows = [
        Outcome(
            "q", "beam", (Candidate(SOLUTION, (0.25, 1.0)), Candidate(replace(SOLUTION, answer="3"))), None, 9, 4, True
        ),
        Outcome("r", "beam", (), "3", 0),
    ]
    write_table(tmp_path / "a=b.parquet", rows)
    assert read_table(tmp_path / "a=b.parquet", Outcome) == rows


def test_a_union_of_dataclasses_comes_back_as_the_member_it_was(tmp_path):
    rows = [
        Trial("q", strategy, True, {})
        for strategy in (BestOfN(4), BestOfN(4, "majority"), Beam(16, 2), Revise(4), Revise(2, 2))
    ]
    write_table(tmp_path / "t.parquet", rows)
    assert read_table(tmp_path / "t.parquet", Trial) == rows


def test_an_empty_table_is_read_as_no_records(tmp_path):
    write_table(tmp_path / "t.parquet", [])
    assert read_table(tmp_path / "t.parquet", Grade) == []


def test_the_same_records_make_the_same_bytes():
    assert encode(Solution, [SOLUTION] * 3) == encode(Solution, [SOLUTION] * 3)


def test_a_record_that_breaks_its_annotations_is_not_written(tmp_path):
    with pytest.raises(TypeError, match="Solution"):
        write_table(tmp_path / "t.parquet", [replace(SOLUTION, attempt="second")])
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_row_names_file_row_and_field(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"solution_id": "s", "question_id": "q", "verdict": "correct"},
        {"solution_id": "s", "question_id": "q", "verdict": "perhaps"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "Grade.parquet")
    with pytest.raises(Damaged, match=r"Grade\.parquet: row 1: Grade\.verdict"):
        read_table(tmp_path / "Grade.parquet", Grade)


def test_a_cut_table_is_named(tmp_path):
    (tmp_path / "Grade.parquet").write_bytes(encode(Solution, [SOLUTION])[:-9])
    with pytest.raises(Damaged, match=r"Grade\.parquet: not a parquet file"):
        read_table(tmp_path / "Grade.parquet", Grade)


def test_figures_become_plain_json():
    import numpy as np

    assert plain({"a": float("nan"), 1: (np.float64(0.5), np.array([1, 2])), "b": [float("inf"), True]}) == {
        "a": None,
        "1": [0.5, [1, 2]],
        "b": [None, True],
    }


# ---- shards ----


def drawn(shards: Shards) -> list[int]:
    return list(iter(shards.draw, None))


def test_alone_a_process_draws_the_chunks_that_are_missing(tmp_path):
    Shards(tmp_path, [["a"], ["b"], ["c"]]).write(1, [SOLUTION])
    shards = Shards(tmp_path, [["a"], ["b"], ["c"]])
    assert drawn(shards) == [0, 2] and shards.draw() is None


def test_in_a_launch_chunks_are_drawn_by_its_counter_past_those_that_rank_0_named(tmp_path):
    launch = Launch(Ranks())
    launch.order(do="stage", have=[0, 2, 3])
    one, other = (Shards(tmp_path, [[name] for name in "abcdefg"], launch.draw) for _ in range(2))
    assert [one.draw(), other.draw(), *drawn(one), *drawn(other)] == [1, 4, 5, 6]


def test_a_chunk_that_another_launch_wrote_meanwhile_is_done(tmp_path):
    mine, theirs = Shards(tmp_path, [["a"]]), Shards(tmp_path, [["a"]])
    theirs.write(0, [SOLUTION])
    written = (tmp_path / "shards" / "00000").stat().st_ino
    mine.write(0, [SOLUTION])
    assert [(p.name, p.stat().st_ino) for p in (tmp_path / "shards").iterdir()] == [("00000", written)]
    (tmp_path / "shards" / "00000" / "Solution.parquet").write_text("half")
    with pytest.raises(Damaged, match="delete .*00000 to make this chunk again"):
        mine.write(0, [SOLUTION])


def test_leftovers_of_a_dead_writer_are_swept_and_never_read(tmp_path):
    shards = Shards(tmp_path, [["a"]])
    (tmp_path / "shards" / ".00000.999").mkdir()
    (tmp_path / "shards" / ".00000.999" / "Solution.parquet").write_text("half")
    assert shards.done() == [] and shard_dirs(tmp_path) == []
    while (index := shards.draw()) is not None:
        shards.write(index, [SOLUTION])
    assert [p.name for p in (tmp_path / "shards").iterdir()] == ["00000"]


def test_shards_of_other_items_are_refused(tmp_path):
    shards = Shards(tmp_path, [["a"], ["b"]])
    while (index := shards.draw()) is not None:
        shards.write(index, [SOLUTION])
    with pytest.raises(Damaged, match="holds other items"):
        Shards(tmp_path, [["a", "b"]])


# ---- a stage and its context ----


def test_a_stage_reads_its_own_records_in_the_order_of_its_items(recipe, tmp_path):
    ctx = Context(recipe, tmp_path, 1, toy_stages.SAMPLE)
    figures = perform(ctx)
    ids = [f"train{i:02d}" for i in range(20)]
    assert [s.question_id for s in ctx.read(Solution, "sample")] == ids
    assert figures["solutions"] == 20 and figures["nan"] is None
    assert ctx.ledger.tokens() == 0  # taken into the shards
    made = manifest.seal(tmp_path, scheduled(1, toy_stages.SAMPLE), {}, figures, 1.0, 1)
    assert made["counts"] == {"Solution": 20, "Grade": 20} and made["tokens"] == 20 * (5 + 6)


def test_a_stage_sees_only_what_it_names(recipe, tmp_path):
    finished(tmp_path, 1, "calibrate", {"x": 1})
    ctx = Context(recipe, tmp_path, 1, toy_stages.LABEL)
    with pytest.raises(ValueError, match="does not name round_"):
        ctx.figures("calibrate")
    with pytest.raises(ValueError, match="does not name round_"):
        next(ctx.read(Grade, "evaluate", 0))


@pytest.mark.parametrize("stage", [toy_stages.SAMPLE, toy_stages.LABEL, toy_stages.DISTILL])
def test_the_test_split_is_closed_to_all_but_measuring(recipe, tmp_path, stage):
    with pytest.raises(TestSplitForbidden, match=stage.name):
        Context(recipe, tmp_path, 1, stage).problems(Split.TRAIN, Split.TEST)


def test_the_test_split_is_open_to_evaluate(recipe, tmp_path):
    problems = Context(recipe, tmp_path, 1, toy_stages.EVALUATE).problems(Split.TEST)
    assert [p.id for p in problems] == [f"test{i:02d}" for i in range(6)]
    assert all(isinstance(p, Problem) and p.split is Split.TEST for p in problems)


def test_only_measuring_stages_of_flywheel_may_see_the_test_split():
    from flywheel.stages import stages

    assert {stage.name for stage in stages(1) if stage.test_split} == {"evaluate", "search"}


def test_a_refused_gate_keeps_the_policy_that_stood(recipe, tmp_path):
    ctx = Context(recipe, tmp_path, 3, toy_stages.SAMPLE)
    assert ctx.model(Role.POLICY, 0).name == "policy_0" and ctx.model(Role.POLICY, 0).adapter is None
    finished(tmp_path, 1, "gate", {"passed": True})
    finished(tmp_path, 2, "gate", {"passed": False})
    policy = ctx.model(Role.POLICY, 2)
    assert policy.name == "policy_1" and policy.adapter == str(tmp_path / "round_1" / "distill" / "adapter")
    with pytest.raises(Exception, match="policy of round 3 is not decided"):
        ctx.model(Role.POLICY, 3)
    assert ctx.model(Role.PRM, 3).name == "prm_3"


def test_inputs_name_rounds():
    inputs = (
        Input("a"),
        Input("b", back=1),
        Input("c", every=True),
        Input("d", of=0),
        Input("e", back=1, optional=True),
        Input("x", back=1),
        Input("x"),
    )
    stage = Stage("x", (), inputs, train=dict)
    assert stage.reads(2) == [(2, "a"), (1, "b"), (1, "c"), (2, "c"), (0, "d"), (1, "e"), (1, "x")]
    assert stage.reads(1) == [(1, "a"), (0, "b"), (1, "c"), (0, "d"), (0, "x")]
    assert stage.reads(0) == [(0, "a"), (0, "d")]


def test_seeds_are_by_identity(recipe, tmp_path):
    one = Context(recipe, tmp_path, 1, toy_stages.SAMPLE, rank=0, world=1)
    same = Context(recipe, tmp_path / "elsewhere", 1, toy_stages.SAMPLE, rank=1, world=2)
    assert one.seed("q", 1) == same.seed("q", 1)
    others = [
        Context(recipe, tmp_path, 2, toy_stages.SAMPLE).seed("q", 1),
        Context(recipe, tmp_path, 1, toy_stages.LABEL).seed("q", 1),
        one.seed("q1"),
        one.seed("q", 2),
    ]
    assert len({one.seed("q", 1), *others}) == 5
    assert all(0 <= seed < 2**63 for seed in others)


def test_a_stage_is_sampling_or_training():
    with pytest.raises(ValueError, match="either items and work, or train"):
        Stage("x", (), ())


def test_a_stage_sees_the_recipe_keys_that_it_names_and_no_others(recipe, tmp_path):
    """So its fingerprint holds all that it reads. The stages of a real round run under this guard."""
    stage = Stage("x", ("sample", "prm.labels"), (), train=dict)
    seen = Context(recipe, tmp_path, 1, stage).recipe
    assert seen.sample.temperature == 1.0 and seen.prm.labels == ("+", "-")
    assert seen.model.base == recipe.model.base and seen.problems.path == recipe.problems.path and seen.seed == 0
    for read, key in [
        (lambda: seen.prm.epochs, "prm.epochs"),
        (lambda: seen.label, "label"),
        (lambda: seen.name, "name"),
    ]:
        with pytest.raises(ValueError, match=f"stage x reads the recipe's {key} but does not name it"):
            read()
    assert Context(recipe, tmp_path, 1, replace(stage, sections=None)).recipe is recipe


# ---- fingerprints ----


def test_a_fingerprint_holds_what_the_stage_reads_and_nothing_else(recipe, tmp_path):
    sources = manifest.source_files(recipe)
    assert set(sources) == {"model.base/config.json", "model.base/model.safetensors", "problems.path"}
    finished(tmp_path, 1, "sample", {})
    stage = Stage("x", ("sample", "calibrate.edges"), (Input("sample"),), train=dict)
    made = manifest.fingerprint(tmp_path, recipe, sources, scheduled(1, stage, (1, "sample")))
    assert made["sample.temperature"] == 1.0 and made["calibrate.edges"] == [0.8, 0.6, 0.4, 0.2]
    assert not any(key.startswith(("label.", "calibrate.budgets", "model.lora")) for key in made)
    finished(tmp_path, 1, "sample", {"other": 1})
    again = manifest.fingerprint(tmp_path, recipe, sources, scheduled(1, stage, (1, "sample")))
    assert manifest.difference(made, again)[0] == "input round_1/sample"


def test_questions_that_are_in_no_file_are_in_the_fingerprint(recipe, monkeypatch):
    def sums(**keys) -> dict[str, str]:
        return manifest.source_files(recipe.model_copy(update={"problems": ProblemSpec.model_validate(keys)}))

    monkeypatch.setattr(manifest, "digest", lambda spec: f"content of {spec.path}")
    assert sums(format="datasets", path="some/set")["problems.path"] == "content of some/set"
    monkeypatch.setattr(manifest.gym, "version", lambda: "0.1.25")
    sizes = {"train": 1, "calibrate": 1, "validation": 1, "test": 1}
    made = sums(format="reasoning_gym", tasks=[{"task": "chain_sum", **sizes}])
    assert made["reasoning-gym"] == "0.1.25" and "problems.path" not in made


def test_a_folder_of_problems_is_fingerprinted_without_what_is_hidden(recipe, tmp_path):
    for name in ("train.jsonl", ".git/FETCH_HEAD", ".cache/huggingface/x.metadata"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text("x")
    problems = ProblemSpec(path=str(tmp_path / "set"))
    found = manifest.source_files(recipe.model_copy(update={"problems": problems}))
    assert [name for name in found if name.startswith("problems.path")] == ["problems.path/train.jsonl"]


def test_sections_of_every_stage_exist(recipe):
    from flywheel.stages import stages

    for stage in stages(1):
        assert manifest.recipe_leaves(recipe, stage.sections)
    with pytest.raises(ValueError, match="sampel"):
        manifest.recipe_leaves(recipe, ("sampel",))


def test_a_published_prm_changes_no_training(recipe):
    from flywheel.stages import stages

    published = PublishedSpec(model="some/model", format="qwen")
    rival = recipe.model_copy(update={"prm": recipe.prm.model_copy(update={"published": published})})
    read = {stage.name: [manifest.recipe_leaves(r, stage.sections) for r in (recipe, rival)] for stage in stages(1)}
    assert {name for name, (before, after) in read.items() if before != after} == {"calibrate", "search"}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda base: (base / "config.json").unlink(), "is not a model"),
        (lambda base: [p.unlink() for p in base.iterdir()] and base.rmdir(), "is not a model directory"),
        (
            lambda base: (base / "model.safetensors").rename(base / "pytorch_model.bin"),
            "no \\*.safetensors; pickled weights",
        ),
    ],
)
def test_a_base_that_is_no_model_is_named(recipe, make, message):
    make(Path(recipe.model.base))
    with pytest.raises(Exception, match=f"model.base: .*{message}"):
        manifest.source_files(recipe)


def test_a_manifest_lists_what_the_stage_made_and_not_its_scratch(tmp_path):
    directory = manifest.stage_dir(tmp_path, 1, "distill")
    for name in ("adapter/weights", "trainer/checkpoint", "rank_0.log", "claims.lock"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    made = manifest.seal(tmp_path, scheduled(1, toy_stages.DISTILL), {}, {}, 0.0, 1)
    assert list(made["files"]) == ["adapter/weights"]
    manifest.check_files(directory, made, contents=True)
    (directory / "adapter" / "weights").write_text("adapter/WEIGHTS")  # same size
    manifest.check_files(directory, made)
    os.utime(directory / "adapter" / "weights", ns=(1, 1))
    with pytest.raises(Damaged, match="sha256"):
        manifest.check_files(directory, made, contents=True)
    assert json.loads((directory / "manifest.json").read_text()) == made


@pytest.mark.parametrize(
    "count, size, sizes",
    [(120, 50, [40, 40, 40]), (100, 60, [50, 50]), (7, 3, [2, 2, 3]), (3, 5, [3]), (0, 5, []), (4, 1, [1, 1, 1, 1])],
)
def test_chunks_are_of_nearly_one_length_and_lose_nothing(count, size, sizes):
    items = [f"q{i}" for i in range(count)]
    made = cut(items, size)
    assert [len(c) for c in made] == sizes and [q for c in made for q in c] == items
